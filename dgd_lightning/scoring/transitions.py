"""What became of every task from one arm to another: solved, or failed in one of the error classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from dgd_lightning.grader import ERROR_CLASSES
from dgd_lightning.scoring.graded import Graded, Versus, by_arm

SOLVED, UNCLASSIFIED = "solved", "unclassified"
OUTCOMES = (SOLVED, *ERROR_CLASSES, UNCLASSIFIED)

Moves = dict[tuple[str, str], int]  # (outcome under the base, outcome under the arm): tasks


def outcome(one: Graded) -> str | None:
    """What came of a task; None where it has no score."""
    if one.score is None:
        return None
    return SOLVED if one.score == 1.0 else one.error_class or UNCLASSIFIED


def outcomes(scores: Iterable[Graded]) -> dict[str, int]:
    """How many of one arm's tasks came to what, in the order of `OUTCOMES`; unscored ones are left out."""
    counts = Counter(outcome(one) for one in scores)
    return {name: counts[name] for name in OUTCOMES if counts[name]}


def classified(scores: Iterable[Graded]) -> bool:
    """Whether any failed task has a class: without one there is nothing beyond fixed and broken."""
    return any(one.error_class is not None for one in scores)


def transitions(scores: Sequence[Graded], versus: Versus) -> Moves:
    """Tasks scored under both arms by what they came to under each; in the order of `OUTCOMES`, without zeros."""
    arms = by_arm(scores)
    base, other = arms.get(versus.base, {}), arms.get(versus.arm, {})
    counts = Counter((outcome(one), outcome(other[idx])) for idx, one in base.items() if idx in other)
    return {
        (before, after): counts[before, after] for before in OUTCOMES for after in OUTCOMES if counts[before, after]
    }
