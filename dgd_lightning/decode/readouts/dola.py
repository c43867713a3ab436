"""DoLa's layer as a readout: the one that differs most from the last."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dgd_lightning.decode.call import Request
from dgd_lightning.decode.readouts.base import Readout, ReadoutState, Stateless, TargetOutput, check_layer, lens
from dgd_lightning.distributions import js_divergence, wide
from dgd_lightning.errors import InputError
from dgd_lightning.pair import Pair
from dgd_lightning.target.model import Target


@dataclass(frozen=True)
class DoLa(Readout):
    """The layer that differs most from the last one, by JS divergence, chosen at every position.

    With β < 0 this contrasts the last layer with it (Chuang et al. 2024, arXiv 2309.03883, without its constraint: see
    ``plausibility``).

    Args:
        layer_ids: layers to choose from.
    """

    layer_ids: Sequence[int]

    def layers(self, pair: Pair) -> tuple[int, ...]:
        if not isinstance(self.layer_ids, Sequence) or not self.layer_ids:
            raise InputError(
                "readout.layer_ids", expected="layers", received=repr(self.layer_ids), hint="name one at least"
            )
        return tuple(check_layer(pair.target, layer, "readout.layer_ids") for layer in self.layer_ids)

    def begin(self, pair: Pair, request: Request, width: int) -> ReadoutState:
        return Stateless(lambda out: self.read(pair.target, out))

    def read(self, target: Target, out: TargetOutput) -> Tensor:
        """[b, Q, V], of the layer that is furthest at each position."""
        final = wide(out.logits).log_softmax(-1)
        best, furthest = out.logits, torch.full_like(final[..., 0], -1.0)
        for layer in self.layer_ids:
            early = lens(target, out.taps[layer], layer, norm=True)
            # A layer that is no number is furthest: it must not hide behind another one.
            distance = js_divergence(final, wide(early).log_softmax(-1)).nan_to_num(nan=math.inf)  # [b, Q]
            best = torch.where((distance > furthest)[..., None], early, best)
            furthest = torch.maximum(distance, furthest)
        return best
