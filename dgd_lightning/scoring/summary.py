"""Summary of a run's scores: two labelled rates where answers have no score, bounds, rubrics; by category and length.

*official* leaves unscored tasks out, as CL-bench's own evaluation counts what its judge has graded; *strict* counts
them as not solved. Where the two differ, the bounds say what the missing scores could still change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dgd_lightning.metrics.clustered import Difference
from dgd_lightning.scoring.graded import Graded, Versus, by_arm
from dgd_lightning.scoring.statistics import Comparison, Pair, compare, holm, rate
from dgd_lightning.scoring.transitions import Moves, classified, outcomes, transitions

LENGTHS = (0, 4_096, 8_192, 16_384, 32_768, 65_536)  # prompt tokens: lower ends of groups


class Rates(NamedTuple):
    """What one group of tasks came to under one arm."""

    tasks: int
    scored: int
    solved: float
    official: Difference  # of the scored, 95% interval over contexts
    strict: Difference  # of all
    most: float  # were every unscored task solved
    rubrics: float  # share of all rubrics of scored tasks that hold; NaN where there are none


class Compared(NamedTuple):
    """Two arms, and how they differ."""

    versus: Versus
    result: Comparison
    holm: float  # p adjusted for all comparisons made together


def rates(scores: Sequence[Graded], *, seed: int = 0) -> Rates:
    """Of one arm's tasks."""
    scored = [one for one in scores if one.score is not None]
    solved = float(sum(one.score or 0.0 for one in scored))
    yes, asked = (sum(one.satisfied[part] for one in scored) for part in (0, 1))
    nothing = float("nan")
    official = rate([(one.context, one.score or 0.0) for one in scored], seed=seed)
    whole = len(scored) == len(scores)  # then both rates are one
    return Rates(
        len(scores),
        len(scored),
        solved,
        official,
        official if whole else rate([(one.context, one.score or 0.0) for one in scores], seed=seed),
        (solved + len(scores) - len(scored)) / len(scores) if scores else nothing,
        yes / asked if asked else nothing,
    )


def compared(scores: Sequence[Graded], wanted: Sequence[Versus], *, seed: int = 0) -> list[Compared]:
    """Every wanted comparison over the tasks scored under both arms; those without such tasks are left out."""
    arms = by_arm(scores)
    found = []
    for versus in wanted:
        base, other = arms.get(versus.base, {}), arms.get(versus.arm, {})
        pairs = [
            Pair(one.context, one.score, other[idx].score)  # type: ignore[arg-type]
            for idx, one in base.items()
            if idx in other and one.score is not None and other[idx].score is not None
        ]
        if pairs:
            found.append((versus, compare(pairs, seed=seed)))
    adjusted = holm([result.p for _, result in found])
    return [Compared(versus, result, p) for (versus, result), p in zip(found, adjusted, strict=True)]


def length_group(one: Graded) -> str:
    """The group of prompt lengths that a task belongs to; empty where its length is not known."""
    if one.prompt_tokens is None:
        return ""
    low = max(edge for edge in LENGTHS if edge <= one.prompt_tokens)
    above = [edge for edge in LENGTHS if edge > low]
    return f"{low // 1024}K–{above[0] // 1024}K tokens" if above else f"{low // 1024}K tokens and more"


GROUPS: dict[str, Callable[[Graded], str]] = {
    "by_category": lambda one: one.category,
    "by_sub_category": lambda one: one.sub_category,
    "by_length": length_group,
}


def summary(scores: Sequence[Graded], found: Sequence[Compared]) -> dict[str, Any]:
    """All of it, JSON-able; numbers that do not exist are null."""
    arms: dict[str, Any] = {}
    with_classes = classified(scores)
    for arm, tasks in by_arm(scores).items():
        graded = list(tasks.values())
        arms[arm] = plain(rates(graded))
        for name, group_of in GROUPS.items():
            groups = sorted({group_of(one) for one in graded} - {""})
            arms[arm][name] = {
                group: plain(rates([one for one in graded if group_of(one) == group])) for group in groups
            }
        reverted = [one.reverted for one in graded if one.reverted is not None]
        if reverted:
            arms[arm]["reverted_to_prior"] = {"tasks": len(reverted), "reverted": sum(reverted)}
        if with_classes:
            arms[arm]["outcomes"] = outcomes(graded)
    return {
        "arms": arms,
        "comparisons": [
            {
                "arm": one.versus.arm,
                "against": one.versus.base,
                "null_control": one.versus.control,
                **plain(one.result),
                "p_holm": one.holm,
                **({"transitions": _nested(transitions(scores, one.versus))} if with_classes else {}),
            }
            for one in found
        ],
    }


def _nested(moves: Moves) -> dict[str, dict[str, int]]:
    """By the outcome under the base, then under the arm."""
    found: dict[str, dict[str, int]] = {}
    for (before, after), tasks in moves.items():
        found.setdefault(before, {})[after] = tasks
    return found


def plain(record: Any) -> Any:
    """NamedTuples as objects, NaN as null."""
    if hasattr(record, "_asdict"):
        return {name: plain(value) for name, value in record._asdict().items()}
    return None if isinstance(record, float) and record != record else record
