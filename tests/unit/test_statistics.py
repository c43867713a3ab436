"""Paired statistics: exact p-values against enumeration, intervals and power against simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binomtest, norm
from statsmodels.stats.contingency_tables import mcnemar

from dgd_lightning.scoring.statistics import (
    Pair,
    compare,
    detectable,
    holm,
    mcnemar_p,
    rate,
    sign_flip_p,
)

ROUNDING = 1e-12  # sums of products of halves, in another order


def enumerated_p(sums: list[float]) -> float:
    """All assignments of signs, one by one."""
    seen = abs(sum(sums))
    signs = list(itertools.product((-1, 1), repeat=len(sums)))
    far = [abs(sum(s * d for s, d in zip(row, sums, strict=True))) >= seen - 1e-9 for row in signs]
    return sum(far) / len(far)


@pytest.mark.parametrize(
    "sums",
    [[1, 1, 1, -1], [3, -1, 2, 0, 0, 1], [2, 2, 2, 2, 2], [1], [-4, 1, 1, 1, 1], [5, -5], [1, 2, 3, 4, -1, -2, 6]],
)
def test_sign_flip_p_counts_all_signs(sums: list[float]) -> None:
    assert sign_flip_p(sums) == pytest.approx(enumerated_p(sums), abs=ROUNDING)


def test_sign_flip_p_draws_where_it_cannot_count() -> None:
    sums = [0.5, -0.25, 1.5, 0.75, 0.3, -0.1, 0.8, 0.2, 0.9]
    exact = enumerated_p(sums)
    draws = 20_000
    error = math.sqrt(exact * (1 - exact) / draws)
    assert sign_flip_p(sums, draws=draws) == pytest.approx(exact, abs=4 * error + 1 / draws)


def test_without_differences_nothing_is_found() -> None:
    assert sign_flip_p([]) == sign_flip_p([0, 0, 0]) == mcnemar_p(0, 0) == 1.0
    same = compare([Pair("a", 1, 1), Pair("b", 0, 0)])
    assert same.difference.value == 0
    assert math.isnan(same.difference.low)
    assert math.isnan(same.detectable)
    assert math.isnan(compare([]).base)


def test_one_task_per_context_is_mcnemar() -> None:
    assert sign_flip_p([1] * 9 + [-1] * 3 + [0] * 20) == pytest.approx(mcnemar_p(9, 3), abs=ROUNDING)
    table = [[10, 3], [9, 10]]
    assert mcnemar_p(9, 3) == pytest.approx(mcnemar(table, exact=True).pvalue, abs=ROUNDING)


def test_compare_by_hand() -> None:
    pairs = [Pair("a", 0, 1), Pair("a", 0, 1), Pair("b", 1, 0), Pair("b", 1, 1), Pair("c", 0, 1)]
    result = compare(pairs)
    assert (result.fixed, result.broken, result.tasks, result.contexts) == (3, 1, 5, 3)
    assert result.base == pytest.approx(0.4)
    assert result.other == pytest.approx(0.8)
    assert result.difference.value == pytest.approx(0.4)
    assert result.p == pytest.approx(enumerated_p([2, -1, 1]))
    assert result.mcnemar == pytest.approx(binomtest(3, 4).pvalue)


def test_contexts_not_tasks_are_exchanged() -> None:
    """Ten tasks of two contexts that all rose are two coins, not ten."""
    pairs = [Pair(context, 0, 1) for context in "ab" for _ in range(5)]
    result = compare(pairs)
    assert result.p == 0.5
    assert result.mcnemar == pytest.approx(2 / 2**10)


def test_several_seeds_of_a_task_stand_together() -> None:
    once = compare([Pair(str(number), 0, number % 3 == 0) for number in range(30)])
    thrice = compare([Pair(str(number), 0, number % 3 == 0) for number in range(30) for _ in range(3)])
    assert thrice.difference == once.difference
    assert thrice.tasks == 90
    assert thrice.contexts == 30
    assert thrice.p == pytest.approx(once.p)
    assert thrice.detectable == pytest.approx(once.detectable)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # 3·0.01, max(2·0.03, 1·0.04), 2·0.03
    assert holm([]) == []


def test_rate_resamples_contexts() -> None:
    """Equal answers within a context widen the interval as much as fewer contexts do."""
    alone = rate([(str(number), float(number % 2)) for number in range(20)])
    five = rate([(str(number), float(number % 2)) for number in range(20) for _ in range(5)])
    assert five.value == alone.value == 0.5
    assert five.high - five.low == pytest.approx(alone.high - alone.low)


def arms(rng: np.random.Generator, effect: float, contexts: int = 500, tasks: int = 1899) -> list[Pair]:
    """Two arms as on CL-bench: contexts differ in difficulty, a fifth of tasks is solved, most tasks agree."""
    context = np.arange(tasks) % contexts
    ease = rng.beta(0.8, 3.2, contexts)[context]  # mean 0.2
    base = rng.random(tasks) < ease
    other = np.where(rng.random(tasks) < 0.7, base, rng.random(tasks) < ease)  # 0.3 of the tasks are drawn anew
    other |= rng.random(tasks) < effect / 0.8  # of the four fifths not solved, so that +effect of all rise
    return [Pair(str(c), float(b), float(o)) for c, b, o in zip(context, base, other, strict=True)]


def test_rate_of_equal_tasks_still_has_an_interval() -> None:
    """No task of ten contexts solved: the rule of three in its exact two-sided form, however many tasks they have."""
    none = rate([(str(number), 0.0) for number in range(10) for _ in range(4)])
    assert none.value == none.low == 0.0
    assert none.high == pytest.approx(1 - 0.025 ** (1 / 10))
    every = rate([(str(number), 1.0) for number in range(10)])
    assert (every.value, every.high) == (1.0, 1.0)
    assert every.low == pytest.approx(0.025 ** (1 / 10))


def test_contexts_alike_give_no_interval() -> None:
    """Half of the two tasks of every context: resampled contexts would be sure of it to the last digit."""
    half = rate([(str(number), score) for number in range(10) for score in (0.0, 1.0)])
    assert half.value == 0.5
    assert np.isnan([half.low, half.high]).all()
    risen = compare([Pair(str(number), 0.0, score) for number in range(10) for score in (0.0, 1.0)]).difference
    assert risen.value == 0.5
    assert np.isnan([risen.low, risen.high]).all()
    assert np.isnan(compare([Pair(str(n), 0.0, score) for n in range(10) for score in (0.0, 1.0)]).detectable)


def differences(rng: np.random.Generator, effect: float, **size: int) -> list[list[float]]:
    """By context, of its tasks."""
    contexts: dict[str, list[float]] = {}
    for pair in arms(rng, effect, **size):
        contexts.setdefault(pair.context, []).append(pair.other - pair.base)
    return list(contexts.values())


def found(rng: np.random.Generator, effect: float, **size: int) -> bool:
    return sign_flip_p([sum(tasks) for tasks in differences(rng, effect, **size)]) <= 0.05


def test_two_equal_arms_seldom_differ() -> None:
    """A/A: 1,000 simulated runs, at most 5% false positives."""
    rng = np.random.default_rng(0)
    assert sum(found(rng, 0.0, contexts=40, tasks=152) for _ in range(1000)) <= 50


def test_three_points_are_found_at_the_size_of_clbench() -> None:
    """A planted +3 points over 1,899 tasks is found in at least 80% of simulated runs."""
    rng = np.random.default_rng(1)
    runs = 100
    assert sum(found(rng, 0.03) for _ in range(runs)) >= 0.8 * runs


def test_power_is_what_the_detectable_difference_says() -> None:
    """Power at an effect e is Φ((z₀.₉₇₅ + z₀.₈)·e / detectable − z₀.₉₇₅): simulated runs find it as often.

    Sums of whole numbers come in steps of two, and the exact test counts the whole step that it stands on: half of it,
    one task, is taken off.
    """
    rng = np.random.default_rng(2)
    effect, pilots, runs = 0.02, 100, 400
    results = [differences(rng, effect) for _ in range(pilots)]
    both = norm.ppf(0.975) + norm.ppf(0.8)
    smallest = np.mean([detectable([sum(c) for c in one], [len(c) for c in one]) for one in results])
    gains = [np.mean([task for c in one for task in c]) for one in results]
    deviation = smallest / both * 1899  # of the sum over tasks
    expected = norm.cdf(both * np.mean(gains) / smallest - norm.ppf(0.975) - 1 / deviation)
    power = sum(found(rng, effect) for _ in range(runs)) / runs
    # of the simulation, and of the pilots' mean: a standard deviation of a gain is one of the normal distribution's
    # argument
    error = math.sqrt(expected * (1 - expected) / runs + (norm.pdf(norm.ppf(expected)) ** 2) / pilots)
    assert abs(power - expected) < 3 * error


def test_detectable_needs_variation() -> None:
    assert math.isnan(detectable([1.0], [3]))
    assert detectable([1, -1], [1, 1]) == pytest.approx((1.959964 + 0.841621) * math.sqrt(2 * 2) / 2, rel=1e-5)
