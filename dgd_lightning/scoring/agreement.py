"""How far two judges agree beyond chance: Cohen's κ per rubric and per task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

from dgd_lightning.scoring.graded import read_score


class Agreement(NamedTuple):
    """Of two judges of the same answers."""

    tasks: int  # that both judged
    task_share: float  # equal scores, 0…1; NaN for no tasks
    task_kappa: float
    rubrics: int  # of these tasks
    rubric_share: float
    rubric_kappa: float


def cohens_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """κ = (p_o − p_e) / (1 − p_e), p_e from each judge's own shares (Cohen 1960).

    NaN for no verdicts, and where both judges gave one and the same verdict throughout: then chance alone explains all
    agreement, and κ is 0/0.

    Args:
        first: one judge's verdicts.
        second: the other's, of the same items in the same order.

    Raises:
        ValueError: of different lengths.
    """
    total = len(first)
    same = sum(a == b for a, b in zip(first, second, strict=True))
    left, right = Counter(first), Counter(second)
    by_chance = sum(left[verdict] * right[verdict] for verdict in left)  # in whole numbers: total² · p_e
    if by_chance == total**2:  # also for no verdicts
        return float("nan")
    return (same * total - by_chance) / (total**2 - by_chance)


def agreement(rows: Iterable[dict[str, Any]]) -> Agreement:
    """Agreement of the two judges of graded rows (``dgd.grading.second``).

    Rows without two verdicts on the same rubrics do not count.

    Args:
        rows: with ``score``, ``requirement_status`` and ``dgd.grading`` as `RubricJudge` fills them.
    """
    scores: tuple[list[bool], list[bool]] = ([], [])
    statuses: tuple[list[str], list[str]] = ([], [])
    for row in rows:
        first = read_score(row)
        second = (first.details or {}).get("second")
        if not isinstance(second, dict):
            continue
        other = read_score(second)
        if first.value is None or other.value is None or len(first.status) != len(other.status):
            continue
        for kept, listed, one in zip(scores, statuses, (first, other), strict=True):
            kept.append(one.value == 1.0)
            listed += one.status
    by_task, by_rubric = ((len(pair[0]), _share(*pair), cohens_kappa(*pair)) for pair in (scores, statuses))
    return Agreement(*by_task, *by_rubric)


def _share(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    same = sum(a == b for a, b in zip(first, second, strict=True))
    return same / len(first) if first else float("nan")
