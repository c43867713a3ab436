"""Lanes: the rows of a guided batch that share a readout and, but for β, a blend."""

from __future__ import annotations

import torch
from torch import Tensor

from dgd_lightning.decode.blending import Blend
from dgd_lightning.decode.readouts import Reading, Stretch


class Lane:
    """Rows of a batch that share a readout and, but for β, a blend.

    Args:
        blend: its own β does not count.
        reading: of all prompts, until :meth:`spread`.
        rows: their numbers in the batch, ascending.
        betas: of each of them.
    """

    def __init__(self, blend: Blend, reading: Reading, rows: list[int], betas: list[float]) -> None:
        self.blend, self.reading, self.rows = blend, reading, rows
        self.betas = torch.tensor(betas, dtype=torch.float64)  # [n]
        self.index: Tensor | None = None  # [n] the rows on the device; None: all of the batch, in order

    def spread(self, prompts: list[int], device: torch.device) -> None:
        """Have a row for each of ours, where there was one per prompt; ``prompts``: that of every row of the batch."""
        self.betas = self.betas.to(device)
        own = [prompts[row] for row in self.rows]
        if own != list(range(len(set(prompts)))):
            self._take(torch.tensor(own, device=device))
        self._point(len(prompts))

    def select(self, stay: list[int]) -> None:
        """Keep these rows of the batch only; those of other lanes may leave too."""
        places = {row: place for place, row in enumerate(self.rows)}
        own = torch.tensor([places[row] for row in stay if row in places], device=self.betas.device)
        self.rows = [new for new, row in enumerate(stay) if row in places]
        if self.rows:
            self.betas = self.betas[own]
            self._take(own)
            self._point(len(stay))

    def extend(self, taps: dict[int, Tensor], positions: Tensor) -> None:
        """Let the readout take up what the target has computed."""
        self.reading.extend({layer: self._own(states) for layer, states in taps.items()}, self._own(positions))

    def mix(self, stretch: Stretch, step: Tensor) -> Tensor:
        """Guided logits [n, Q, V] of the lane's rows, from those of the batch."""
        own = stretch._replace(
            tokens=self._own(stretch.tokens),
            positions=self._own(stretch.positions),
            logits=self._own(stretch.logits),
            taps={layer: self._own(states) for layer, states in stretch.taps.items()},
        )
        return self.blend.mix(own.logits, self.reading.logits(own), self.betas, self._own(step))

    def _own(self, values: Tensor) -> Tensor:
        return values if self.index is None else values[self.index]

    def _point(self, rows: int) -> None:
        alone = len(self.rows) == rows
        self.index = None if alone else torch.tensor(self.rows, device=self.betas.device)

    def _take(self, rows: Tensor) -> None:
        self.reading.select(rows)
        for cache in self.reading.caches:
            cache.select(rows)
