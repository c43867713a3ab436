"""Paired statistics: p-values and intervals against enumeration, claims against simulated runs."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import beta, binomtest, t
from statsmodels.stats.contingency_tables import mcnemar

from dgd_lightning.metrics import clustered
from dgd_lightning.metrics.clustered import Difference, exact_p, sign_flip
from dgd_lightning.metrics.power import Findable, Simulated, noise, smallest_gains
from dgd_lightning.scoring.statistics import Pair, compare, findable, holm, mcnemar_p, rate

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from claims import Population, claim, coverage, differences, drawn, false_positives, rates, taus

ROUNDING = 1e-12  # sums of products of halves, in another order


def enumerated_p(sums: list[float]) -> float:
    """All assignments of signs, one by one."""
    seen = abs(sum(sums))
    signs = list(itertools.product((-1, 1), repeat=len(sums)))
    far = [abs(sum(s * d for s, d in zip(row, sums, strict=True))) >= seen - 1e-9 for row in signs]
    return sum(far) / len(far)


def p_of(sums: list[float]) -> float:
    return sign_flip(sums, [1] * len(sums))[1]


SUMS: list[list[float]] = [
    [1, 1, 1, -1], [3, -1, 2, 0, 0, 1], [2, 2, 2, 2, 2], [1], [-4, 1, 1, 1, 1], [5, -5], [1, 2, 3, 4, -1, -2, 6],
    [0.5, -0.25, 1.5, 0.75, 0.3, -0.1, 0.8, 0.2, 0.9], [0.1, 0.2, -0.3, 0.1, 0.2],
]  # fmt: skip


@pytest.mark.parametrize("sums", SUMS)
def test_sign_flip_p_counts_all_signs(sums: list[float]) -> None:
    assert p_of(sums) == pytest.approx(enumerated_p(sums), abs=ROUNDING)


def test_p_of_many_runs_at_once() -> None:
    """In one Fourier transform, with contexts that do not differ, and sizes with a common divisor."""
    runs = np.random.default_rng(0).integers(-4, 5, (30, 9))
    assert exact_p(runs) == pytest.approx([enumerated_p(run.tolist()) for run in runs], abs=ROUNDING)
    assert exact_p(6 * runs).tolist() == exact_p(runs).tolist()
    assert 2.0**-59 <= exact_p(np.array([[7] * 60 + [0] * 5]))[0] < 1e-15
    assert exact_p(np.zeros((2, 3), int)).tolist() == [1, 1]


def test_p_is_drawn_where_it_cannot_be_counted() -> None:
    """Of 16 contexts, by twice as many draws of signs as a loop over all of them makes."""
    sums = [0.5, -0.25, 1.5, 0.75, 0.3, -0.1, 0.8, 0.2, 0.9, -0.7, -0.6, 0.35, 0.15, -0.45, 0.05, 0.55]
    exact = enumerated_p(sums)
    error = math.sqrt(exact * (1 - exact) / clustered.DRAWS)
    assert p_of(sums) == pytest.approx(exact, abs=4 * error + 1 / clustered.DRAWS)
    whole = [round(20 * value) for value in sums]
    assert p_of(whole) == pytest.approx(enumerated_p(whole), abs=ROUNDING)


def scanned(sums: list[float], tasks: list[int], step: float) -> tuple[float, float]:
    """The differences that a test does not reject, one after another on a grid of 1/200."""
    kept = []
    signs = list(itertools.product((-1, 1), repeat=len(sums)))
    for number in range(-300, 301):
        shifted = [d - number / 200 * n for d, n in zip(sums, tasks, strict=True)]
        seen = abs(sum(shifted)) - step
        far = sum(abs(sum(s * d for s, d in zip(row, shifted, strict=True))) >= seen - 1e-9 for row in signs)
        kept += [number / 200] * (far / len(signs) > 0.05)
    return kept[0], kept[-1]


@pytest.mark.parametrize(
    ("sums", "tasks"),
    [([1, 2, -1, 3, 0, 1, -2, 2], [4, 3, 2, 5, 4, 1, 6, 2]), ([1, 1, 2, 1, 1, 1], [2, 3, 5, 1, 4, 2])],
)
def test_an_interval_is_what_the_test_does_not_reject(
    sums: list[float], tasks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With half a step of continuity correction, which for whole sums is the same test of no difference."""
    monkeypatch.setattr(clustered, "SKEW", 0.0)
    (value, low, high), p = sign_flip(sums, tasks)
    assert value == sum(sums) / sum(tasks)
    assert (low, high) == pytest.approx(scanned(sums, tasks, step=1.0), abs=0.0051)
    assert p == pytest.approx(enumerated_p(sums), abs=ROUNDING)


@pytest.mark.parametrize("contexts", [6, 7, 12, 14, 15, 40])
def test_interval_and_p_never_disagree(contexts: int) -> None:
    rng, decided = np.random.default_rng(contexts), set()
    for _ in range(60):
        tasks = rng.integers(1, 6, contexts)
        sums: np.ndarray = rng.binomial(tasks, 0.3) - rng.binomial(tasks, 0.1)
        if rng.random() < 0.3:
            sums = sums * rng.random()  # no whole numbers
        (_, low, high), p = sign_flip(sums, tasks)
        if low == low:
            assert (low <= 0 <= high) == (p > 0.05)
            decided.add(p > 0.05)
    assert decided == {True, False}


