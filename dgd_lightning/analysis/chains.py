"""What chains and populations of power sampling did, by arm; made of prediction rows alone."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from dgd_lightning.metrics.clustered import NAN


class Chains:
    """Sums over the rows of one arm that say what a chain or a population did (``dgd.power``)."""

    def __init__(self) -> None:
        self.answers = self.steps = self.taken = self.drawn = self.tokens = 0
        self.log_p = 0.0
        self.along: list[list[float]] = []  # by step: log p of each chain that has made it
        self.sizes: list[list[float]] = []  # by block: each population's effective sample size, as a share
        self.example: dict[str, list[Any]] | None = None  # the steps of the first chain

    def add(self, row: dict[str, Any]) -> None:
        """Adds a row of the arm."""
        power = row["dgd"]["power"]
        self.answers += 1
        self.drawn += power["tokens_drawn"]
        self.tokens += row["dgd"]["tokens"]
        self.log_p += power["log_p"]
        steps = power.get("steps")
        if steps is not None:
            self.steps += len(steps["accepted"])
            self.taken += sum(steps["accepted"])
            _extend(self.along, steps["log_p"])
            self.example = self.example or steps
        _extend(self.sizes, [size / power["particles"] for size in power.get("effective_sample_sizes", ())])

    @property
    def acceptance(self) -> float:
        """Share of proposals that were taken."""
        return self.taken / self.steps if self.steps else NAN

    @property
    def size(self) -> float:
        """Mean effective sample size at the ends of blocks, as a share of the particles."""
        values = [value for column in self.sizes for value in column]
        return float(np.mean(values)) if values else NAN

    def scalars(self) -> dict[str, float]:
        """Its numbers by the names that curves have; NaN where there is none."""
        return {
            "acceptance_rate": self.acceptance,
            "effective_sample_size": self.size,
            "tokens_drawn_per_token": self.drawn / self.tokens if self.tokens else NAN,
            "log_p": self.log_p / self.answers if self.answers else NAN,
        }

    def curves(self) -> dict[str, list[float]]:
        """Means by step, and by block."""
        return {
            "log_p_by_step": [float(np.mean(column)) for column in self.along],
            "effective_sample_size_by_block": [float(np.mean(column)) for column in self.sizes],
        }


class Step(NamedTuple):
    """One proposal of a chain, for a picture."""

    number: int
    cut: int
    length: int  # of the answer that was proposed
    accepted: bool


def steps_of(history: dict[str, list[Any]]) -> Iterable[Step]:
    """The proposals of a chain, in order."""
    columns = (history[name] for name in ("cut", "length", "accepted"))
    return (Step(number, *step) for number, step in enumerate(zip(*columns, strict=True), 1))


def _extend(columns: list[list[float]], values: Iterable[float]) -> None:
    for number, value in enumerate(values):
        if number == len(columns):
            columns.append([])
        columns[number].append(value)
