"""The result of a predict run in plain sentences: are answers lossless and how much faster, what adaptation changed.

What guidance changed in solve rates is said by :func:`dgd_lightning.report.solve_rates.verdict`.
"""

from collections.abc import Mapping, Sequence

from dgd_lightning.analysis.adaptation import Gain
from dgd_lightning.analysis.arms import ArmStats, baseline_of, speed_up
from dgd_lightning.metrics.diagnosis import FEWEST_CONTEXTS


def speed_sentences(stats: Mapping[str, ArmStats]) -> list[str]:
    """Which arms are lossless and how much faster than their baseline; then which are not, by design."""
    arms = [arm for arm in stats.values() if arm.tasks]
    lossless = [arm for arm in arms if arm.lossless and not arm.baseline]
    guided = [arm for arm in arms if not arm.lossless]
    sentences = []
    if lossless:
        sentences.append(f"Lossless, answers have the target's own distribution: {_speeds(lossless, stats)}.")
    if guided:
        sentences.append(f"Not lossless, another distribution by design: {_speeds(guided, stats)}.")
    if not arms:
        return ["No task was decoded."]
    return sentences or [f"Nothing was compared in speed: only {_listed([arm.name for arm in arms])} decoded tasks."]


def _speeds(arms: Sequence[ArmStats], stats: Mapping[str, ArmStats]) -> str:
    """``a 2.31× and b 2.52× as fast as plain; c, which has no baseline at its sampling``."""
    parts: dict[str, list[str]] = {}
    for arm in arms:
        base, factor = baseline_of(arm, stats), speed_up(arm, stats)
        if base is None:
            parts.setdefault("without a baseline of the same temperature, top_k and top_p", []).append(arm.name)
        elif factor == factor:
            parts.setdefault(f"as fast as {base.name}", []).append(f"{arm.name} {factor:.2f}×")
        else:
            parts.setdefault("without a speed of their own" if arm.shared.tokens else "not timed", []).append(arm.name)
    return "; ".join(f"{_listed(names)} {rest}" for rest, names in parts.items())


def adaptation_sentences(gains: Sequence[Gain], alone: Sequence[str] = ()) -> list[str]:
    """What adaptation changed in τ, in one sentence; none where no arm adapts.

    ``alone``: adapting arms without one that differs in nothing else; named only where there is no gain at all.
    """
    if gains:
        return [f"Adaptation: {'; '.join(map(_gain, gains))}."]
    if alone:
        which = "no arm differs from it" if len(alone) == 1 else "no arms differ from them"
        return [f"What adaptation changed is not known: {_listed(alone)} adapted, but {which} in adaptation alone."]
    return []


def _gain(gain: Gain) -> str:
    tau, against = gain.tau, f"in {gain.arm} against {gain.base}"
    if not tau.contexts:
        return f"nothing was verified {against} in the same context"
    numbers = f"τ {tau.base:.2f} → {tau.tau:.2f}, {tau.ratio.text('{:+.1%}')} over {tau.contexts} contexts"
    if tau.contexts < FEWEST_CONTEXTS:
        return f"too few contexts to say what changed {against} ({numbers}; {FEWEST_CONTEXTS} are the least)"
    low, high = tau.difference.low, tau.difference.high
    if low == high == 0:
        return f"τ did not change {against} (τ {tau.tau:.2f} in {tau.contexts} contexts)"
    changed = "τ rose" if low > 0 else "τ fell" if high < 0 else "no change of τ found"
    return f"{changed} {against} ({numbers})"


def ungraded_sentences(stats: Mapping[str, ArmStats]) -> list[str]:
    """Where nothing is graded: whose answers may be better or worse without anybody knowing."""
    names = [arm.name for arm in stats.values() if not arm.lossless and arm.tasks]
    return [f"Whether {_listed(names)} answered better is not known: no answer is graded yet."] if names else []


def _listed(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
