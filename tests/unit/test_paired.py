"""Paired τ: point estimates by hand, intervals against a bootstrap written out as a loop."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from dgd_lightning.metrics import clustered
from dgd_lightning.metrics.clustered import CONFIDENCE, RESAMPLES, Difference
from dgd_lightning.metrics.paired import Verified, tau_gain

# Two bootstraps with other draws differ in an end by √2 standard errors of a 2.5% quantile over 9,999 draws:
# √2 · √(0.025 · 0.975 / 9999) / φ(1.96) = 0.038 standard deviations, 1% of the interval's width of 3.92. Four of them.
# (A median's draws are a few values of single contexts, so its ends agree more closely still.)
DRAWS = 0.04
Pairs = list[tuple[Verified, Verified]]
BY_HAND = [(Verified(8, 4), Verified(9, 3)), (Verified(30, 10), Verified(30, 12)), (Verified(4, 4), Verified(6, 4))]


def random_pairs(number: int) -> Pairs:
    """Contexts that differ much from one another and gain about a tenth each."""
    rng = np.random.default_rng(1)
    pairs = []
    for _ in range(number):
        verifications, ease = rng.integers(5, 60, 2), rng.uniform(1.5, 6.0)
        gain = rng.normal(1.1, 0.1)
        base, other = (round(count * tau) for count, tau in zip(verifications, (ease, ease * gain), strict=True))
        pairs.append((Verified(base, int(verifications[0])), Verified(other, int(verifications[1]))))
    return pairs


def pooled(side: list[Verified]) -> float:
    return sum(one.tokens for one in side) / sum(one.verifications for one in side)


def difference(base: list[Verified], other: list[Verified]) -> float:
    return pooled(other) - pooled(base)


def ratio(base: list[Verified], other: list[Verified]) -> float:
    return pooled(other) / pooled(base) - 1


def median(base: list[Verified], other: list[Verified]) -> float:
    return float(np.median([two.tau / one.tau - 1 for one, two in zip(base, other, strict=True)]))


STATISTICS: dict[str, Callable[[list[Verified], list[Verified]], float]] = {
    "difference": difference,
    "ratio": ratio,
    "median": median,
}


def naive_interval(pairs: Pairs, name: str, *, paired: bool = True) -> tuple[float, float]:
    """Draws contexts with replacement, one after another, and takes the draws' own quantiles."""
    rng, values = np.random.default_rng(12_345), []
    for _ in range(RESAMPLES):
        first = rng.integers(0, len(pairs), len(pairs))
        second = first if paired else rng.integers(0, len(pairs), len(pairs))
        values.append(STATISTICS[name]([pairs[i][0] for i in first], [pairs[i][1] for i in second]))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def test_estimates_by_hand() -> None:
    gain = tau_gain(BY_HAND)
    assert gain.base == pytest.approx(42 / 18)
    assert gain.tau == pytest.approx(45 / 19)
    assert gain.difference.value == pytest.approx(45 / 19 - 42 / 18)
    assert gain.ratio.value == pytest.approx((45 / 19) / (42 / 18) - 1)
    assert gain.median.value == pytest.approx(0.5)  # of 3 / 2, 2.5 / 3 and 1.5 / 1
    assert gain.worst == pytest.approx(2.5 / 3 - 1)
    assert gain.contexts == 3


@pytest.mark.parametrize("name", STATISTICS)
def test_interval_equals_the_loop(name: str) -> None:
    pairs = random_pairs(41)
    found: Difference = getattr(tau_gain(pairs), name)
    low, high = naive_interval(pairs, name)
    assert low < found.value < high
    assert found.value == pytest.approx(STATISTICS[name](*map(list, zip(*pairs, strict=True))))
    assert abs(found.low - low) <= DRAWS * (high - low)
    assert abs(found.high - high) <= DRAWS * (high - low)


def test_contexts_are_resampled_in_pairs() -> None:
    """The twin: were the arms drawn apart, the test above would see it."""
    pairs = random_pairs(41)
    found = tau_gain(pairs).difference
    low, high = naive_interval(pairs, "difference", paired=False)
    assert high - low > 2 * (found.high - found.low)


def test_contexts_without_a_verification_are_left_out() -> None:
    nothing = Verified(0, 0)
    assert tau_gain([(nothing, Verified(3, 1)), *BY_HAND, (Verified(3, 1), nothing)]) == tau_gain(BY_HAND)


def test_one_context_has_no_interval() -> None:
    gain = tau_gain(BY_HAND[:1])
    assert (gain.difference.value, gain.ratio.value, gain.median.value) == pytest.approx((1.0, 0.5, 0.5))
    for found in (gain.difference, gain.ratio, gain.median):
        assert math.isnan(found.low)
        assert math.isnan(found.high)
    assert gain.worst == pytest.approx(0.5)
    assert gain.contexts == 1


@pytest.mark.parametrize("pairs", [[], [(Verified(0, 0), Verified(0, 0))]])
def test_nothing_is_nan(pairs: Pairs) -> None:
    gain = tau_gain(pairs)
    numbers = [gain.base, gain.tau, gain.worst, *gain.difference, *gain.ratio, *gain.median]
    assert all(map(math.isnan, numbers))
    assert gain.contexts == 0


def test_an_arm_against_itself_gains_nothing() -> None:
    same = [(base, base) for base, _ in random_pairs(41)]
    gain = tau_gain(same)
    assert gain.difference == gain.ratio == gain.median == Difference(0.0, 0.0, 0.0)
    assert gain.worst == 0.0
    assert gain.base == gain.tau > 1


def test_the_seed_decides_the_draws() -> None:
    pairs = random_pairs(11)
    assert tau_gain(pairs, seed=3) == tau_gain(pairs, seed=3)
    assert tau_gain(pairs, seed=3).ratio != tau_gain(pairs, seed=4).ratio


@pytest.mark.parametrize("batch", [1, 1_000, RESAMPLES])
def test_the_batch_decides_nothing(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    pairs = random_pairs(11)
    found = tau_gain(pairs, seed=3)
    monkeypatch.setattr(clustered, "BATCH", batch)
    assert tau_gain(pairs, seed=3) == found


def test_memory_is_that_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 500 contexts; the twin holds every resample at once."""
    pairs, peaks = random_pairs(500), []
    for batch in (clustered.BATCH, RESAMPLES):
        monkeypatch.setattr(clustered, "BATCH", batch)
        tracemalloc.start()
        tau_gain(pairs)
        peaks.append(tracemalloc.get_traced_memory()[1] / 2**20)
        tracemalloc.stop()
    assert peaks[0] < 20 < 100 < peaks[1]  # MiB; an index per resample and context alone makes 38 at once


def test_lengths_are_added() -> None:
    assert Verified(5, 2).plus([4, 1, 1]) == Verified(11, 5)
    assert Verified(5, 2).plus([]) == Verified(5, 2)
    assert math.isnan(Verified(0, 0).tau)
