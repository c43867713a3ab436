"""A mean over tokens with a bootstrap interval over contexts, whose tokens depend on each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dgd_lightning.metrics.paired import BATCH, CONFIDENCE, RESAMPLES, Difference


def clustered_mean(sums: Sequence[float], counts: Sequence[int], *, seed: int = 0) -> Difference:
    """Mean of all tokens pooled; contexts are resampled as wholes.

    The interval is a percentile bootstrap at 95% (scipy.stats.bootstrap) of the pooled mean. It is NaN where fewer than
    two contexts have a token, or where a sum is infinite.

    Args:
        sums: of each context's tokens.
        counts: tokens of each context; contexts without one are left out.
        seed: of the resampling.
    """
    table = np.array([(s, n) for s, n in zip(sums, counts, strict=True) if n], dtype=float).reshape(-1, 2)  # [C, 2]
    if not len(table):
        return Difference(float("nan"), float("nan"), float("nan"))

    def mean(total: np.ndarray, number: np.ndarray, axis: int = -1) -> np.ndarray:
        return total.sum(axis) / number.sum(axis)

    value = float(mean(*table.T))
    if len(table) < 2 or not np.isfinite(table).all():
        return Difference(value, float("nan"), float("nan"))
    if np.ptp(table[:, 0] / table[:, 1]) == 0:  # all contexts alike: scipy would warn
        return Difference(value, value, value)
    from scipy.stats import bootstrap  # late, as in paired.py

    found = bootstrap(
        tuple(table.T),
        mean,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=BATCH,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Difference(value, float(found.low), float(found.high))
