"""Solve rates: tables of a line per arm, what an arm changed against baseline and null controls, a verdict in words."""

from collections.abc import Callable, Sequence
from textwrap import wrap

from rich.table import Table

from dgd_lightning.metrics.clustered import ALPHA, Difference, shown
from dgd_lightning.metrics.power import FEWEST
from dgd_lightning.report.print_tables import new_table
from dgd_lightning.report.words import WORDS, Words, words_of
from dgd_lightning.scoring.graded import Graded, Versus, by_arm
from dgd_lightning.scoring.harness_rules import FILTERS
from dgd_lightning.scoring.statistics import Agreement, Comparison
from dgd_lightning.scoring.summary import GROUPS, OUTCOMES, Compared, classified, outcomes, rates, transitions

REVERTED = "reverted to the prior"
RUBRICS = "rubrics that hold"
HEADER = 14  # characters of a header's line
TITLES = {"by_sub_category": "by sub-category", "by_length": "by prompt length"}


def score_tables(scores: Sequence[Graded], found: Sequence[Compared]) -> list[Table]:
    """All tables of one set of scores: rates, by group, comparisons, error classes, what became of tasks."""
    tables: list[Table | None] = [rate_table(scores)]
    arms, words = shown_arms(scores, found), words_of(scores)
    titles = {name: f"{words.measure} {by}" for name, by in TITLES.items()}
    tables += [group_table(scores, title, GROUPS[name], arms) for name, title in titles.items()]
    if found:
        tables.append(comparison_table(found, words))
    if classified(scores):
        tables.append(outcome_table(scores))
        tables += [transition_table(scores, one.versus) for one in found]
    return [table for table in tables if table is not None]


def shown_arms(scores: Sequence[Graded], found: Sequence[Compared]) -> list[str]:
    """Arms that are shown by group: those that are compared, or all."""
    arms = list(by_arm(scores))
    return [arm for arm in arms if any(arm in (c.versus.arm, c.versus.base) for c in found)] or arms


def rate_table(scores: Sequence[Graded]) -> Table:
    """Solve rates: a line per arm; all tasks with their 95% interval over contexts, then by category.

    Where tasks are unscored, a second column counts them as not solved, and a third says what the rate could still be.
    """
    lost, words = any(one.score is None for one in scores), words_of(scores)
    title = f"{words.measure} ({words.how}{words.over})"
    caption = [
        f"official: of the scored {words.tasks}. strict: unscored ones count as not solved. at most: as solved."
    ] * lost
    harness = filters(scores)
    caption += [f"{', '.join(harness)}: lm-evaluation-harness' verdicts on the same answers."] if harness else []
    categories = sorted({one.category for one in scores if one.category})
    reversible = any(one.reverted is not None for one in scores)
    rubrics = any(one.satisfied[1] > 1 for one in scores)
    whole = ["official", "strict", "at most"] if lost else [words.every]
    headers = [*whole, *harness, *categories, *([RUBRICS] if rubrics else []), *([REVERTED] if reversible else [])]
    table = new_table(title, ["arm"], map(_wrapped, headers), " ".join(caption) or None)
    for arm, tasks in by_arm(scores).items():
        graded = list(tasks.values())
        found = rates(graded)
        cells = [_rate(found.official, found.solved, found.scored)]
        if lost:
            cells += [_rate(found.strict, found.solved, found.tasks), f"{found.most:.1%}"]
        cells += _harness(graded, harness)
        for category in categories:
            cells.append(_share([one.score for one in graded if one.category == category]))
        if rubrics:
            cells.append(shown(found.rubrics, "{:.1%}"))
        if reversible:
            cells.append(_share([one.reverted for one in graded]))
        table.add_row(arm, *cells)
    return table


def group_table(
    scores: Sequence[Graded], title: str, group_of: Callable[[Graded], str], arms: Sequence[str]
) -> Table | None:
    """Solve rates of the scored tasks, a line per group and a column per arm; None where there are no two groups."""
    groups = sorted({group_of(one) for one in scores} - {""})
    if len(groups) < 2:
        return None
    harness = filters(scores)
    headers = [header for arm in arms for header in (arm, *(f"{arm}: {name}" for name in harness))]
    table = new_table(title, [words_of(scores).tasks], map(_wrapped, headers))
    for group in groups:
        cells = []
        for arm in arms:
            members = [one for one in scores if group_of(one) == group and one.arm == arm]
            cells += [_share([one.score for one in members]), *_harness(members, harness)]
        table.add_row(group, *(cell.replace("\n", "  ") for cell in cells))
    return table


