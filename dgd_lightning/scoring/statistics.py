"""Paired comparison of two arms' scores: differences with intervals over contexts, exact tests, Holm, power.

Tasks of one context depend on each other, so contexts are what is exchanged between arms, never tasks.
And how far two judges agree beyond chance: Cohen's κ per rubric and per task.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dgd_lightning.metrics.clustered import ALPHA, NAN, Difference, sign_flip
from dgd_lightning.metrics.power import Findable, smallest_gains
from dgd_lightning.scoring.graded import read_score

UNKNOWN = 2  # contexts, see `rate`


class Pair(NamedTuple):
    """One task's scores under two arms."""

    context: str
    base: float  # 0 or 1, or a share
    other: float


class Comparison(NamedTuple):
    """An arm against another one over the same tasks."""

    base: float  # mean score
    other: float
    difference: Difference  # other − base, its interval the inversion of the test that gives p
    p: float  # of no difference, two-sided sign-flip test over contexts
    mcnemar: float  # the same for tasks that do not depend on each other, exact
    fixed: int  # tasks that rose
    broken: int  # tasks that fell
    tasks: int
    contexts: int


def compare(pairs: Iterable[Pair]) -> Comparison:
    """Compare two arms over the tasks that both answered.

    Args:
        pairs: one per task; several of one task (as with several seeds) count within its context.
    """
    kept = list(pairs)
    differences, counts = _by_context(kept, lambda pair: pair.other - pair.base), _by_context(kept, lambda _: 1)
    fixed, broken = sum(p.other > p.base for p in kept), sum(p.other < p.base for p in kept)
    (value, low, high), p = sign_flip(differences, counts)
    return Comparison(
        sum(p.base for p in kept) / len(kept) if kept else NAN,
        sum(p.other for p in kept) / len(kept) if kept else NAN,
        Difference(value, max(low, -1.0), min(high, 1.0)) if low == low else Difference(value),
        p,
        mcnemar_p(fixed, broken),
        fixed,
        broken,
        len(kept),
        len(counts),
    )


def findable(pairs: Iterable[Pair], lines: int) -> Findable | None:
    """What a run like this could have found with so many lines in its table; None where scores are shares.

    Shares have no tasks that flip, which is how effects are simulated.
    """
    kept = list(pairs)
    if not {0.0, 1.0}.issuperset(score for pair in kept for score in pair[1:]):
        return None
    tasks, solved = _by_context(kept, lambda _: 1), _by_context(kept, lambda pair: pair.base)
    fixed = _by_context(kept, lambda pair: pair.other > pair.base)
    broken = _by_context(kept, lambda pair: pair.other < pair.base)
    return smallest_gains(*(one.astype(int) for one in (tasks, solved, fixed, broken)), lines=lines)


def _by_context(pairs: Sequence[Pair], number: Callable[[Pair], float]) -> np.ndarray:
    """[C] sums over the tasks of each context, in the order in which the contexts come."""
    sums: dict[str, float] = defaultdict(float)
    for pair in pairs:
        sums[pair.context] += number(pair)
    return np.array(list(sums.values()))


def rate(scores: Iterable[tuple[str, float]]) -> Difference:
    """Mean score with its 95% interval over contexts; NaN bounds for fewer than two contexts.

    The interval is that of Clopper and Pearson for as many independent tasks as these are worth, times the ratio of
    Student's squared quantiles for tasks and for contexts (Korn & Graubard 1998). They are worth N/(1 + r(m − 1)) at
    most, with m tasks of the context of a task on average and the correlation r of two tasks of a context (Fleiss &
    Cuzick 1979), and p(1 − p) over the cluster-robust variance of the rate. Rates near 0 or 1 show little of r: it is
    drawn to 1 as if `UNKNOWN` more contexts, of only solved or only failed tasks, were among those that have both.

    Args:
        scores: (context, score) of each task.
    """
    pairs = [Pair(context, 0.0, float(score)) for context, score in scores]
    solved, tasks = _by_context(pairs, lambda pair: pair.other), _by_context(pairs, lambda _: 1)
    contexts, total = len(tasks), float(tasks.sum())
    value = float(solved.sum()) / total if contexts else NAN
    if contexts < 2:
        return Difference(value)
    from scipy.stats import beta, t  # a second of imports: no mistake in a command's options waits for it

    binary = value * (1 - value)
    telling = min(int((solved > 0).sum()), int((solved < tasks).sum()))  # contexts
    within = float((solved * (tasks - solved) / tasks).sum()) / (total - contexts) if total > contexts else 0.0
    alike = (telling * max(0.0, 1 - within / binary) + UNKNOWN) / (telling + UNKNOWN) if binary else 1.0
    worth = total / (1 + alike * (float((tasks**2).sum()) / total - 1))
    if variance := float(((solved - value * tasks) ** 2).sum()) / total**2 * contexts / (contexts - 1):
        worth = min(worth, binary / variance)
    quantiles = t.ppf(1 - ALPHA / 2, [total - 1, contexts - 1])
    worth *= float(quantiles[0] / quantiles[1]) ** 2
    yes, no = value * worth, (1 - value) * worth
    low = float(beta.ppf(ALPHA / 2, yes, no + 1)) if value > 0 else 0.0
    return Difference(value, low, float(beta.ppf(1 - ALPHA / 2, yes + 1, no)) if value < 1 else 1.0)


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
