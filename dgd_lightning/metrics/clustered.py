"""Bootstrap intervals over contexts: what is measured within one context depends on each other, contexts do not."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 9_999
CONFIDENCE = 0.95
BATCH = 256  # resamples held in memory at once; the draws, and so the results, do not depend on it
NAN = float("nan")


class Difference(NamedTuple):
    """An estimate with its 95% confidence interval; the bounds are NaN where there is none."""

    value: float
    low: float = NAN
    high: float = NAN

    @property
    def bounded(self) -> bool:
        """Whether there is an interval."""
        return self.low == self.low

    def text(self, form: str) -> str:
        """``+0.16 [-0.01, +0.31]`` or ``+12% [+8, +16]``; no brackets where there is no interval, a dash for NaN."""
        bounds = f" [{form.format(self.low)}, {form.format(self.high)}]" if self.bounded else ""
        return shown(self.value, form) + bounds.replace("%", "")


def shown(value: float, form: str) -> str:
    """A number for people; a dash for NaN: there was nothing to measure."""
    return form.format(value) if value == value else "–"


def counted(number: int, noun: str) -> str:
    """``1 context``, ``2,000 contexts``."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def resampled(
    columns: Sequence[np.ndarray] | np.ndarray, statistic: Callable[..., np.ndarray], *, seed: int = 0
) -> Difference:
    """A statistic of contexts with its percentile bootstrap interval at 95% (scipy.stats.bootstrap).

    A single context has none. ``columns``: [C] numbers of each context, drawn together; ``statistic``: of such columns,
    takes ``axis``.
    """
    value = float(statistic(*columns))
    if len(columns[0]) < 2:
        return Difference(value)
    from scipy.stats import bootstrap  # a second of imports, which a mistake in a command's options need not wait for

    found = bootstrap(
        tuple(columns),
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


def clustered_mean(
    sums: Sequence[float] | np.ndarray, counts: Sequence[int] | np.ndarray, *, seed: int = 0
) -> Difference:
    """Mean of all tokens pooled, with an interval that resamples contexts as wholes.

    There is no interval where fewer than two contexts have a token, or where a sum is infinite. ``sums`` and ``counts``
    are [C], of each context's tokens; contexts without one are left out.
    """
    table = np.array([(s, n) for s, n in zip(sums, counts, strict=True) if n], dtype=float).reshape(-1, 2)  # [C, 2]
    if not len(table):
        return Difference(NAN)
    value = float(table[:, 0].sum() / table[:, 1].sum())
    if not np.isfinite(table).all():
        return Difference(value)
    if len(table) > 1 and np.ptp(table[:, 0] / table[:, 1]) == 0:  # all contexts alike: scipy would warn
        return Difference(value, value, value)
    return resampled(table.T, lambda total, number, axis=-1: total.sum(axis) / number.sum(axis), seed=seed)