def test_too_few_contexts_have_no_interval() -> None:
    assert not sign_flip([3, 2, 1, 2, 3], [5] * 5)[0].bounded  # signs of five are alike in 1 of 16
    assert sign_flip([3, 2, 1, 2, 3, 1], [5] * 6)[0].bounded
    assert not sign_flip([1, 1] + [0] * 30, [5] * 32)[0].bounded  # two contexts differ
    assert sign_flip([], []) == (pytest.approx(Difference(math.nan), nan_ok=True), 1.0)


def test_without_differences_nothing_is_found() -> None:
    assert p_of([]) == p_of([0, 0, 0]) == mcnemar_p(0, 0) == 1.0
    same = compare([Pair("a", 1, 1), Pair("b", 0, 0)])
    assert same.difference.value == 0
    assert math.isnan(same.difference.low)
    assert math.isnan(compare([]).base)


def test_one_task_per_context_is_mcnemar() -> None:
    assert p_of([1] * 9 + [-1] * 3 + [0] * 20) == pytest.approx(mcnemar_p(9, 3), abs=ROUNDING)
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


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # 3·0.01, max(2·0.03, 1·0.04), 2·0.03
    assert holm([]) == []


def test_equal_answers_within_contexts_are_worth_one() -> None:
    alone = rate([(str(number), float(number % 2)) for number in range(20)])
    five = rate([(str(number), float(number % 2)) for number in range(20) for _ in range(5)])
    assert five.value == alone.value == 0.5
    assert (five.low, five.high) == pytest.approx((alone.low, alone.high), abs=0.02)  # Student's quantile for tasks
    by_hand = beta.ppf(0.025, 9.5, 10.5), beta.ppf(0.975, 10.5, 9.5)  # of 19 tasks: variances have one degree less
    assert (alone.low, alone.high) == pytest.approx(by_hand)


def test_rate_of_equal_tasks_still_has_an_interval() -> None:
    """No task of ten contexts solved: the rule of three in its exact two-sided form, for contexts, not for tasks."""
    none = rate([(str(number), 0.0) for number in range(10) for _ in range(4)])
    assert none.value == none.low == 0.0
    assert none.high == pytest.approx(1 - 0.025 ** (1 / (10 * (t.ppf(0.975, 39) / t.ppf(0.975, 9)) ** 2)))
    every = rate([(str(number), 1.0) for number in range(10)])
    assert (every.value, every.high) == (1.0, 1.0)
    assert every.low == pytest.approx(0.025 ** (1 / 10))


def test_contexts_that_change_alike_give_no_interval() -> None:
    """One of the two tasks of every context rises: the signs are sure of it to the last digit."""
    risen = compare([Pair(str(number), 0.0, score) for number in range(10) for score in (0.0, 1.0)]).difference
    assert risen.value == 0.5
    assert np.isnan([risen.low, risen.high]).all()


def design(contexts: int, tasks: int, fixed: int, broken: int) -> list[Pair]:
    """Contexts that are half solved; the first so many tasks of either kind change, one per context."""
    pairs = []
    for context in range(contexts):
        for task in range(tasks):
            base = float(task % 2)
            change = float(task < 2 and context < (broken if base else fixed))
            pairs.append(Pair(str(context), base, abs(base - change)))
    return pairs


def test_how_many_contexts_find_anything() -> None:
    """2/2^C after Holm: 6 contexts for one comparison, 7 for 2 or 3, 8 for up to 6, 9 for up to 12."""
    for contexts, most in ((5, 0), (6, 1), (7, 3), (8, 6), (9, 12)):
        for lines in {max(most, 1), most + 1}:
            same = [np.full(contexts, count) for count in (2, 1, 0, 0)]
            assert smallest_gains(*same, lines=lines).possible == (lines <= most), (contexts, lines)
    assert findable(design(7, 4, 1, 1), 1) == pytest.approx(Findable(), nan_ok=True)  # possible, but no number
    assert findable([Pair("a", 0.5, 1.0)], 1) is None  # shares


def test_what_a_run_finds() -> None:
    """Both ends, more of it with fewer lines; an effect there need not hide what else could have been found."""
    spread, whole, _ = findable(design(40, 4, 6, 6), 1)
    assert 0.04 < spread < whole < 0.25
    assert findable(design(40, 4, 6, 6), 1) == (spread, whole, True)
    six = findable(design(40, 4, 6, 6), 6)
    assert spread < six.spread
    assert whole < six.whole
    risen = findable(design(40, 4, 20, 5), 1)
    assert risen.spread == pytest.approx(spread, rel=0.35)
    full = [Pair(str(n), 1.0, float(n > 3)) for n in range(40)]  # nothing left to solve
    assert np.isnan(findable(full, 1)[:2]).all()


