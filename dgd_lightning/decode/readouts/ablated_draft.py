"""Layer ablation: the draft without some of its tapped layers, to see which of them it relies on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dgd_lightning.checks import check_choice
from dgd_lightning.decode.call import Request
from dgd_lightning.decode.readouts.base import Readout, ReadoutState
from dgd_lightning.decode.readouts.draft import DraftReadout, DraftState
from dgd_lightning.distributions import wide
from dgd_lightning.errors import InputError
from dgd_lightning.pair import Pair
from dgd_lightning.target.cache import PositionCache


@dataclass(frozen=True)
class AblatedDraft(Readout):
    """`DraftReadout` with the states of some tapped layers replaced at every position before the draft reads them.

    Args:
        ablate: layers of the target to replace, of those that the draft taps.
        by: ``zero``: zeros; or ``mean``: the layer's mean state over the row's prompt except its last token. The answer
            does not count, so each of its tokens depends on those before it only, and decoding token by token or in
            blocks gives the same. For a prompt of one token the mean is zero.
    """

    ablate: Sequence[int]
    by: Literal["zero", "mean"] = "mean"

    needs_draft = True

    def layers(self, pair: Pair) -> tuple[int, ...]:
        return DraftReadout().layers(pair)

    def begin(self, pair: Pair, request: Request, width: int) -> ReadoutState:
        self.check(pair)
        return AblatedState(pair, request, width, self)

    def check(self, pair: Pair) -> None:
        """Raises:
        InputError: no layers, or one that the draft does not tap; or an unknown ``by``.
        """
        tapped = self.layers(pair)
        layers = self.ablate if isinstance(self.ablate, Sequence) and not isinstance(self.ablate, str) else []
        if not layers or any(layer not in tapped for layer in layers):
            raise InputError(
                "readout.ablate",
                expected=f"some of the layers that the draft taps ({', '.join(map(str, tapped))})",
                received=repr(self.ablate),
                hint="name tapped layers only",
            )
        check_choice("readout.by", self.by, ("zero", "mean"))


class AblatedState(DraftState):
    """See `AblatedDraft`."""

    def __init__(self, pair: Pair, request: Request, width: int, readout: AblatedDraft) -> None:
        super().__init__(pair, request, width, DraftReadout(), waits=readout.by == "mean")
        places = [place for place, layer in enumerate(self.layer_ids) if layer in readout.ablate]
        self.places = torch.tensor(places, device=pair.target.device)  # [n] of the tapped layers
        shape = (len(request.lengths), 1, len(places), pair.target.hidden_size)
        self.means = torch.zeros(shape, dtype=pair.target.dtype, device=pair.target.device)  # [b, 1, n, H]

    def share(self, cache: PositionCache, block_size: int) -> None:
        return  # the proposals' cache was made from all layers

    def changed(self, states: Tensor, positions: Tensor) -> Tensor:
        means = self.means.expand(-1, states.shape[1], -1, -1)  # [b, S, n, H]
        return states.index_copy(2, self.places, means)

    def take_prompt(self, prompt: list[tuple[Tensor, Tensor]]) -> None:
        """The padding behind a row's prompt does not count."""
        lengths = torch.tensor(self.lengths, device=self.places.device)
        total, count = torch.zeros_like(wide(self.means)), torch.zeros_like(lengths)
        for states, positions in prompt:
            counts = positions < lengths[:, None] - 1  # [b, C]
            total += (wide(states[:, :, self.places]) * counts[..., None, None]).sum(1, keepdim=True)
            count += counts.sum(1)
        self.means = (total / count.clamp(min=1)[:, None, None, None]).to(self.means.dtype)
        for states, positions in prompt:
            self.blocks.extend(self.changed(states, positions).flatten(2), positions)

    def select(self, rows: Tensor) -> None:
        self.means = self.means[rows]
