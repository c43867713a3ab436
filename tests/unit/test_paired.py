"""Paired τ: point estimates by hand, intervals against a test that exchanges the arms of contexts one by one."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy as np
import pytest

from dgd_lightning.metrics import clustered
from dgd_lightning.metrics.clustered import Difference
from dgd_lightning.metrics.paired import Verified, tau_gain

Pairs = list[tuple[Verified, Verified]]
BY_HAND = [(Verified(8, 4), Verified(9, 3)), (Verified(30, 10), Verified(30, 12)), (Verified(4, 4), Verified(6, 4))]


def random_pairs(number: int, seed: int = 1, spread: float = 0.1) -> Pairs:
    """Contexts that differ much from one another and gain about a tenth each."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(number):
        verifications, ease = rng.integers(5, 60, 2), rng.uniform(1.5, 6.0)
        gain = rng.normal(1.1, spread)
        base, other = (round(count * tau) for count, tau in zip(verifications, (ease, ease * gain), strict=True))
        pairs.append((Verified(base, int(verifications[0])), Verified(other, int(verifications[1]))))
    return pairs


def test_estimates_by_hand() -> None:
    gain = tau_gain(BY_HAND)
    assert gain.base == pytest.approx(42 / 18)
    assert gain.tau == pytest.approx(45 / 19)
    assert gain.difference.value == pytest.approx(45 / 19 - 42 / 18)
    assert gain.ratio.value == pytest.approx((45 / 19) / (42 / 18) - 1)
    assert gain.median.value == pytest.approx(0.5)  # of 3 / 2, 2.5 / 3 and 1.5 / 1
    assert gain.worst == pytest.approx(2.5 / 3 - 1)
    assert gain.contexts == 3


def exchanged_p(pairs: Pairs, *, gain: float = 0.0, ratio: float = 1.0) -> float:
    """Of the hypothesis that the other arm has τ·ratio + gain: takes it off, then exchanges the arms in every way.

    What a context adds to the difference is what it has over τ of both arms together, which no exchange changes.
    """
    taken = [(a, m, b / ratio - gain * n, n) for (a, m), (b, n) in pairs]
    common = sum(a + b for a, _, b, _ in taken) / sum(m + n for _, m, _, n in taken)
    own = [(b - common * n) - (a - common * m) for a, m, b, n in taken]
    sums = [
        abs(sum(s * x for s, x in zip(row, own, strict=True))) for row in itertools.product((-1, 1), repeat=len(own))
    ]
    return sum(one >= abs(sum(own)) - 1e-9 for one in sums) / len(sums)


def test_intervals_are_what_exchanging_arms_does_not_reject(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustered, "SKEW", 0.0)
    pairs = random_pairs(8)
    gain = tau_gain(pairs)
    for end, outwards in ((gain.difference.low, -1), (gain.difference.high, 1)):
        assert exchanged_p(pairs, gain=end - outwards * 1e-6) > 0.05 >= exchanged_p(pairs, gain=end + outwards * 1e-6)
    for end, outwards in ((gain.ratio.low, -1), (gain.ratio.high, 1)):
        near, far = (1 + end - outwards * 1e-6, 1 + end + outwards * 1e-6)
        assert exchanged_p(pairs, ratio=near) > 0.05 >= exchanged_p(pairs, ratio=far)


@pytest.mark.parametrize("contexts", [6, 9, 41])
def test_difference_and_ratio_agree_about_no_gain(contexts: int) -> None:
    for seed in range(20):
        gain = tau_gain(random_pairs(contexts, seed, spread=0.3))
        assert (gain.difference.low > 0) == (gain.ratio.low > 0)
        assert (gain.difference.high < 0) == (gain.ratio.high < 0)
        assert gain.difference.low < gain.difference.value < gain.difference.high
        assert gain.median.low <= gain.median.value <= gain.median.high


def test_the_median_s_interval_is_exact() -> None:
    """Of 11 contexts the second smallest and largest: the binomial has 2·12/2¹¹ outside of them."""
    pairs = random_pairs(11)
    own = sorted(two.tau / one.tau - 1 for one, two in pairs)
    assert tau_gain(pairs).median == pytest.approx((own[5], own[1], own[9]))


def test_contexts_are_paired() -> None:
    """Were the arms compared apart, contexts that differ much from each other would hide the gain."""
    pairs = random_pairs(41)
    others = [other for _, other in pairs]
    apart = tau_gain(list(zip([base for base, _ in pairs], others[7:] + others[:7], strict=True))).difference
    found = tau_gain(pairs).difference
    assert apart.high - apart.low > 2 * (found.high - found.low)


def test_contexts_without_a_verification_are_left_out() -> None:
    nothing = Verified(0, 0)
    pairs = random_pairs(7)
    assert tau_gain([(nothing, Verified(3, 1)), *pairs, (Verified(3, 1), nothing)]) == tau_gain(pairs)


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
    assert gain.difference.value == gain.ratio.value == gain.worst == 0.0
    assert not gain.difference.bounded  # no context differs
    assert gain.median == Difference(0.0, 0.0, 0.0)
    assert gain.base == gain.tau > 1


def test_a_large_run_takes_little_memory() -> None:
    """Of 500 contexts with as many verifications under both arms, whose tokens are whole numbers of any size."""
    pairs = [(Verified(a, m), Verified(2 * b, m)) for (a, m), (b, _) in random_pairs(500)]
    tracemalloc.start()
    tau_gain([(Verified(1000 * a, m), Verified(1000 * b, n)) for (a, m), (b, n) in pairs])
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    assert peak < 60  # MiB; all signs at once make 40 for each array that is made of them


def test_lengths_are_added() -> None:
    assert Verified(5, 2).plus([4, 1, 1]) == Verified(11, 5)
    assert Verified(5, 2).plus([]) == Verified(5, 2)
    assert math.isnan(Verified(0, 0).tau)