def test_noise_is_what_the_population_has() -> None:
    """Rate and direction of changes of whole contexts, without an effect and with one of either kind."""
    rng, where = np.random.default_rng(3), Population(200, "four", 0.5, 0.2, "contexts")
    for effect, whole in ((0.0, False), (0.0, True), (0.15, False), (0.15, True)):
        runs = [drawn(rng, where, effect, whole=whole) for _ in range(100)]
        columns = [
            [run.per_context(values) for values in (run.base, run.other > run.base, run.other < run.base)]
            for run in runs
        ]
        rate, _, aligned = np.mean([noise(where.tasks(), *one, whole=whole) for one in columns], axis=0)
        assert rate == pytest.approx(0.2 * 2 * 0.5 * 0.5, rel=0.1)
        # Of beta(2, 2): E p² = 0.3, E p(1 − p) = 0.2; pairs that change alike less opposed ones, of both
        assert aligned == pytest.approx((0.3**2 - 0.2**2) / (0.3**2 + 0.2**2), abs=0.06)
    assert noise(*(np.array([count, count]) for count in (4, 2, 0, 0)), whole=False) == (0.0, 0.0, 0.0)
    fixed, broken = np.array([2, 2, 0, 0]), np.array([0, 0, 2, 2])
    # Two of four tasks change in every context: one pair in six where chance makes 1.5, and of one direction; half a
    # context is added to four.
    assert noise(np.array([4] * 4), np.array([2] * 4), fixed, broken, whole=True) == (0.5 * 4.5 / 4, 0.0, 1.0)


def test_power_is_that_of_the_printed_model() -> None:
    """Without noise, every task failed, one task per context: the binomial chance of enough contexts, by hand."""
    counts = [np.full(10, count) for count in (1, 0, 0, 0)]  # 6 of 10 risen give p = 2/2⁶
    by_hand = sum(math.comb(10, k) * 0.7**k * 0.3 ** (10 - k) for k in range(6, 11))
    error = math.sqrt(by_hand * (1 - by_hand) / 1000)
    for whole in (False, True):
        one = Simulated(*counts, whole=whole)
        assert one.power(0.7) == pytest.approx(by_hand, abs=4 * error)
        assert one.power(0.0) == 0


def test_half_of_the_noise_returns_to_the_mean() -> None:
    """Arms of one distribution: what they fail varies alike, so its covariance with their difference is half of that's
    variance."""
    one = Simulated(*(np.full(200, count) for count in (8, 4, 1, 1)), whole=False)
    both = np.cov(one.sums.ravel(), one.failed.ravel())
    assert both[0, 1] == pytest.approx(-both[0, 0] / 2, rel=0.02)
    assert one.room == pytest.approx(0.5, abs=0.01)


def test_claims_hold_in_a_few_simulated_runs() -> None:
    """A small part of benchmarks/claims.py."""
    rng, where = np.random.default_rng(1), Population(24)
    for contexts, lines in ((6, 1), (24, 6)):
        share = false_positives(rng, Population(contexts, noise="clusters"), lines, 200)
        assert share < 0.05 + 2.5 * math.sqrt(0.05 * 0.95 / 200)
    found = claim(rng, where, 0.15, 1, 20, whole=True, prints=0)
    for claimed in (found.without, found.within):
        assert claimed == pytest.approx(found.true, abs=0.05 + 3 * math.sqrt(0.25 / 80))
    lowest = 0.94 - 2.5 * math.sqrt(0.06 / 60)
    assert coverage(differences(rng, where, 0.1, 60, whole=False))[0] > lowest
    assert coverage(rates(rng, where, 0.5, 60))[0] > lowest


@pytest.mark.slow
def test_claims_hold() -> None:
    """A larger part of it."""
    rng, runs = np.random.default_rng(2), 1000
    error = math.sqrt(0.05 * 0.95 / runs)
    for contexts in (2, 6, 24, 200):
        for lines in (1, 6):
            assert false_positives(rng, Population(contexts, noise="clusters"), lines, runs) < 0.05 + 3 * error
    for contexts, effect in ((24, 0.17), (200, 0.05), (500, 0.03)):
        for whole in (False, True):
            found = claim(rng, Population(contexts), effect, 6, 100, whole=whole)
            for claimed in (found.without, found.within):
                assert claimed == pytest.approx(found.true, abs=0.05 + 3 * math.sqrt(0.25 / 400))
            assert found.kept == pytest.approx(0.8, abs=0.05 + 3 * math.sqrt(0.16 / 400))
    for contexts in (6, 24, 200):
        where = Population(contexts)
        assert coverage(differences(rng, where, 0.1, 300, whole=False))[0] > 0.94 - 3 * math.sqrt(0.06 / 300)
        for solved in (0.02, 0.5):
            assert coverage(rates(rng, where._replace(solved=solved), 0.5, 300))[0] > 0.94 - 3 * math.sqrt(0.06 / 300)
        for found_taus in zip(*taus(rng, where, 1.2, 300), strict=True):
            assert coverage(iter(found_taus))[0] > 0.94 - 3 * math.sqrt(0.06 / 300)
