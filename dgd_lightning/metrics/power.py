"""What a run could have found: power of the sign-flip test over contexts after Holm's adjustment, by simulation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dgd_lightning.metrics.clustered import ALPHA, NAN, exact_p

POWER = 0.8
FEWEST = 8  # contexts, below which no number is given: nearly all of them must agree
CONTEXTS = 200_000  # simulated in all, shared out among the runs
LEAST, MOST = 400, 1_000  # runs
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
        lines: of the table: a line is found where p is at most 0.05 / lines, as Holm asks where no other line is.
        runs: to simulate; by default as many as are worth their time.
    """

    def __init__(
        self,
        tasks: Sequence[int] | np.ndarray,
        solved: Sequence[int] | np.ndarray,
        fixed: Sequence[int] | np.ndarray,
        broken: Sequence[int] | np.ndarray,
        *,
        lines: int = 1,
        seed: int = 0,
        runs: int | None = None,
    ) -> None:
        n, s = np.array(tasks), np.array(solved)
        self.contexts, self.tasks, self.alpha, self.seed = len(n), int(n.sum()), ALPHA / lines, seed
        rng = np.random.default_rng(seed)
        size = (runs or int(np.clip(CONTEXTS // len(n), LEAST, MOST)), len(n))
        rate, together, aligned = noise(n, s, np.array(fixed), np.array(broken))
        changed = rng.binomial(n, _probabilities(rng, rate, together, size), size)
        risen = rng.binomial(changed, _probabilities(rng, 0.5, aligned, size), size)
        self.sums = 2 * risen - changed  # [R, C]
        # What the arm fails without an effect. The baseline's own outcomes are one draw, too: half of the noise lies
        # between them and either arm of a new run; all of it there would be too much of a return to the mean.
        half = (self.sums + rng.integers(0, 2, size)) // 2  # odd ones rounded up or down
        self.failed = np.clip(n - s - half, changed - risen, n - risen)
        self.room = float(self.failed.sum(1).mean()) / self.tasks  # the largest effect

    def power(self, effect: float, *, whole: bool) -> float:
        """Share of runs that find a gain of ``effect`` (of all tasks, 0 … 1); in ``whole`` contexts, or spread."""
        share = min(1.0, effect / self.room) if self.room else 0.0
        rng = np.random.default_rng((self.seed, 1))
        hit = rng.random(self.failed.shape) < share if whole else None
        sums = self.sums + (rng.binomial(self.failed, share) if hit is None else self.failed * hit)
        return float(((exact_p(sums) <= self.alpha) & (sums.sum(1) > 0)).mean())

    def smallest(self, *, whole: bool, low: float = 0.0) -> float:
        """The smallest effect from ``low`` on that is found in 80% of runs; NaN where not even the largest one is."""
        low, high = max(low, 1 / self.tasks), self.room
        if self.power(high, whole=whole) < POWER:
            return NAN
        for _ in range(HALVINGS):
            middle = float(np.sqrt(low * high))
            low, high = (low, middle) if self.power(middle, whole=whole) >= POWER else (middle, high)
        return high

    def findable(self) -> Findable:
        """The smallest gains; none for fewer than `FEWEST` contexts."""
        possible = 2.0 ** (1 - self.contexts) <= self.alpha
        if self.contexts < FEWEST or not possible:
            return Findable(possible=possible)
        spread = self.smallest(whole=False)
        return Findable(spread, self.smallest(whole=True, low=spread) if spread == spread else NAN)


def noise(n: np.ndarray, solved: np.ndarray, fixed: np.ndarray, broken: np.ndarray) -> tuple[float, float, float]:
    """Rate of tasks that change by noise, and correlations within contexts: of changing, and of the direction.

    An effect shows as more fixed than broken tasks, or fewer. As far as that is beyond chance, only the rarer direction
    is taken for noise, twice, and what the effect has put right again is added to it; otherwise both directions are.
    All arguments are [C].
    """
    more, less, able = (fixed, broken, n - solved) if fixed.sum() >= broken.sum() else (broken, fixed, solved)
    excess = float((more - less).sum())
    variance = float(((more - less - excess / n.sum() * n) ** 2).sum())
    effect = max(0.0, 1 - (1.5 * variance / excess**2) ** 2) if excess else 0.0  # 0: may be chance alone; 1: is not
    kept = max(0.1, 1 - effect * excess / able.sum())  # of the rarer direction
    rare = less.sum() / kept, (less * (less - 1)).sum() / kept**2  # tasks, and ordered pairs of them within contexts
    alike = rare[1] * (1 + effect) + (more * (more - 1)).sum() * (1 - effect)
    opposed = 2 * (rare[1] * effect + (more * less).sum() * (1 - effect))
    rate = float(np.clip((rare[0] * (1 + effect) + more.sum() * (1 - effect)) / n.sum(), 0, 1))
    pairs, changed = float((n * (n - 1)).sum()), float(alike + opposed)
    together = (changed / pairs - rate**2) / (rate * (1 - rate)) if pairs and 0 < rate < 1 else 0.0
    return rate, max(0.0, together), max(0.0, float(alike - opposed) / changed if changed else 0.0)


def _probabilities(
    rng: np.random.Generator, mean: float, correlation: float, size: tuple[int, int]
) -> np.ndarray | float:
    """Of a beta-binomial's draws; the mean alone where draws of one context do not depend on each other."""
    if correlation <= 0 or not 0 < mean < 1:
        return mean
    strength = 1 / min(correlation, 0.999) - 1
    return rng.beta(mean * strength, (1 - mean) * strength, size)
