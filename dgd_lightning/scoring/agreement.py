"""How far two judges agree beyond chance: Cohen's κ per rubric and per task."""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

from dgd_lightning.metrics.clustered import NAN
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
        return NAN
    from statsmodels.stats.inter_rater import cohens_kappa  # a second of imports, for those with two judges

    return float(cohens_kappa([[pairs[a, b] for b in verdicts] for a in verdicts], return_results=False))


def agreement(rows: Iterable[dict[str, Any]]) -> Agreement:
    """Agreement of the two judges of graded rows (``dgd.grading.second``).

    Rows without two verdicts on the same rubrics do not count.

    Args:
        rows: with ``score``, ``requirement_status`` and ``dgd.grading`` as `RubricJudge` fills them.
    """
    tasks: list[tuple[bool, bool]] = []
    rubrics: list[tuple[str, str]] = []
    for row in rows:
        first = read_score(row)
        second = (first.details or {}).get("second")
        if not isinstance(second, dict):
            continue
        other = read_score(second)
        if first.value is not None and other.value is not None and len(first.status) == len(other.status):
            tasks.append((first.value == 1.0, other.value == 1.0))
            rubrics += zip(first.status, other.status, strict=True)
    return Agreement(*_agreement(tasks), *_agreement(rubrics))


def _agreement(pairs: Sequence[tuple[Hashable, Hashable]]) -> tuple[int, float, float]:
    share = sum(a == b for a, b in pairs) / len(pairs) if pairs else NAN
    return len(pairs), share, kappa([a for a, _ in pairs], [b for _, b in pairs])
