"""Paired comparison of two arms in τ, with bootstrap intervals over contexts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
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

    Args:
        pairs: (base, other) of each context; contexts without a verification in either are left out.
        seed: of the resampling.
    """
    kept = [(*base, *other) for base, other in pairs if base.verifications and other.verifications]
    if not kept:
        return TauGain(NAN, NAN, Difference(NAN), Difference(NAN), Difference(NAN), NAN, 0)
    columns = np.array(kept, dtype=float).T  # [4, C]: tokens and verifications of the base, then of the other

    def taus(*sums: np.ndarray, axis: int = -1) -> tuple[np.ndarray, np.ndarray]:
        a, m, b, n = (one.sum(axis) for one in sums)
        return a / m, b / n

    def difference(*sums: np.ndarray, axis: int = -1) -> np.ndarray:
        base, tau = taus(*sums, axis=axis)
        return tau - base

    def ratio(*sums: np.ndarray, axis: int = -1) -> np.ndarray:
        base, tau = taus(*sums, axis=axis)
        return tau / base - 1

    def own(a: np.ndarray, m: np.ndarray, b: np.ndarray, n: np.ndarray) -> np.ndarray:
        return (b / n) / (a / m) - 1

    def median(*sums: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.median(own(*sums), axis=axis)

    interval = partial(resampled, columns, seed=seed)
    base, tau = map(float, taus(*columns))
    worst = float(own(*columns).min())
    return TauGain(base, tau, interval(difference), interval(ratio), interval(median), worst, len(kept))
