"""The rows of a guided batch that share a readout and, but for β, a blend."""

import torch
from torch import Tensor

from dgd_lightning.decode.batch import Change
from dgd_lightning.decode.blending import Blend
from dgd_lightning.decode.readouts.base import ReadoutState, TargetOutput


class ReadoutGroup:
    """What its rows are blended with. The state has a row per sequence that one of them is at.

    Args:
        blend: its own β does not count.
        state: of all prompts.
        rows: their numbers in the batch, ascending.
        betas: [n], of each of them, on the target's device.
        prompts: B.
    """

    def __init__(self, blend: Blend, state: ReadoutState, rows: list[int], betas: Tensor, prompts: int) -> None:
        self.blend, self.state, self.rows, self.betas = blend, state, rows, betas
        self.sequences = list(range(prompts))  # numbers of sequences, ascending; none once every row is finished
        self._sequences: Tensor | None = None  # the same on the device; None: all there are, in order
        self._rows: Tensor | None = None  # [n] numbers of the rows; None: all there are, in order
        self._places: Tensor | None = None  # [n] which of our sequences each row is at; None: row for row

    def follow(self, change: Change) -> None:
        """Rows leave and sequences part: those that stay take along what is theirs."""
        device = self.betas.device
        places = {row: place for place, row in enumerate(self.rows)}
        kept = [places[row] for row in change.stay if row in places]
        self.rows = [new for new, row in enumerate(change.stay) if row in places]
        self.betas = self.betas[kept]
        was, sequences = self.sequences, sorted({change.sequence_of[row] for row in self.rows} - {-1})
        take = [was.index(change.parents[sequence]) for sequence in sequences]
        if sequences and take != list(range(len(was))):
            index = torch.tensor(take, device=device)
            self.state.select(index)
            for cache in self.state.caches:
                cache.select(index)
        self.sequences = sequences
        own = {sequence: place for place, sequence in enumerate(sequences)}
        at = [own.get(change.sequence_of[row], 0) for row in self.rows]
        self._sequences = _index(sequences, len(change.parents), device)
        self._rows = _index(self.rows, len(change.stay), device)
        self._places = _index(at, len(sequences), device)

    @property
    def index(self) -> Tensor | slice:
        """The rows, to index values [b, ..] with."""
        return slice(None) if self._rows is None else self._rows

    def extend(self, taps: dict[int, Tensor], positions: Tensor) -> None:
        """Let the readout take up what the target has computed of all sequences."""
        states = {layer: _of(states, self._sequences) for layer, states in taps.items()}
        self.state.extend(states, _of(positions, self._sequences))

    def mix(self, out: TargetOutput, target: Tensor, step: Tensor) -> Tensor:
        """Guided logits [n, Q, V] of the group's rows.

        Args:
            out: of all sequences.
            target: [b, Q, V], of all rows.
            step: [b, Q].
        """
        own = out._replace(
            tokens=_of(out.tokens, self._sequences),
            positions=_of(out.positions, self._sequences),
            logits=_of(out.logits, self._sequences),
            taps={layer: _of(states, self._sequences) for layer, states in out.taps.items()},
        )
        readout = _of(self.state.logits(own), self._places)
        return self.blend.mix(_of(target, self._rows), readout, self.betas, _of(step, self._rows))


def _index(numbers: list[int], count: int, device: torch.device) -> Tensor | None:
    """None where these are all there are, in order: nothing is copied then."""
    return None if numbers == list(range(count)) else torch.tensor(numbers, device=device)


def _of(values: Tensor, index: Tensor | None) -> Tensor:
    return values if index is None else values[index]
