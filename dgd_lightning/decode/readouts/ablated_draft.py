"""Layer ablation: the draft without some of its tapped layers, to see which of them it relies on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from dgd_lightning.checks import check_choice
from dgd_lightning.decode.call import Request
from dgd_lightning.decode.readouts.base import Readout, ReadoutState, TargetOutput, WrappedState, wide
from dgd_lightning.decode.readouts.draft import DraftReadout
from dgd_lightning.errors import InputError

if TYPE_CHECKING:
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
        lengths = torch.tensor(request.lengths, device=pair.target.device)
        return AblatedState(DraftReadout().begin(pair, request, width), self, lengths)

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


class AblatedState(WrappedState):
    """See `AblatedDraft`. With ``mean`` the prompt's states are kept until all of them have come."""

    def __init__(self, inner: ReadoutState, readout: AblatedDraft, lengths: Tensor) -> None:
        super().__init__(inner)
        self.layer_ids, self.lengths = tuple(readout.ablate), lengths  # [b]
        self.prompt: list[tuple[dict[int, Tensor], Tensor]] | None = [] if readout.by == "mean" else None
        self.means: dict[int, Tensor] = {}  # [b, 1, H] per layer; zeros where there is none

    def share(self, cache: PositionCache, block_size: int) -> None:
        return  # the proposals' cache was made from all layers

    def extend(self, taps: dict[int, Tensor], positions: Tensor) -> None:
        if self.prompt is not None:
            self.prompt.append((taps, positions))
            return
        changed = {
            layer: self.means[layer].expand_as(taps[layer]) if layer in self.means else torch.zeros_like(taps[layer])
            for layer in self.layer_ids
        }
        self.inner.extend({**taps, **changed}, positions)

    def ready(self) -> None:
        prompt, self.prompt = self.prompt or [], None
        for layer in self.layer_ids if prompt else ():
            self.means[layer] = self._mean([(taps[layer], positions) for taps, positions in prompt])
        for taps, positions in prompt:
            self.extend(taps, positions)
        self.inner.ready()

    def logits(self, out: TargetOutput) -> Tensor:
        return self.inner.logits(out)

    def _mean(self, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
        """[b, 1, H]; the padding behind a row's prompt does not count."""
        states, positions = (torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True))
        counts = (positions < self.lengths[:, None] - 1)[..., None]  # [b, S, 1]
        total = (wide(states) * counts).sum(1, keepdim=True)
        return (total / counts.sum(1, keepdim=True).clamp(min=1)).to(states.dtype)

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        rows = rows.to(self.lengths.device)
        self.lengths = self.lengths[rows]
        self.means = {layer: mean[rows] for layer, mean in self.means.items()}
