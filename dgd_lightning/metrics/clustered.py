"""Tests and 95% intervals over contexts: what is measured within one context depends on each other, contexts do not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

ALPHA = 0.05  # two-sided
NAN = float("nan")
FEWEST_CONTEXTS = 6  # 2/2⁵ > ALPHA: the signs of five contexts are alike too often for any test or interval
FEWEST_CHANGED = 3  # contexts that are not 0, below which intervals cover less than they say (benchmarks/claims.py)
ENUMERATED = 14  # contexts, 2¹³ pairs of opposite signs
DRAWS = 9_999  # of signs, for more contexts
LARGEST = 50_000  # sum of whole numbers whose signs are counted, not drawn
BATCH = 1_024  # draws held in memory at once; results do not depend on it
# (2z² + 1)/6 = 1.45 at z = 1.96 (Johnson 1978), and more, since few contexts show less skewness than there is.
SKEW = 2.0


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


def exact_p(differences: np.ndarray) -> np.ndarray:
    """Two-sided p of no difference for many runs at once, counted over all signs of their contexts.

    Either arm could have been the other, context by context: the sign of every context's sum of differences is a
    coin's. The sum of ±d has the characteristic function ∏ cos(d·t), whose inverse Fourier transform says how often
    each sum occurs. With one task per context that is McNemar's exact test.

    Args:
        differences: [R, C] whole numbers: sums of C contexts in each of R runs.

    Returns:
        [R]; 1 where nothing differs.
    """
    whole = np.asarray(differences).astype(np.int64)
    sizes, seen = np.abs(whole), np.abs(whole.sum(1))
    if not (unit := np.gcd.reduce(sizes, axis=None)):
        return np.ones(len(sizes))
    sizes, seen = sizes // unit, seen // unit
    runs, most = len(sizes), int(sizes.max()) + 1
    number = np.bincount((np.arange(runs)[:, None] * most + sizes).ravel(), minlength=runs * most).reshape(runs, most)
    values = 1 + np.flatnonzero(number[:, 1:].any(0))  # [V]
    number = number[:, values].astype(float)  # [R, V] of contexts
    length = 2 << int(sizes.sum(1).max()).bit_length()  # room for sums of either sign
    cosines = np.cos(np.outer(values, 2 * np.pi / length * np.arange(length // 2 + 1)))
    signs = 1 - 2 * (number @ (cosines < 0) % 2)
    products = np.exp(number @ np.log(np.maximum(np.abs(cosines), 1e-300)))
    shares = np.fft.irfft(signs * products, n=length, axis=1)[:, : length // 2]  # of the sums 0, 1, 2, …
    beyond = np.cumsum(shares[:, ::-1], axis=1)[:, ::-1]
    tail = 2 * np.take_along_axis(beyond, seen[:, None], axis=1)[:, 0]
    alike = 2.0 ** (1 - number.sum(1))  # the smallest p there is, which rounding must not undercut
    return np.where(seen == 0, 1.0, np.clip(tail, alike, 1.0))


def sign_flip(
    differences: Sequence[float] | np.ndarray, weights: Sequence[float] | np.ndarray, *, null: float = 0.0
) -> tuple[Difference, float]:
    """The pooled value Σ differences / Σ weights with its interval, and p of ``null``, the value of no difference.

    The interval is the inversion of the test: ``null`` lies in it if and only if p > 0.05. p of whole numbers, as of
    solved tasks, is exact. Of other numbers it is so up to `ENUMERATED` contexts and drawn beyond, with the sample
    itself among the draws, so that the test keeps its level (Phipson & Smyth 2010).

    Args:
        differences: [C] sums of the contexts.
        weights: [C] what a value of 1 would be in each of them, such as its number of tasks.
    """
    d, w = np.asarray(differences, dtype=float), np.asarray(weights, dtype=float)
    if not len(d):
        return Difference(NAN), 1.0
    x = d - null * w
    seen, reach = abs(float(x.sum())), float(np.abs(x).sum())
    step = 0.0
    if reach <= LARGEST and (x == np.round(x)).all():
        p = float(exact_p(x[None])[0])
        # Sums of whole numbers come in steps, and this test counts the whole step that it stands on: it is also the
        # test with half a step of continuity correction, which is what other values than ``null`` are tested by.
        step = float(np.gcd.reduce(np.abs(x).astype(np.int64)))
    else:
        sums = np.concatenate([x.sum() - 2 * (flipped @ x) for flipped in _flips(len(x))])
        p = float((np.abs(sums) >= seen - 1e-9 * reach).mean())
    found = _interval(d, w, step)
    if not found.bounded:
        return found, p
    value, low, high = found
    if p > ALPHA:  # where draws or the correction for skewness say otherwise of this one value, p is right
        return Difference(value, min(low, null), max(high, null)), p
    if value > null:
        return Difference(value, max(low, float(np.nextafter(null, np.inf))), high), p
    return Difference(value, low, min(high, float(np.nextafter(null, -np.inf)))), p


def clustered_mean(sums: Sequence[float] | np.ndarray, counts: Sequence[int] | np.ndarray) -> Difference:
    """Mean of all tokens pooled, with the interval of `sign_flip`: contexts deviate from the mean to either side alike.

    There is no interval where a sum is infinite. ``sums`` and ``counts`` are [C], of each context's tokens; contexts
    without one are left out.
    """
    table = np.array([(s, n) for s, n in zip(sums, counts, strict=True) if n], dtype=float).reshape(-1, 2)  # [C, 2]
    if not len(table):
        return Difference(NAN)
    d, w = table.T
    if not np.isfinite(d).all():
        return Difference(float(d.sum() / w.sum()))
    return _interval(d, w)


def _interval(d: np.ndarray, w: np.ndarray, step: float = 0.0) -> Difference:
    """What more than 5% of the signs are at least as extreme for; no bounds where that is endless or a single point."""
    value = float(d.sum() / w.sum())
    lows, highs = _ends(d, w, step)
    place = int(ALPHA * len(lows) + 1e-9)  # from each end; so many signs together are rare enough
    low, high = float(np.partition(lows, place)[place]), float(np.partition(highs, -1 - place)[-1 - place])
    found = np.isfinite([low, high]).all() and np.count_nonzero(d) >= FEWEST_CHANGED and np.ptp(d / w) > 0
    return Difference(value, low, high) if found else Difference(value)


def _ends(d: np.ndarray, w: np.ndarray, step: float) -> tuple[np.ndarray, np.ndarray]:
    """For each assignment of signs the lowest and the highest difference for which it is as extreme as the data.

    To test a difference δ, the signs of d − δ·w are flipped. A set of flipped contexts gives a sum at least as far from
    0 as the data's just where δ lies between the pooled differences of this set and of all other contexts ("typical
    values", Hartigan 1969). So p falls to both sides of the estimate, and quantiles of these ends invert the test.

    ``step`` moves both ends outwards, by half of it in a set's sum. Where few contexts with large differences make the
    sum skewed, the test errs on their side; there the end is moved by SKEW·Σx³/Σx² of the contexts' residuals x, if
    that is more.
    """
    both, x = np.stack([d, w], axis=1), d - d.sum() / w.sum() * w
    skew = SKEW * float((x**3).sum() / max(float((x**2).sum()), 1e-300))
    down, up = max(step, -skew) / 2, max(step, skew) / 2  # of a half's sum
    lows, highs = [], []
    for flipped in _flips(len(d)):
        one = flipped @ both  # [B, 2]
        sides = np.stack([one, both.sum(0) - one], axis=1)  # [B, 2, 2]
        some = sides[..., 1] > 0
        weight = np.where(some, sides[..., 1], 1.0)
        lows.append(np.where(some, (sides[..., 0] - down) / weight, -np.inf).min(1))
        highs.append(np.where(some, (sides[..., 0] + up) / weight, np.inf).max(1))
    return np.concatenate(lows), np.concatenate(highs)


def _flips(contexts: int) -> Iterator[np.ndarray]:
    """All sets of contexts up to their complements, or the empty one and `DRAWS` random ones: [B, C] of 0 and 1."""
    if contexts <= ENUMERATED:
        yield (np.arange(2 ** (contexts - 1))[:, None] >> np.arange(contexts) & 1).astype(float)
        return
    yield np.zeros((1, contexts))
    for bits in np.split(_drawn(contexts), range(BATCH, DRAWS, BATCH)):
        yield np.unpackbits(bits, axis=1, count=contexts).astype(float)


@lru_cache(maxsize=8)
def _drawn(contexts: int) -> np.ndarray:
    """Random bits, packed: [DRAWS, contexts / 8]; the same in every call."""
    return np.random.default_rng(0).integers(0, 256, (DRAWS, -(-contexts // 8)), dtype=np.uint8)
