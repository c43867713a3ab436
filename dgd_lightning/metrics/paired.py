"""Paired comparison of two arms in τ, with a bootstrap interval over contexts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 9_999
CONFIDENCE = 0.95
BATCH = 256  # resamples held in memory at once; the draws, and so the results, do not depend on it


class Verified(NamedTuple):
    """Verifications of one context's responses under one arm, pooled."""

    tokens: int  # committed by verifications
    verifications: int

    def plus(self, lengths: Sequence[int]) -> Verified:
        """With one more response's acceptance lengths."""
        return Verified(self.tokens + sum(lengths), self.verifications + len(lengths))

    @property
    def tau(self) -> float:
        """Tokens per verification; NaN where there was none."""
        return self.tokens / self.verifications if self.verifications else float("nan")


class Difference(NamedTuple):
    """An estimate with its confidence interval; the interval is NaN where fewer than two contexts are compared."""

    value: float
    low: float
    high: float


class TauGain(NamedTuple):
    """τ of an arm against another one over the same contexts."""

    base: float  # micro, pooled over the contexts
    tau: float
    difference: Difference  # tau − base
    ratio: Difference  # tau / base − 1
    median: Difference  # median over contexts of their own ratio − 1
    worst: float  # smallest ratio − 1 of a context
    contexts: int


def tau_gain(pairs: Sequence[tuple[Verified, Verified]], *, seed: int = 0) -> TauGain:
    """Compare τ context by context; contexts are resampled as wholes, since their responses depend on each other.

    Intervals are percentile bootstrap at 95% (scipy.stats.bootstrap) of the pooled statistics.

    Args:
        pairs: (base, other) of each context; contexts without a verification in either are left out.
        seed: of the resampling.
    """
    kept = [pair for pair in pairs if pair[0].verifications and pair[1].verifications]
    sums = np.array([[*a, *b] for a, b in kept], dtype=float).reshape(-1, 4)  # [C, 4]

    def pooled(base: np.ndarray, tau: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return tau - base, tau / base - 1

    def difference(a: np.ndarray, m: np.ndarray, b: np.ndarray, n: np.ndarray, axis: int = -1) -> np.ndarray:
        return pooled(a.sum(axis) / m.sum(axis), b.sum(axis) / n.sum(axis))[0]

    def ratio(a: np.ndarray, m: np.ndarray, b: np.ndarray, n: np.ndarray, axis: int = -1) -> np.ndarray:
        return pooled(a.sum(axis) / m.sum(axis), b.sum(axis) / n.sum(axis))[1]

    def median(a: np.ndarray, m: np.ndarray, b: np.ndarray, n: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.median((b / n) / (a / m) - 1, axis=axis)

    columns = tuple(sums.T)
    if not len(kept):
        nothing = Difference(float("nan"), float("nan"), float("nan"))
        return TauGain(float("nan"), float("nan"), nothing, nothing, nothing, float("nan"), 0)

    from scipy.stats import bootstrap  # a second of imports, which a mistake in a command's options need not wait for

    def interval(statistic: object) -> Difference:
        value = float(statistic(*columns))  # type: ignore[operator]
        if len(kept) < 2:
            return Difference(value, float("nan"), float("nan"))
        found = bootstrap(
            columns,
            statistic,
            paired=True,
            vectorized=True,
            n_resamples=RESAMPLES,
            batch=BATCH,
            confidence_level=CONFIDENCE,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
        return Difference(value, float(found.low), float(found.high))

    own = (sums[:, 2] / sums[:, 3]) / (sums[:, 0] / sums[:, 1]) - 1
    total = sums.sum(0)
    return TauGain(
        total[0] / total[1],
        total[2] / total[3],
        interval(difference),
        interval(ratio),
        interval(median),
        float(own.min()),
        len(kept),
    )
