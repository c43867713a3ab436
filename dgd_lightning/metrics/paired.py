"""Paired comparison of two arms in τ, with intervals over contexts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dgd_lightning.metrics.clustered import ALPHA, NAN, Difference, sign_flip


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


def tau_gain(pairs: Sequence[tuple[Verified, Verified]]) -> TauGain:
    """Compare τ context by context: contexts are exchanged between arms as wholes, as their responses hang together.

    With tokens a of m verifications under the base and b of n under the other arm, and sums A, M, B, N of all contexts,
    τ of both arms together is t = (A + B)/(M + N). A context's share in the difference, (b − t·n) − (a − t·m), changes
    its sign when the arms are exchanged there: these are what the sign-flip test adds up, and they sum to
    2MN/(M + N)·(B/N − A/M). Under a true difference δ, b − δ·n takes the place of b; under a ratio r, b/r does. Both
    are linear in δ or r.

    ``pairs``: (base, other) of each context; contexts without a verification in either are left out.
    """
    kept = [(*base, *other) for base, other in pairs if base.verifications and other.verifications]
    if not kept:
        return TauGain(NAN, NAN, Difference(NAN), Difference(NAN), Difference(NAN), NAN, 0)
    a, m, b, n = np.array(kept, dtype=float).T  # [C] each
    base, other, size = a.sum() / m.sum(), b.sum() / n.sum(), m.sum() + n.sum()
    shares = b - a - (a.sum() + b.sum()) / size * (n - m)
    difference, _ = sign_flip(shares, (n * m.sum() + m * n.sum()) / size)
    ratio, _ = sign_flip(b - b.sum() / size * (n - m), a + a.sum() / size * (n - m), null=1.0)
    gains = (b / n) / (a / m) - 1
    return TauGain(
        float(base),
        float(other),
        difference,
        Difference(*(end - 1 for end in ratio)),
        _median(gains),
        float(gains.min()),
        len(kept),
    )


def _median(values: np.ndarray) -> Difference:
    """With the interval of the sign test: the order statistics that are outside of it in 5% of samples at most."""
    value = float(np.median(values))
    from scipy.stats import binom  # a second of imports, for those who compare

    rank = int(binom.ppf(ALPHA / 2, len(values), 0.5))
    ordered = np.sort(values)
    return Difference(value, float(ordered[rank - 1]), float(ordered[-rank])) if rank else Difference(value)
