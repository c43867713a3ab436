"""What comparisons come to, in plain words."""

from collections.abc import Collection, Sequence

from dgd_lightning.metrics.diagnosis import FEWEST_CONTEXTS
from dgd_lightning.report.solve_rates import change, p_value
from dgd_lightning.scoring.graded import Graded, by_arm
from dgd_lightning.scoring.statistics import ALPHA
from dgd_lightning.scoring.summary import Compared, rates


def verdict(found: Sequence[Compared], scores: Sequence[Graded], blending: Collection[str] = ()) -> list[str]:
    """A sentence per compared arm that is no null control itself; a last one where answers have no score.

    "Better" and "worse" ask for p ≤ 0.05 after Holm's adjustment over all comparisons, which are made together.
    ``blending``: arms that blend a readout with the target; one that is better and has no null control is said to.
    """
    controls = {one.versus.base for one in found if one.versus.control}
    main = [one for one in found if not one.versus.control and one.versus.arm not in controls]
    sentences = [_sentence(one, found, one.versus.arm in blending) for one in main] or [_alone(by_arm(scores))]
    if lost := sum(one.score is None for one in scores):
        sentences.append(f"{lost:,} of {len(scores):,} answers have no score and are in no comparison.")
    return sentences


def _alone(arms: dict[str, dict[str, Graded]]) -> str:
    if len(arms) != 1:
        return "Nothing was compared (lossless arms give one distribution's answers): name a baseline with --against."
    ((arm, tasks),) = arms.items()
    found = rates(list(tasks.values()))
    if not found.scored:
        return f"One arm, nothing to compare: {arm} has no scores."
    return (
        f"One arm, nothing to compare: {arm} solves {found.official.text('{:.1%}')} of {found.scored:,} scored tasks."
    )


def _sentence(one: Compared, found: Sequence[Compared], blends: bool) -> str:
    result = one.result
    controls = [other for other in found if other.versus.control and other.versus.arm == one.versus.arm]
    head = f"{one.versus.arm} against {one.versus.base}:"
    amount = _amount(one)
    if one.holm > ALPHA:
        if not result.fixed and not result.broken:
            return f"{head} no task differs{''.join(map(_beside, controls))}."
        missed = ""
        if result.contexts < FEWEST_CONTEXTS:
            missed = f"; with contexts as few as {result.contexts} even large differences would be missed"
        elif result.detectable == result.detectable:
            missed = f"; differences below {100 * result.detectable:.1f} points would be missed"
        return f"{head} no difference found ({amount}){missed}{''.join(map(_beside, controls))}."
    if result.difference.value < 0:
        return f"{head} worse ({amount})."
    alone = "; it has no null control here, so what helps need not be what the readout knows"
    return f"{head} better ({amount}){''.join(map(_beaten, controls)) or alone * blends}."


def _beside(control: Compared) -> str:
    """The null control, where there is nothing that it would have to be beaten in."""
    return f"; against its null control {control.versus.base} {_amount(control)}"


def _beaten(control: Compared) -> str:
    amount = _amount(control)
    if control.holm <= ALPHA and control.result.difference.value > 0:
        return f", and better than its null control {control.versus.base} ({amount})"
    return (
        f", but not shown to be better than its null control {control.versus.base} ({amount}), "
        "so what helps need not be what the readout knows"
    )


def _amount(one: Compared) -> str:
    value, _, interval = change(one.result).partition(" ")
    numbers = f"{'0.0' if value == 'none' else value} points {interval}".rstrip()
    return f"{numbers}, Holm p {p_value(one.holm)}"
