"""Do the statistics keep what they claim? False positives, power and coverage in simulated runs.

    python -m benchmarks.claims --runs 1000

prints tables and one line of JSON; ``--parts`` measures some of it. Twenty minutes of one core at 1,000 runs.

- false positives: share of runs of equal arms in which any line of the table has Holm's p ≤ 0.05.
- power: how often a gain is really found, in fresh runs, against what runs claim by themselves (`metrics.power`), on
  average; and how often the gain is found that such runs print as found in 80%.
- differences, rates, τ: share of printed intervals that hold the true value, and the share of runs that print one.

Populations: contexts differ in difficulty (beta distributed); a share of tasks is drawn anew under the second arm,
each by itself, more in some contexts than in others, or whole contexts with a difficulty of their own. An effect solves
tasks that the second arm fails, so that the gain is as asked for on average: each task with one probability (spread),
or all of a context together (whole).
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from dgd_lightning.metrics.clustered import Difference, clustered_mean, exact_p
from dgd_lightning.metrics.paired import Verified, tau_gain
from dgd_lightning.metrics.power import Simulated
from dgd_lightning.report.print_tables import new_table, plain_console, print_tables
from dgd_lightning.scoring.statistics import Pair, compare, rate

SIZES = ("one", "four", "unequal")
FEW = 40  # simulated runs of a claim: enough, since claims are averaged
TAU = 3.0


class Population(NamedTuple):
    """Where runs are drawn from."""

    contexts: int
    sizes: str = "unequal"  # tasks of a context: one, four, or 1 to 12
    solved: float = 0.2
    anew: float = 0.3  # share of tasks that the second arm draws anew
    noise: str = "tasks"  # of tasks by themselves, of tasks clustered in contexts, or of whole contexts

    @property
    def name(self) -> str:
        return f"{self.contexts} contexts, {self.sizes}, {self.solved:.0%} solved, {self.anew:.0%} anew by {self.noise}"

    def tasks(self) -> np.ndarray:
        """[C] of each context, the same in every run."""
        if self.sizes == "unequal":
            return np.random.default_rng(self.contexts).integers(1, 13, self.contexts)
        return np.full(self.contexts, {"one": 1, "four": 4}[self.sizes])


class Run(NamedTuple):
    """One run of two arms."""

    context: np.ndarray  # [T]
    base: np.ndarray  # [T] 0 or 1
    other: np.ndarray

    def per_context(self, values: np.ndarray) -> np.ndarray:
        """[C] sums."""
        return np.bincount(self.context, weights=values).astype(int)

    @property
    def differences(self) -> np.ndarray:
        return self.per_context(self.other - self.base)


def drawn(rng: np.random.Generator, where: Population, effect: float = 0.0, *, whole: bool = False) -> Run:
    """A run; ``effect``: share of all tasks that its second arm solves more, on average."""
    tasks, mean = where.tasks(), (4 * where.solved, 4 * (1 - where.solved))
    context = np.repeat(np.arange(where.contexts), tasks)
    ease = rng.beta(*mean, where.contexts)
    base, again = (rng.random(len(context)) < ease[context] for _ in range(2))
    share: Any = where.anew
    if where.noise == "clusters":  # a correlation of 0.3
        share = rng.beta(share * 7 / 3, (1 - share) * 7 / 3, where.contexts)[context]
    if where.noise == "contexts":
        again = rng.random(len(context)) < rng.beta(*mean, where.contexts)[context]
        anew = (rng.random(where.contexts) < share)[context]
    else:
        anew = rng.random(len(context)) < share
    other = np.where(anew, again, base)
    hit = effect / (1 - where.solved)
    gained = (rng.random(where.contexts) < hit)[context] if whole else rng.random(len(context)) < hit
    return Run(context, base.astype(int), (other | gained).astype(int))


def false_positives(rng: np.random.Generator, where: Population, lines: int, runs: int) -> float:
    """Familywise: of any line."""
    p = np.stack([exact_p(np.stack([drawn(rng, where).differences for _ in range(runs)])) for _ in range(lines)])
    return float(np.mean(p.min(0) * lines <= 0.05))  # Holm finds something where it finds the smallest


def simulated(run: Run, lines: int, seed: int, *, whole: bool, runs: int | None = None) -> Simulated:
    """What a run knows of its power."""
    fixed, broken = run.other > run.base, run.other < run.base
    counts = (run.per_context(values) for values in (np.ones(len(run.base)), run.base, fixed, broken))
    return Simulated(*counts, whole=whole, lines=lines, seed=seed, runs=runs)


def found(rng: np.random.Generator, where: Population, effect: float, lines: int, runs: int, *, whole: bool) -> float:
    """How often a gain is found."""
    sums = np.stack([drawn(rng, where, effect, whole=whole).differences for _ in range(runs)])
    return float(np.mean((exact_p(sums) <= 0.05 / lines) & (sums.sum(1) > 0)))


class Claim(NamedTuple):
    """Power at one effect."""

    true: float
    without: float  # claimed, on average, by runs without the effect
    within: float  # by runs that have it
    printed: float  # effect that runs say is found in 80%, the median
    kept: float  # how often it is


def claim(
    rng: np.random.Generator, where: Population, effect: float, lines: int, runs: int, *, whole: bool, prints: int = 8
) -> Claim:
    """Claimed against true power."""

    def powers(effect_there: float) -> Iterator[float]:
        for seed in range(runs):
            run = drawn(rng, where, effect_there, whole=whole)
            yield simulated(run, lines, seed, whole=whole, runs=FEW).power(effect)

    claimed = [np.mean(list(powers(there))) for there in (0.0, effect)]
    printed = [simulated(drawn(rng, where), lines, n, whole=whole).smallest() for n in range(prints)]
    smallest = float(np.nanmedian(printed)) if printed else float("nan")
    kept = found(rng, where, smallest, lines, 4 * runs, whole=whole) if printed else float("nan")
    true = found(rng, where, effect, lines, 4 * runs, whole=whole)
    return Claim(true, float(claimed[0]), float(claimed[1]), smallest, kept)


def coverage(intervals: Iterator[tuple[Difference, float]]) -> tuple[float, float]:
    """Share of printed intervals that hold the truth, and share of runs that print one."""
    held = [low <= truth <= high if low == low else None for (_, low, high), truth in intervals]
    printed = [one for one in held if one is not None]
    return (float(np.mean(printed)) if printed else float("nan")), len(printed) / len(held)


def differences(
    rng: np.random.Generator, where: Population, effect: float, runs: int, *, whole: bool
) -> Iterator[tuple[Difference, float]]:
    """Paired differences of solve rates."""
    for _ in range(runs):
        one = drawn(rng, where, effect, whole=whole)
        pairs = (Pair(str(c), float(b), float(o)) for c, b, o in zip(*one, strict=True))
        yield compare(pairs).difference, effect


def rates(rng: np.random.Generator, where: Population, alike: float, runs: int) -> Iterator[tuple[Difference, float]]:
    """Solve rates of one arm; ``alike``: correlation of the tasks of a context."""
    tasks, strength = where.tasks(), 1 / alike - 1
    for _ in range(runs):
        solved = rng.binomial(tasks, rng.beta(where.solved * strength, (1 - where.solved) * strength, len(tasks)))
        scores = ((str(c), float(n < s)) for c, (s, t) in enumerate(zip(solved, tasks, strict=True)) for n in range(t))
        yield rate(scores), where.solved


def taus(
    rng: np.random.Generator, where: Population, gain: float, runs: int
) -> Iterator[list[tuple[Difference, float]]]:
    """τ of one arm, its gain and ratio over another one, and the median ratio of contexts."""
    tasks = where.tasks()

    def varied() -> np.ndarray:
        return rng.lognormal(-0.005, 0.1, len(tasks))  # mean 1

    def side(tau: np.ndarray) -> list[Verified]:
        verifications = 30 * rng.poisson(tasks) + 5
        tokens = (verifications * tau * varied()).round().astype(int)
        return [Verified(*one) for one in zip(tokens.tolist(), verifications.tolist(), strict=True)]

    for _ in range(runs):
        ease = 1 + (TAU - 1) * rng.lognormal(-0.125, 0.5, len(tasks))
        base, other = side(ease), side(ease * gain * varied())  # contexts gain differently
        compared = tau_gain(list(zip(base, other, strict=True)))
        one = clustered_mean([s.tokens for s in base], [s.verifications for s in base])
        median = gain * float(np.exp(-0.005)) - 1
        yield [
            (one, TAU),
            (compared.difference, (gain - 1) * TAU),
            (compared.ratio, gain - 1),
            (compared.median, median),
        ]


Numbers = dict[str, Any]  # by what they are of


def all_false_positives(rng: np.random.Generator, runs: int) -> Numbers:
    results = {}
    kinds = (
        ("one", "tasks"),
        ("four", "clusters"),
        *(("unequal", noise) for noise in ("tasks", "clusters", "contexts")),
    )
    for contexts in (2, 5, 6, 7, 8, 9, 12, 24, 200, 500):
        for sizes, noise in kinds:
            for lines in (1, 6):
                where = Population(contexts, sizes, noise=noise)
                results[f"{where.name}, {lines} lines"] = false_positives(rng, where, lines, 4 * runs)
    return results


def all_power(rng: np.random.Generator, runs: int) -> Numbers:
    results = {}
    kinds = (
        ("four", 0.2, "tasks"),
        ("unequal", 0.2, "clusters"),
        ("unequal", 0.5, "tasks"),
        ("unequal", 0.2, "contexts"),
    )
    for contexts, effects in ((24, (0.15, 0.2)), (200, (0.045, 0.06)), (500, (0.025, 0.035))):
        for (sizes, solved, noise), lines, whole in itertools.product(kinds, (1, 6), (False, True)):
            where, effect = Population(contexts, sizes, solved, noise=noise), effects[whole]
            name = f"{where.name}, {lines} lines, {effect:+.1%} {'whole' if whole else 'spread'}"
            results[name] = claim(rng, where, effect, lines, runs, whole=whole)._asdict()
    return results


def difference_coverage(rng: np.random.Generator, runs: int) -> Numbers:
    results = {}
    for contexts in (6, 8, 12, 24, 60, 200, 500):
        for sizes in SIZES:
            where = Population(contexts, sizes, noise="contexts" if sizes == "unequal" else "tasks")
            large = 0.2 if contexts < 100 else 0.05
            for effect, whole in ((0.0, False), (large, False), (large, True), (large / 4, True)):
                name = f"{where.name}: difference of {effect:+.1%} {'whole' if whole else 'spread'}"
                results[name] = coverage(differences(rng, where, effect, runs, whole=whole))
    return results


def rate_coverage(rng: np.random.Generator, runs: int) -> Numbers:
    results = {}
    for contexts in (2, 4, 8, 12, 24, 60, 200, 500):
        for solved in (0.02, 0.05, 0.2, 0.5, 0.9, 0.98):
            for sizes, alike in (("four", 0.2), ("unequal", 0.01), ("unequal", 0.5), ("unequal", 0.9)):
                name = f"{contexts} contexts, {sizes}, correlation {alike}: rate of {solved:.0%}"
                results[name] = coverage(rates(rng, Population(contexts, sizes, solved), alike, runs))
    return results


def tau_coverage(rng: np.random.Generator, runs: int) -> Numbers:
    results = {}
    for contexts in (6, 8, 12, 24, 60, 200, 500):
        for sizes in ("four", "unequal"):
            for gain in (1.0, 1.2):
                intervals = list(taus(rng, Population(contexts, sizes), gain, runs))
                for number, name in enumerate(("τ", "τ gain", "ratio", "median ratio")):
                    of = f"{contexts} contexts, {sizes}, ratio {gain}: {name}"
                    results[of] = coverage(iter([one[number] for one in intervals]))
    return results


PARTS: dict[str, tuple[Callable[[np.random.Generator, int], Numbers], tuple[str, ...]]] = {
    "false positives": (all_false_positives, ("share",)),
    "power": (all_power, Claim._fields),
    "differences": (difference_coverage, ("coverage", "printed in")),
    "rates": (rate_coverage, ("coverage", "printed in")),
    "τ": (tau_coverage, ("coverage", "printed in")),
}


def table(title: str, lines: Numbers) -> Table:
    """For people; all numbers in percent."""
    shown = new_table(title, ["of"], PARTS[title][1])
    for name, numbers in lines.items():
        values = [numbers] if isinstance(numbers, float) else dict(numbers).values() if title == "power" else numbers
        shown.add_row(name, *(f"{100 * value:.1f}" for value in values))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    options = parser.parse_args()
    results = {name: PARTS[name][0](np.random.default_rng(22), options.runs) for name in options.parts}
    print_tables(plain_console(), [table(name, lines) for name, lines in results.items()])
    print(json.dumps(results, ensure_ascii=False))


if __name__ == "__main__":
    main()
