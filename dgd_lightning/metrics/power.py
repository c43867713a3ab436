"""What a run could have found: power of the sign-flip test over contexts after Holm's adjustment, by simulation."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dgd_lightning.metrics.clustered import ALPHA, NAN, exact_p

POWER = 0.8
FEWEST = 8  # contexts, below which no number is given: nearly all of them must agree
CONTEXTS = 200_000  # simulated in all, shared out among the runs
LEAST, MOST = 400, 1_000  # runs
CHANCE = 1.2  # squared standard errors of a surplus that may be chance alone
HALVINGS = 8  # of the logarithm of an effect, from one task to the largest there is room for


class Findable(NamedTuple):
    """The smallest gains, as shares of all tasks, that are found in 80% of runs; NaN where none is."""

    spread: float = NAN  # over all tasks that the arm would have failed
    whole: float = NAN  # gathered in whole contexts
    possible: bool = True  # whether p can be small enough at all: enough contexts for so many comparisons


class Simulated:
    """Runs with the design of a real one: its contexts, their tasks, what the baseline solved, how much is noise.

    Noise: tasks that change though neither arm is better, as many fixed as broken. The number of a context's tasks that
    change is beta-binomial, and so is how many of these are fixed, since changes may cluster in contexts, and their
    directions too. Rates and clustering are moments of the run's own fixed and broken tasks, see `noise`.

    Effect: tasks that the arm would have failed become solved with one probability; either each task by itself, or all
    such tasks of a context together. Which it is, a run can't tell.

    Args:
        tasks: [C] of each context.
        solved: [C] of them by the baseline.
        fixed: [C] solved by the arm alone.
        broken: [C] solved by the baseline alone.
        whole: whether effects are those of whole contexts.
        lines: of the table: a line is found where p is at most 0.05 / lines, as Holm asks where no other line is.
        runs: to simulate; by default as many as are worth their time.
    """

    def __init__(
        self,
        tasks: np.ndarray,
        solved: np.ndarray,
        fixed: np.ndarray,
        broken: np.ndarray,
        *,
        whole: bool,
        lines: int = 1,
        seed: int = 0,
        runs: int | None = None,
    ) -> None:
        self.tasks, self.alpha, self.whole, self.seed = int(tasks.sum()), ALPHA / lines, whole, seed
        rng, contexts = np.random.default_rng(seed), len(tasks)
        size = (runs or int(np.clip(CONTEXTS // contexts, LEAST, MOST)), contexts)
        rate, together, aligned = noise(tasks, solved, fixed, broken, whole=whole)
        changed = rng.binomial(tasks, _probabilities(rng, rate, together, size), size)
        risen = rng.binomial(changed, _probabilities(rng, 0.5, aligned, size), size)
        self.sums = 2 * risen - changed  # [R, C]
        # What the arm fails without an effect. The baseline's own outcomes are one draw, too: half of the noise lies
        # between them and either arm of a new run; all of it there would be too much of a return to the mean.
        half = (self.sums + rng.integers(0, 2, size)) // 2  # odd ones rounded up or down
        self.failed = np.clip(tasks - solved - half, changed - risen, tasks - risen)
        self.room = float(self.failed.sum(1).mean()) / self.tasks  # the largest effect

    def power(self, effect: float) -> float:
        """Share of runs that find a gain of ``effect`` (of all tasks, 0 … 1)."""
        share = min(1.0, effect / self.room) if self.room else 0.0
        rng = np.random.default_rng((self.seed, 1))
        if self.whole:
            sums = self.sums + self.failed * (rng.random(self.failed.shape) < share)
        else:
            sums = self.sums + rng.binomial(self.failed, share)
        return float(((exact_p(sums) <= self.alpha) & (sums.sum(1) > 0)).mean())

    def smallest(self, low: float = 0.0) -> float:
        """The smallest effect from ``low`` on that is found in 80% of runs; NaN where not even the largest one is."""
        low, high = max(low, 1 / self.tasks), self.room
        if self.power(high) < POWER:
            return NAN
        for _ in range(HALVINGS):
            middle = float(np.sqrt(low * high))
            low, high = (low, middle) if self.power(middle) >= POWER else (middle, high)
        return high


def smallest_gains(
    tasks: np.ndarray, solved: np.ndarray, fixed: np.ndarray, broken: np.ndarray, *, lines: int = 1
) -> Findable:
    """The smallest gains that such runs find; none for fewer than `FEWEST` contexts. Arguments as of `Simulated`."""
    possible = 2.0 ** (1 - len(tasks)) <= ALPHA / lines
    if len(tasks) < FEWEST or not possible:
        return Findable(possible=possible)
    spread = Simulated(tasks, solved, fixed, broken, whole=False, lines=lines).smallest()
    if spread != spread:
        return Findable()
    return Findable(spread, Simulated(tasks, solved, fixed, broken, whole=True, lines=lines).smallest(spread))


def noise(
    tasks: np.ndarray, solved: np.ndarray, fixed: np.ndarray, broken: np.ndarray, *, whole: bool
) -> tuple[float, float, float]:
    """How much of what changed in a run is noise, and how clustered it is: moments for the draws of `Simulated`.

    Counted are tasks that changed, and pairs of them in one context: alike, or opposed (one fixed, one broken). Noise
    has two equal directions; what one of them has more than the other may be an effect:

    1. ``effect``, from 0 to 1, is how far that surplus is beyond chance, by its variance over contexts.
    2. As far as it is, only the rarer direction is noise, and counts twice.
    3. The effect has also hidden noise: it solved a ``share`` of the tasks that it can change, some of those that noise
       would have broken among them, so that counts of the rarer direction are divided by what it ``kept``. What it
       ``added`` to the other direction is taken off pairs. Both as if it were of the kind that is simulated.
    4. Runs with little noise to see would claim too much power on average: ``few`` adds half a context's worth.

    Arguments as of `Simulated`.

    Returns:
        The share of tasks that change by noise; the correlation of two tasks of a context in whether they change, and
        that of two that changed in their direction: each 0 to 1.
    """
    failed = tasks - solved
    more, less, able = (fixed, broken, failed) if fixed.sum() >= broken.sum() else (broken, fixed, solved)
    excess, squares = float((more - less).sum()), (fixed + broken) ** 2.0
    if not squares.any():
        return 0.0, 0.0, 0.0
    variance = float(((more - less - excess / tasks.sum() * tasks) ** 2).sum())
    effect = max(0.0, 1 - (CHANCE * variance / excess**2) ** 2) if excess else 0.0  # 0: may be chance alone; 1: is not
    share = min(0.9, effect * excess / able.sum()) if excess else 0.0  # of the tasks that it could change
    kept = 1 - share  # tasks of the rarer direction; of pairs each task by itself, or both together
    pairs_kept, added = (kept, 0.0) if whole else (kept**2, share * able)
    few = 1 + 0.5 * float((squares**2).sum() / squares.sum() ** 2)
    rare, opposed = less.sum() / kept, max(0.0, 2 * float(((more - added) * less).sum()) / pairs_kept)
    rate = min(1.0, few * float(rare * (1 + effect) + more.sum() * (1 - effect)) / tasks.sum())
    alike = (less * (less - 1)).sum() / pairs_kept * (1 + effect) + (more * (more - 1)).sum() * (1 - effect)
    pairs, changed = float((tasks * (tasks - 1)).sum()), few * float(alike) + opposed
    together = (changed / pairs - rate**2) / (rate * (1 - rate)) if pairs and rate < 1 else 0.0
    return rate, max(0.0, together), max(0.0, 1 - 2 * opposed / changed if changed else 0.0)


def _probabilities(
    rng: np.random.Generator, mean: float, correlation: float, size: tuple[int, int]
) -> np.ndarray | float:
    """Of a beta-binomial's draws; the mean alone where draws of one context do not depend on each other."""
    if correlation <= 0 or not 0 < mean < 1:
        return mean
    strength = 1 / min(correlation, 0.999) - 1
    return rng.beta(mean * strength, (1 - mean) * strength, size)
