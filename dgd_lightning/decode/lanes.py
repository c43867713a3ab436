"""Lanes: the rows of a guided batch that share a readout and, but for β, a blend."""

from __future__ import annotations

import torch
from torch import Tensor

from dgd_lightning.decode.blending import Blend
from dgd_lightning.decode.engine import Change
from dgd_lightning.decode.readouts import Reading, Stretch


class Lane:
    """What its rows are blended with. The reading has a row per text that one of them is at.

    Args:
        blend: its own β does not count.
        reading: of all prompts.
        rows: their numbers in the batch, ascending.
        betas: [n], of each of them, on the target's device.
        prompts: B.
    """

    def __init__(self, blend: Blend, reading: Reading, rows: list[int], betas: Tensor, prompts: int) -> None:
        self.blend, self.reading, self.rows, self.betas = blend, reading, rows, betas
        self.texts = list(range(prompts))  # numbers of texts, ascending; none once every row is finished
        self._texts: Tensor | None = None  # the same on the device; None: all there are, in order
        self._rows: Tensor | None = None  # [n] numbers of the rows; None: all there are, in order
        self._places: Tensor | None = None  # [n] which of our texts each row is at; None: row for row

    def follow(self, change: Change) -> None:
        """Rows leave and texts part: those that stay take along what is theirs."""
        device = self.betas.device
        places = {row: place for place, row in enumerate(self.rows)}
        kept = [places[row] for row in change.stay if row in places]
        self.rows = [new for new, row in enumerate(change.stay) if row in places]
        self.betas = self.betas[kept]
        was, texts = self.texts, sorted({change.text_of[row] for row in self.rows} - {-1})
        take = [was.index(change.parents[text]) for text in texts]
        if texts and take != list(range(len(was))):
            index = torch.tensor(take, device=device)
            self.reading.select(index)
            for cache in self.reading.caches:
                cache.select(index)
        self.texts = texts
        own = {text: place for place, text in enumerate(texts)}
        at = [own.get(change.text_of[row], 0) for row in self.rows]
        self._texts = _index(texts, len(change.parents), device)
        self._rows = _index(self.rows, len(change.stay), device)
        self._places = _index(at, len(texts), device)

    @property
    def index(self) -> Tensor | slice:
        """The rows, to index values [b, ..] with."""
        return slice(None) if self._rows is None else self._rows

    def extend(self, taps: dict[int, Tensor], positions: Tensor) -> None:
        """Let the readout take up what the target has computed of all texts."""
        states = {layer: _of(states, self._texts) for layer, states in taps.items()}
        self.reading.extend(states, _of(positions, self._texts))

    def mix(self, stretch: Stretch, target: Tensor, step: Tensor) -> Tensor:
        """Guided logits [n, Q, V] of the lane's rows.

        Args:
            stretch: of all texts.
            target: [b, Q, V], of all rows.
            step: [b, Q].
        """
        own = stretch._replace(
            tokens=_of(stretch.tokens, self._texts),
            positions=_of(stretch.positions, self._texts),
            logits=_of(stretch.logits, self._texts),
            taps={layer: _of(states, self._texts) for layer, states in stretch.taps.items()},
        )
        readout = _of(self.reading.logits(own), self._places)
        return self.blend.mix(_of(target, self._rows), readout, self.betas, _of(step, self._rows))


def _index(numbers: list[int], count: int, device: torch.device) -> Tensor | None:
    """None where these are all there are, in order: nothing is copied then."""
    return None if numbers == list(range(count)) else torch.tensor(numbers, device=device)


def _of(values: Tensor, index: Tensor | None) -> Tensor:
    return values if index is None else values[index]
