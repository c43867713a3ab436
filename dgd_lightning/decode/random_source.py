"""Position-addressed random numbers: each is fixed by the row's seed, the position and the stream.

A row's history up to position p depends on random numbers at positions before p only: a proposal at p is looked at only
when everything before p was accepted, and then p is committed in that very cycle. So the numbers at p are fresh
whenever they matter, however often discarded proposals have read them, and a result does not depend on batch, rank or
order.
"""

import secrets
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from dgd_lightning.decode.sampling import draw
from dgd_lightning.errors import InputError
from dgd_lightning.seeds import mixed_seed

Stream = Literal[0, 1, 2, 3, 4]
DRAFT: Stream = 0  # the draft's proposal at a position
ACCEPT: Stream = 1  # whether that proposal is accepted
TARGET: Stream = 2  # the target's own token there: plain draw, residual or bonus
STREAMS = 3  # those above, of every position; those below have one number for each step of a chain
CUT: Stream = 3  # from which token on an answer is drawn anew
KEEP: Stream = 4  # whether the new answer takes the old one's place
SEED_BITS = 63  # row seeds fit a signed 64-bit integer, so that any file format can carry them


class RandomSource(Protocol):
    """What the loops ask for randomness. A test may substitute a chooser that explores every outcome."""

    def categorical(self, probs: Tensor, stream: Stream, positions: Tensor) -> Tensor:
        """Token ids [B, Q] drawn from ``probs`` [B, Q, V] for the absolute ``positions`` [B, Q]."""

    def bernoulli(self, probs: Tensor, stream: Stream, positions: Tensor) -> Tensor:
        """Booleans [B, Q], true with ``probs`` [B, Q], for the absolute ``positions`` [B, Q]."""

    def select(self, rows: Tensor) -> "RandomSource":
        """The source of the rows [R] that stay when others leave the batch."""

    def renewed(self, rows: Tensor, seeds: Sequence[int]) -> "RandomSource":
        """The source after these rows [R] have begun another step of their chains, each with a seed of its own."""


class RandomTable:
    """Random numbers read from a table of uniforms [B, P, 3]; entry i is of position ``starts`` [B] + i of a row.

    ``of_step`` [B, 2]: the numbers that a step of a chain has beside them, for `CUT` and `KEEP`.
    """

    def __init__(self, table: Tensor, starts: Tensor, of_step: Tensor | None = None) -> None:
        self.table, self.starts, self.of_step = table, starts, of_step

    def _uniform(self, stream: Stream, positions: Tensor) -> Tensor:
        if stream >= STREAMS:
            assert self.of_step is not None, "only a chain's steps have these numbers"
            return self.of_step[:, stream - STREAMS, None].expand_as(positions)
        return self.table[:, :, stream].gather(1, positions - self.starts[:, None])  # [B, Q]

    def categorical(self, probs: Tensor, stream: Stream, positions: Tensor) -> Tensor:
        """Token ids [B, Q], by inverse CDF."""
        return draw(probs, self._uniform(stream, positions))

    def bernoulli(self, probs: Tensor, stream: Stream, positions: Tensor) -> Tensor:
        """Booleans [B, Q]: uniform < probability, so 0 is never and 1 always true."""
        return self._uniform(stream, positions) < probs

    def select(self, rows: Tensor) -> "RandomTable":
        """Keep rows [R]."""
        return RandomTable(self.table[rows], self.starts[rows], None if self.of_step is None else self.of_step[rows])

    def renewed(self, rows: Tensor, seeds: Sequence[int]) -> "RandomTable":
        """With a table and numbers of the step for each of the rows [R], made of its seed."""
        table, of_step = random_table(seeds, self.table.shape[1]), step_numbers(seeds)
        old = self.table.new_zeros(len(self.starts), 2) if self.of_step is None else self.of_step
        new, beside = (numbers.to(self.table) for numbers in (table, of_step))
        return RandomTable(self.table.index_copy(0, rows, new), self.starts, old.index_copy(0, rows, beside))


def step_numbers(seeds: Sequence[int]) -> Tensor:
    """Uniforms [B, 2] in fp64 on CPU, of streams that no position has."""
    return random_table([mixed_seed(seed, 2) for seed in seeds], 1)[:, 0, :2]


def random_table(seeds: Sequence[int], positions: int) -> Tensor:
    """Uniforms [B, positions, 3] in fp64 on CPU; a longer table begins with the shorter one."""
    rows = [np.random.Generator(np.random.PCG64(seed)).random((positions, STREAMS)) for seed in seeds]
    return torch.from_numpy(np.stack(rows))


def row_seeds(seed: int | Sequence[int] | None, batch: int) -> list[int]:
    """One seed per row: derived from an integer and the row's number, each row's own, or with None of fresh entropy."""
    if seed is None:
        return [secrets.randbits(SEED_BITS) for _ in range(batch)]
    if not isinstance(seed, int) and (not isinstance(seed, Sequence) or isinstance(seed, str) or len(seed) != batch):
        raise InputError(
            "seed",
            expected=f"an integer, None, or one integer per prompt ({batch})",
            received=f"{len(seed)} values" if isinstance(seed, Sequence) else type(seed).__name__,
            hint="pass one seed per prompt, or a single integer",
        )
    for value in [seed] if isinstance(seed, int) else seed:
        if type(value) is not int or not 0 <= value < 2**64:
            hint = "use e.g. seed=0"
            raise InputError("seed", expected="integers in 0 … 2**64 - 1", received=repr(value), hint=hint)
    if not isinstance(seed, int):
        return list(seed)
    derived = (np.random.SeedSequence([seed, row]).generate_state(1, np.uint64)[0] for row in range(batch))
    return [int(value) >> (64 - SEED_BITS) for value in derived]
