"""Paired comparison of two arms in τ, with bootstrap intervals over contexts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dgd_lightning.metrics.clustered import NAN, Difference, resampled


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
        return self.tokens / self.verifications if self.verifications else NAN


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

    ``pairs``: (base, other) of each context; contexts without a verification in either are left out.
    """
    kept = [(*base, *other) for base, other in pairs if base.verifications and other.verifications]
    if not kept:
        return TauGain(NAN, NAN, Difference(NAN), Difference(NAN), Difference(NAN), NAN, 0)
    columns = np.array(kept, dtype=float).T  # [4, C]: tokens and verifications of the base, then of the other

    def pooled(tokens: np.ndarray, verifications: np.ndarray, axis: int = -1) -> np.ndarray:
        return tokens.sum(axis) / verifications.sum(axis)

    difference, ratio, median = (
        resampled(columns, statistic, seed=seed)
        for statistic in (
            lambda a, m, b, n, axis=-1: pooled(b, n, axis) - pooled(a, m, axis),
            lambda a, m, b, n, axis=-1: pooled(b, n, axis) / pooled(a, m, axis) - 1,
            lambda a, m, b, n, axis=-1: np.median((b / n) / (a / m) - 1, axis=axis),
        )
    )
    a, m, b, n = columns
    worst = float(((b / n) / (a / m) - 1).min())
    return TauGain(float(pooled(a, m)), float(pooled(b, n)), difference, ratio, median, worst, len(kept))
