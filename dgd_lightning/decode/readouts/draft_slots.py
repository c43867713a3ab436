"""All slots of the draft's blocks along a given text, for diagnostics: guided decoding reads slot 1 only.

Slot j of the block anchored at p predicts the token at p + j without having seen the tokens between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dgd_lightning.decode.call import Request
from dgd_lightning.decode.readouts.base import ReadoutState, TargetOutput
from dgd_lightning.decode.readouts.draft import DraftReadout

if TYPE_CHECKING:
    from dgd_lightning.pair import Pair
    from dgd_lightning.target.cache import PositionCache


@dataclass(frozen=True)
class DraftSlots:
    """The draft at slots 1 … K − 1 of a block anchored at every position, for `replay`.

    Not a `Readout`: its logits have one axis more, and those of later slots belong to later tokens, so it can't be
    blended. Slot 1 is what `DraftReadout` gives.
    """

    def layers(self, pair: Pair) -> tuple[int, ...]:
        """Layers of the target whose outputs it needs.

        Raises:
            InputError: the pair has no draft.
        """
        return DraftReadout().layers(pair)

    def begin(self, pair: Pair, request: Request, width: int) -> SlotsState:
        """For one text that is read ``width`` tokens at a time."""
        return SlotsState(pair, request, width)


class SlotsState(ReadoutState):
    """See `DraftSlots`."""

    def __init__(self, pair: Pair, request: Request, width: int) -> None:
        assert pair.draft is not None, "layers() refuses a pair without a draft"
        self.target, self.draft = pair.target, pair.draft
        config = self.draft.config
        self.size, self.layer_ids = config.block_size, config.target_layer_ids
        self.cache = self.draft.new_cache(len(request.lengths), request.capacity(width))
        self.caches: Sequence[PositionCache] = [self.cache]
        masks = torch.full((self.size - 1,), config.mask_token_id, device=pair.target.device)
        self.masks = pair.target.embed(masks)  # [K − 1, H]

    def extend(self, taps: dict[int, Tensor], positions: Tensor) -> None:
        self.draft.extend(self.cache, torch.cat([taps[i] for i in self.layer_ids], dim=-1), positions)

    def logits(self, out: TargetOutput) -> Tensor:
        """[b, Q, K − 1, V]: entry j − 1 of a position predicts the j-th token after it."""
        rows, count = out.tokens.shape
        anchors = self.target.embed(out.tokens)[:, :, None]  # [b, Q, 1, H]
        blocks = torch.cat([anchors, self.masks.expand(rows, count, -1, -1)], dim=2).flatten(1, 2)  # [b, Q·K, H]
        hidden = self.draft.block(
            self.cache, blocks, out.positions, longest_anchor=out.longest, keep_cache=True
        )  # [b, Q·K, H]
        return self.target.lm_head(hidden.unflatten(1, (count, self.size))[:, :, 1:])