def comparison_table(found: Sequence[Compared], words: Words = WORDS) -> Table:
    """One line per comparison."""
    gathered = f", spread evenly over tasks to gathered in whole {words.unit}s" * (words.unit != words.task)
    table = new_table(
        f"{words.measure}, paired by {words.task} (percentage points; {words.over})",
        ["arm", "against"],
        [words.tasks, "difference", "fixed", "broken", "p", "Holm", "finds"],
        f"fixed, broken: {words.tasks} that only one of the two solved. p: exact sign-flip test over {words.unit}s; "
        f"Holm: adjusted for all lines, as intervals are not. No interval: too few {words.unit}s, or changed ones, or "
        f"all changed alike. finds: smallest true gain that 80% of such runs would find{gathered}.",
    )
    for one in found:
        result = one.result
        table.add_row(
            one.versus.arm,
            base_name(one.versus).replace(" (", "\n("),
            f"{result.tasks}",
            change(result),
            f"{result.fixed}",
            f"{result.broken}",
            p_value(result.p),
            p_value(one.holm),
            finds(one),
        )
    return table


def base_name(versus: Versus) -> str:
    """What an arm is compared with, as tables name it."""
    return versus.base + " (null control)" * versus.control + " (other sampling)" * versus.other_sampling


def outcome_table(scores: Sequence[Graded]) -> Table:
    """Why tasks failed: a line per arm and a column per error class that occurs."""
    counts = {arm: outcomes(tasks.values()) for arm, tasks in by_arm(scores).items()}
    used = [name for name in OUTCOMES if any(name in found for found in counts.values())]
    table = new_table("What came of the tasks, by error class", ["arm"], [name.replace("_", "\n") for name in used])
    for arm, found in counts.items():
        table.add_row(arm, *(f"{found.get(name, 0)}" for name in used))
    return table


def transition_table(scores: Sequence[Graded], versus: Versus) -> Table | None:
    """What an arm fixed and broke: a line per outcome under the base, a column per outcome under the arm.

    None where every task came to the same under both.
    """
    moves = transitions(scores, versus)
    if all([*after] == [before] for before, after in moves.items()):
        return None
    title = f"{versus.arm} against {base_name(versus)}: what became of the tasks"
    columns = [name for name in OUTCOMES if any(name in after for after in moves.values())]
    table = new_table(title, ["before \\ after"], [name.replace("_", "\n") for name in columns])
    table.min_width = len(title)
    for before, after in moves.items():
        table.add_row(before, *(f"{after.get(name, '·')}" for name in columns))
    return table


def agreement_table(found: Agreement) -> Table:
    """How far two judges agree."""
    caption = "κ: Cohen's, agreement beyond chance: 0 none, 1 all. –: both said one and the same throughout."
    table = new_table("Agreement of the two judges", ["verdicts per"], ["judged by both", "equal", "κ"], caption)
    for name, total, share, kappa in (("task", *found[:3]), ("rubric", *found[3:])):
        table.add_row(name, f"{total}", shown(share, "{:.1%}"), shown(kappa, "{:.3f}"))
    return table


def change(result: Comparison) -> str:
    """A difference of rates in percentage points, with its interval where there is one; "none": no task differs."""
    if not result.fixed and not result.broken:
        return "none"
    return Difference(*(100 * end for end in result.difference)).text("{:+.1f}")


def finds(one: Compared) -> str:
    """The smallest gains that such runs find, in percentage points; in words where there is no number."""
    if one.finds is None:
        return "–"
    spread, whole, possible = one.finds
    if not possible:
        return "nothing"
    if one.result.contexts < FEWEST:
        return "only if nearly\nall agree"
    if spread != spread:
        return "no gain"
    if _points(spread) == _points(whole):  # of problems, each of which is a context
        return _points(spread)
    return f"{_points(spread)} to {_points(whole)}" if whole == whole else f"{_points(spread)} or more"


def _points(share: float) -> str:
    return f"{100 * share:+.{int(share < 0.0995)}f}"  # two digits: more are not known


def p_value(p: float) -> str:
    """Three digits; what they can't show is not called nothing."""
    return f"{p:.3f}" if p >= 0.0005 else "<0.001"


def _wrapped(header: str) -> str:
    return "\n".join(wrap(header, HEADER))


def _rate(found: Difference, solved: float, tasks: int) -> str:
    if not tasks:
        return "–"
    bounds = f" [{100 * found.low:.0f}, {100 * found.high:.0f}]" if found.bounded else ""
    return f"{found.value:.1%}{bounds}\n{solved:g}/{tasks}"


def _share(scores: Sequence[float | None]) -> str:
    """Of those that are there."""
    scored = [score for score in scores if score is not None]
    return f"{100 * sum(scored) / len(scored):.1f}%\n{sum(scored):g}/{len(scored)}" if scored else "–"


