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


def kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """Cohen's κ of two judges' verdicts on the same items in the same order (statsmodels; Cohen 1960).

    NaN for no verdicts, and where both judges gave one and the same verdict throughout: then chance alone explains all
    agreement, and κ is 0/0.

    Raises:
        ValueError: of different lengths.
    """
    pairs = Counter(zip(first, second, strict=True))
    verdicts = list(dict.fromkeys(verdict for pair in pairs for verdict in pair))
    if len(verdicts) < 2:
        return float("nan")
    from statsmodels.stats.inter_rater import cohens_kappa  # a second of imports, for those with two judges

    return float(cohens_kappa([[pairs[a, b] for b in verdicts] for a in verdicts], return_results=False))


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
    by_task, by_rubric = ((len(pair[0]), _share(*pair), kappa(*pair)) for pair in (scores, statuses))
    return Agreement(*by_task, *by_rubric)


def _share(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    same = sum(a == b for a, b in zip(first, second, strict=True))
    return same / len(first) if first else float("nan")
