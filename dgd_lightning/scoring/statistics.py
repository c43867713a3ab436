"""Paired comparison of two arms' scores: differences with intervals over contexts, exact tests, Holm, power.

Tasks of one context depend on each other, so contexts are what is resampled and what is exchanged, never tasks.
And how far two judges agree beyond chance: Cohen's κ per rubric and per task.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dgd_lightning.metrics.clustered import NAN, Difference, clustered_mean
from dgd_lightning.scoring.graded import read_score

ALPHA = 0.05  # two-sided
POWER = 0.8  # of the smallest effect that is called detectable


class Pair(NamedTuple):
    """One task's scores under two arms."""

    context: str
    base: float  # 0 or 1, or a share
    other: float


class Comparison(NamedTuple):
    """An arm against another one over the same tasks."""

    base: float  # mean score
    other: float
    difference: Difference  # other − base, 95% interval over contexts; NaN bounds where all contexts differ alike
    p: float  # of no difference, `sign_flip_p`
    mcnemar: float  # the same for tasks that do not depend on each other, exact
    fixed: int  # tasks that rose
    broken: int  # tasks that fell
    detectable: float  # smallest difference found with 80% power, given how contexts vary here; NaN without an interval
    tasks: int
    contexts: int


def compare(pairs: Iterable[Pair]) -> Comparison:
    """Compare two arms over the tasks that both answered.

    Where no task differs, or all contexts by the same, resampling says nothing about how far apart the arms may be, so
    no interval is given.

    Args:
        pairs: one per task; several of one task (as with several seeds) count within its context.
    """
    kept = list(pairs)
    by_context: dict[str, list[float]] = defaultdict(list)
    for pair in kept:
        by_context[pair.context].append(pair.other - pair.base)
    differences, counts = [sum(values) for values in by_context.values()], list(map(len, by_context.values()))
    fixed, broken = sum(p.other > p.base for p in kept), sum(p.other < p.base for p in kept)
    difference = _resampled(differences, counts)
    return Comparison(
        sum(p.base for p in kept) / len(kept) if kept else NAN,
        sum(p.other for p in kept) / len(kept) if kept else NAN,
        difference,
        sign_flip_p(differences),
        mcnemar_p(fixed, broken),
        fixed,
        broken,
        detectable(differences, counts) if difference.bounded else NAN,
        len(kept),
        len(counts),
    )


def rate(scores: Iterable[tuple[str, float]]) -> Difference:
    """Mean score with its 95% interval over contexts.

    Where all tasks are solved or none is, resampling gives no interval: then the bounds are those of the share of
    contexts that are all one thing (Clopper & Pearson 1934, scipy), which no rate of tasks can be surer of. Contexts
    that share another rate give no interval: NaN bounds.

    Args:
        scores: (context, score) of each task.
    """
    by_context: dict[str, list[float]] = defaultdict(list)
    for context, score in scores:
        by_context[context].append(float(score))
    values = by_context.values()
    only = {score for one in values for score in one}
    if len(only) == 1 and only <= {0.0, 1.0}:
        from scipy.stats import binomtest  # a second of imports: no mistake in a command's options waits for it

        same = only.pop()
        bounds = binomtest(round(same * len(values)), len(values)).proportion_ci(0.95, method="exact")
        return Difference(same, float(bounds.low), float(bounds.high))
    return _resampled(list(map(sum, values)), list(map(len, values)))


def _resampled(sums: Sequence[float], counts: Sequence[int]) -> Difference:
    """The pooled mean; with NaN bounds where all contexts have one mean, of which resampling makes a width of zero."""
    found = clustered_mean(sums, counts)
    return found if found.low < found.high else Difference(found.value)


def sign_flip_p(differences: Sequence[float], *, draws: int = 99_999) -> float:
    """Two-sided p of no difference: either arm could have been the other, context by context.

    Under that hypothesis the sign of every context's sum of differences is a coin's. Whole numbers, as of solved tasks,
    are counted out exactly; with one task per context that is McNemar's exact test. Others are drawn, with the sample
    itself among the draws, so that the test keeps its level (Phipson & Smyth 2010).

    Args:
        differences: per context, summed over its tasks.
        draws: for differences that are no whole numbers.
    """
    values = np.abs(np.array([d for d in differences if d], dtype=float))
    if not len(values):
        return 1.0
    seen = abs(float(sum(differences)))
    if all(float(v).is_integer() for v in values):
        distribution = np.ones(1)  # of the sum, from −reach to reach in steps of one
        for size in values.astype(int):
            step = np.zeros(2 * size + 1)
            step[0] = step[-1] = 0.5
            distribution = np.convolve(distribution, step)
        sums = np.arange(len(distribution)) - len(distribution) // 2
        return min(1.0, float(distribution[np.abs(sums) >= seen - 0.5].sum()))
    rng = np.random.default_rng(0)
    rounding = 1e-9 * max(1.0, seen)
    beyond = 0
    for start in range(0, draws, 4096):
        signs = rng.integers(0, 2, (min(4096, draws - start), len(values))) * 2 - 1
        beyond += int((np.abs(signs @ values) >= seen - rounding).sum())
    return (beyond + 1) / (draws + 1)


def mcnemar_p(fixed: int, broken: int) -> float:
    """McNemar's exact two-sided p (scipy's binomial test on the tasks that changed); 1 where none did."""
    changed = fixed + broken
    if not changed:
        return 1.0
    from scipy.stats import binomtest  # late, as in `rate`

    return float(binomtest(fixed, changed, 0.5).pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """p-values of several comparisons made together, adjusted by Holm's step-down method (statsmodels)."""
    if not p:
        return []
    from statsmodels.stats.multitest import multipletests  # a second of imports, for those who compare

    return [float(value) for value in multipletests(p, method="holm")[1]]


def detectable(differences: Sequence[float], counts: Sequence[int]) -> float:
    """Smallest true difference of means that would be found at 5% in 80% of runs like this one.

    (z₀.₉₇₅ + z₀.₈)·SE, with the cluster-robust standard error of a pooled mean (linearised ratio, Cochran 1977, ch. 6).
    NaN for fewer than two contexts, or where nothing differs.
    """
    total, clusters = sum(counts), len(counts)
    if clusters < 2 or not any(differences):
        return NAN
    from scipy.stats import norm  # late, as in `rate`

    mean = sum(differences) / total
    residuals = np.array(differences) - mean * np.array(counts)
    error = float(np.sqrt(clusters / (clusters - 1) * (residuals**2).sum())) / total
    return float(norm.ppf(1 - ALPHA / 2) + norm.ppf(POWER)) * error


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
    """Agreement of the two judges of graded rows (``dgd.grading.second``), where both judged the same rubrics."""
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