def filters(scores: Sequence[Graded]) -> Sequence[str]:
    """Those of lm-evaluation-harness that say something of these answers."""
    return FILTERS if any(one.lm_eval is not None for one in scores) else ()


def _harness(scores: Sequence[Graded], names: Sequence[str]) -> list[str]:
    verdicts = [one.lm_eval for one in scores if one.lm_eval is not None]
    return [_share([verdict[place] for verdict in verdicts]) for place in range(len(names))]


def verdict(found: Sequence[Compared], scores: Sequence[Graded]) -> list[str]:
    """A sentence per compared arm that is no null control itself; a last one where answers have no score.

    "Better" and "worse" ask for p ≤ 0.05 after Holm's adjustment over all comparisons, which are made together. Every
    sentence says how the arm did against its null controls; of one that blends a readout, also that it has none.
    """
    controls = {one.versus.base for one in found if one.versus.control}
    main = [one for one in found if not one.versus.control and one.versus.arm not in controls]
    words = words_of(scores)
    sentences = [_sentence(one, found, words) for one in main] or [_alone(by_arm(scores), words)]
    if lost := sum(one.score is None for one in scores):
        sentences.append(f"{lost:,} of {len(scores):,} answers have no score and are in no comparison.")
    return sentences


def _alone(arms: dict[str, dict[str, Graded]], words: Words) -> str:
    if len(arms) != 1:
        return "Nothing was compared (lossless arms give one distribution's answers): name a baseline with --against."
    ((arm, tasks),) = arms.items()
    found = rates(list(tasks.values()))
    if not found.scored:
        return f"One arm, nothing to compare: {arm} has no scores."
    share = found.official.text("{:.1%}")
    return f"One arm, nothing to compare: {arm} solves {share} of {found.scored:,} scored {words.tasks}."


def _sentence(one: Compared, found: Sequence[Compared], words: Words) -> str:
    result, amount = one.result, f"({_amount(one)})"
    controls = [other for other in found if other.versus.control and other.versus.arm == one.versus.arm]
    better = one.holm <= ALPHA and result.difference.value > 0
    if one.holm <= ALPHA:
        said = f"{'better' if better else 'worse'} {amount}"
    elif not result.fixed and not result.broken:
        said = f"no {words.task} differs"
    else:
        said = f"no difference found {amount}{_missed(one, len(found), words)}"
    beside = "".join(map(_beaten if better else _beside, controls))
    if one.versus.blends and not controls:
        beside = "; it has no null control here" + ", so what helps need not be what the readout knows" * better
    return f"{one.versus.arm} against {one.versus.base}: {said}{beside}."


def _missed(one: Compared, lines: int, words: Words) -> str:
    """What may be there although nothing was found."""
    if one.finds is None:
        return ""
    spread, whole, possible = one.finds
    contexts = words.counted(one.result.contexts)
    if not possible:
        return f"; {contexts} cannot find anything" + f" in {lines} comparisons" * (lines > 1)
    if one.result.contexts < FEWEST:
        return f"; {contexts} find a difference only if nearly all of them agree"
    if spread != spread:
        return "; no gain, however large, would be found in 80% of such runs"
    gathered = f"below {_points(whole)}" if whole == whole else "of any size"
    if words.unit == words.task:
        return f"; gains below {_points(spread)} points would often be missed"
    where = f"below {_points(spread)} points if spread evenly over tasks, {gathered} if gathered in whole contexts"
    return f"; gains {where}, would often be missed"


def _beside(control: Compared) -> str:
    """The null control, where there is nothing that it would have to be beaten in."""
    return f"; against its null control {_named(control)}: {_amount(control)}"


def _named(control: Compared) -> str:
    """With its strength, where that was measured."""
    versus = control.versus
    return f"{versus.base} [{versus.strength}]" if versus.strength else versus.base


def _beaten(control: Compared) -> str:
    amount = _amount(control)
    if control.holm <= ALPHA and control.result.difference.value > 0:
        return f", and better than its null control {_named(control)} ({amount})"
    return (
        f", but not shown to be better than its null control {_named(control)} ({amount}), "
        "so what helps need not be what the readout knows"
    )


def _amount(one: Compared) -> str:
    value, _, interval = change(one.result).partition(" ")
    numbers = f"{'0.0' if value == 'none' else value} points {interval}".rstrip()
    alone = f"; without Holm, as the interval is, {p_value(one.result.p)}" if one.result.p <= ALPHA < one.holm else ""
    return f"{numbers}, Holm p {p_value(one.holm)}{alone}"
