"""Summary of a run's scores: two labelled rates where answers have no score, bounds, rubrics; by category and length.

*official* leaves unscored tasks out, as CL-bench's own evaluation counts what its judge has graded; *strict* counts
them as not solved. Where the two differ, the bounds say what the missing scores could still change.
"""

from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from dgd_lightning.grader import ERROR_CLASSES
from dgd_lightning.metrics.clustered import NAN, Difference
from dgd_lightning.metrics.power import Findable
from dgd_lightning.scoring.graded import Graded, Versus, by_arm
from dgd_lightning.scoring.harness_rules import FILTERS
from dgd_lightning.scoring.statistics import Comparison, Pair, compare, findable, holm, rate

LENGTHS = (0, 4_096, 8_192, 16_384, 32_768, 65_536)  # prompt tokens: lower ends of groups
SOLVED, UNCLASSIFIED = "solved", "unclassified"
OUTCOMES = (SOLVED, *ERROR_CLASSES, UNCLASSIFIED)  # what a scored task came to


class Rates(NamedTuple):
    """What one group of tasks came to under one arm."""

    tasks: int
    scored: int
    solved: float
    official: Difference  # of the scored, 95% interval over contexts
    strict: Difference  # of all
    most: float  # were every unscored task solved
    rubrics: float  # share of all rubrics of scored tasks that hold; NaN where there are none
    lm_eval: dict[str, float] | None  # GSM8K: share of the answers that are right by lm-evaluation-harness' filters


class Compared(NamedTuple):
    """Two arms, and how they differ."""

    versus: Versus
    result: Comparison
    holm: float  # p adjusted for all comparisons made together
    finds: Findable | None = None  # None where scores are shares


def rates(scores: Sequence[Graded]) -> Rates:
    """Of one arm's tasks."""
    scored = [one for one in scores if one.score is not None]
    lost = len(scores) - len(scored)
    solved = float(sum(one.score or 0.0 for one in scored))
    yes, asked = (sum(one.satisfied[part] for one in scored) for part in (0, 1))
    official = rate((one.context, one.score or 0.0) for one in scored)
    strict = rate((one.context, one.score or 0.0) for one in scores) if lost else official
    most = (solved + lost) / len(scores) if scores else NAN
    harness = [one.lm_eval for one in scores if one.lm_eval is not None]
    shares = [sum(column) / len(harness) for column in zip(*harness, strict=True)]
    return Rates(
        len(scores),
        len(scored),
        solved,
        official,
        strict,
        most,
        yes / asked if asked else NAN,
        dict(zip(FILTERS, shares, strict=True)) if harness else None,
    )


def compared(scores: Sequence[Graded], wanted: Sequence[Versus]) -> list[Compared]:
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
            found.append((versus, compare(pairs), pairs))
    adjusted = holm([result.p for _, result, _ in found])
    return [
        Compared(versus, result, p, findable(pairs, len(found)))
        for (versus, result, pairs), p in zip(found, adjusted, strict=True)
    ]


def outcome(one: Graded) -> str | None:
    """What came of a task; None where it has no score."""
    if one.score is None:
        return None
    return SOLVED if one.score == 1.0 else one.error_class or UNCLASSIFIED


def outcomes(scores: Iterable[Graded]) -> dict[str, int]:
    """How many tasks came to what, in the order of `OUTCOMES`, without zeros; unscored ones are left out."""
    counts = Counter(map(outcome, scores))
    return {name: counts[name] for name in OUTCOMES if counts[name]}


def classified(scores: Iterable[Graded]) -> bool:
    """Whether any failed task has a class: without one there is nothing beyond fixed and broken."""
    return any(one.error_class is not None for one in scores)


def transitions(scores: Sequence[Graded], versus: Versus) -> dict[str, dict[str, int]]:
    """Tasks scored under both arms: [outcome under the base][under the arm], in the order of `OUTCOMES`, no zeros."""
    arms = by_arm(scores)
    base, other = arms.get(versus.base, {}), arms.get(versus.arm, {})
    moves = {
        before: outcomes(other[idx] for idx, one in base.items() if idx in other and outcome(one) == before)
        for before in OUTCOMES
    }
    return {before: after for before, after in moves.items() if after}


def length_group(one: Graded) -> str:
    """The group of prompt lengths that a task belongs to; empty where its length is not known."""
    if one.prompt_tokens is None:
        return ""
    place = bisect(LENGTHS, one.prompt_tokens)
    low = LENGTHS[place - 1] // 1024
    return f"{low}K–{LENGTHS[place] // 1024}K tokens" if place < len(LENGTHS) else f"{low}K tokens and more"


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
                "finds": plain(one.finds),
                **({"transitions": transitions(scores, one.versus)} if with_classes else {}),
            }
            for one in found
        ],
    }


def plain(record: Any) -> Any:
    """NamedTuples as objects, NaN as null."""
    if hasattr(record, "_asdict"):
        return {name: plain(value) for name, value in record._asdict().items()}
    return None if isinstance(record, float) and record != record else record
