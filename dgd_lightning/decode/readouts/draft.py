"""The draft as a readout: slot 1 of a block anchored at every position. Its null controls, its other slots.

Slot j of the block anchored at p predicts the token at p + j without having seen the tokens between.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from dgd_lightning.checks import check_choice, check_integer, check_number
from dgd_lightning.decode.call import Request
from dgd_lightning.decode.drafter import Blocks, check_block_size, check_draft
from dgd_lightning.decode.readouts.base import Readout, ReadoutState, TargetOutput, scaled
from dgd_lightning.draft.model import DFlashDraft
from dgd_lightning.errors import LEAVE_OUT, InputError
from dgd_lightning.pair import Pair
from dgd_lightning.seeds import mixed_seed
from dgd_lightning.target.cache import PositionCache

Features = Literal["own", "shuffled", "random"]


@dataclass(frozen=True)
class DraftReadout(Readout):
    """The draft at slot 1 of a block anchored at every position, over the context strictly before it.

    Args:
        block_size: slots of the readout's blocks, 2 … the trained size; None takes the trained one.
        features: what the draft is fed with: ``own``, or for null controls the prompt's features in a random order
            (``shuffled``), or random vectors, each layer's with the norm of the true one (``random``).
        seed: of the controls.
        scale: of the controls, factor on their difference from the target; ``model.match_controls`` finds the one with
            the effect of the draft's own features.
    """

    block_size: int | None = None
    features: Features = "own"
    seed: int = 0
    scale: float = 1.0

    needs_draft = True

    def __post_init__(self) -> None:
        check_choice("readout.features", self.features, get_args(Features))
        check_number("readout.scale", self.scale, above=0)
        if self.features == "own" and self.scale != 1:
            raise InputError(
                "readout.scale", expected="1 with features own", received=self.scale, hint="set beta for its strength"
            )
        check_integer("readout.block_size", self.block_size, least=2, optional=True, hint=LEAVE_OUT)

    def layers(self, pair: Pair) -> tuple[int, ...]:
        return tuple(_draft(pair).config.target_layer_ids)

    def controls(self) -> Readout | None:
        return None if self.features == "own" else DraftReadout(self.block_size)

    def begin(self, pair: Pair, request: Request, width: int) -> ReadoutState:
        return scaled(DraftState(pair, request, width, self), self.scale)


class DraftState(ReadoutState):
    """See `DraftReadout`. It has a draft cache of its own unless the proposals' has the same in it.

    With ``waits`` the prompt's states are kept until all of them have come.
    """

    drafts = 1

    def __init__(
        self, pair: Pair, request: Request, width: int, readout: DraftReadout, *, waits: bool | None = None
    ) -> None:
        draft, room = _draft(pair), request.capacity(width)
        self.readout, self.lengths = readout, request.lengths
        self.layer_ids = tuple(draft.config.target_layer_ids)
        size = check_block_size(pair, readout.block_size, "readout.block_size")
        self.blocks = Blocks(pair.target, draft, draft.new_cache(len(request.lengths), room), size)
        self.caches: Sequence[PositionCache] = [self.blocks.cache]
        self.shared = 0  # K of the proposals whose cache it is
        waits = readout.features == "shuffled" if waits is None else waits
        self.prompt: list[tuple[Tensor, Tensor]] | None = [] if waits else None
        if readout.features == "random":
            generator = torch.Generator().manual_seed(mixed_seed(readout.seed, 1))
            shape = (room, len(self.layer_ids), pair.target.hidden_size)
            self.noise = torch.randn(shape, generator=generator).to(pair.target.device, pair.target.dtype)

    def share(self, cache: PositionCache, block_size: int) -> None:
        if self.readout.features == "own":
            self.blocks.cache, self.caches, self.shared = cache, [], block_size

    def extend(self, taps: dict[int, Tensor], positions: Tensor) -> None:
        if self.shared:
            return
        states = torch.stack([taps[i] for i in self.layer_ids], dim=2)  # [b, S, F, H]
        if self.prompt is None:
            self.blocks.extend(self.changed(states, positions).flatten(2), positions)
        else:
            self.prompt.append((states, positions))

    def changed(self, states: Tensor, positions: Tensor) -> Tensor:
        """What the draft is fed with in place of states [b, S, F, H]."""
        if self.readout.features != "random":
            return states
        noise = self.noise[positions]  # [b, S, F, H]
        return noise * (states.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))

    def ready(self) -> None:
        prompt, self.prompt = self.prompt, None
        if prompt:
            self.take_prompt(prompt)

    def take_prompt(self, prompt: list[tuple[Tensor, Tensor]]) -> None:
        """Take up the whole prompt's states, chunks of [b, C, F, H] at positions [b, C], in a random order."""
        states, positions = (torch.cat(parts, dim=1) for parts in zip(*prompt, strict=True))
        count = max(self.lengths) - 1
        whole = states.new_zeros(len(states), count + 1, *states.shape[2:])  # by position; the last one is padding's
        whole.scatter_(1, positions.clamp(max=count)[:, :, None, None].expand_as(states), states)
        order = torch.arange(count, device=positions.device).repeat(len(states), 1)  # [b, count]
        positions = order.clone()
        for row, length in enumerate(self.lengths):  # what is behind a row's prompt is padding
            generator = torch.Generator().manual_seed(mixed_seed(self.readout.seed, length - 1))
            order[row, : length - 1] = torch.randperm(length - 1, generator=generator).to(order.device)
        shuffled = whole.gather(1, order[:, :, None, None].expand(-1, -1, *states.shape[2:]))
        self.blocks.extend(shuffled.flatten(2), positions)

    def logits(self, out: TargetOutput) -> Tensor:
        known = out.proposed if self.blocks.size == self.shared else None  # the same block over the same context
        first = 0 if known is None else 1
        tokens, positions = out.tokens[:, first:], out.positions[:, first:]
        hidden = self.blocks.hidden(tokens, positions, out.longest, keep_cache=True, slot=1)  # [b, Q, H]
        logits = self.blocks.target.lm_head(hidden)
        return logits if known is None else torch.cat([known[:, None], logits], dim=1)


@dataclass(frozen=True)
class Imitation(Readout):
    """A null control: what is like another readout in one respect, and knows nothing of what it knows."""

    like: Readout = field(default_factory=DraftReadout)

    def layers(self, pair: Pair) -> tuple[int, ...]:
        return self.like.layers(pair)

    def controls(self) -> Readout | None:
        return self.like


@dataclass(frozen=True)
class DraftSlots:
    """The draft at slots 1 … K − 1 of a block anchored at every position, for `replay`.

    Not a `Readout`: its logits have one axis more, and those of later slots belong to later tokens, so it can't be
    blended. Slot 1 is what `DraftReadout` gives.
    """

    def layers(self, pair: Pair) -> tuple[int, ...]:
        """Layers of the target whose outputs it needs."""
        return DraftReadout().layers(pair)

    def begin(self, pair: Pair, request: Request, width: int) -> ReadoutState:
        """For one text that is read ``width`` tokens at a time."""
        return SlotsState(pair, request, width, DraftReadout())


class SlotsState(DraftState):
    """See `DraftSlots`."""

    def logits(self, out: TargetOutput) -> Tensor:
        """[b, Q, K − 1, V]: entry j − 1 of a position predicts the j-th token after it."""
        hidden = self.blocks.hidden(out.tokens, out.positions, out.longest, keep_cache=True)  # [b, Q·K, H]
        return self.blocks.target.lm_head(hidden.unflatten(1, (-1, self.blocks.size))[:, :, 1:])


def as_readout(readout: Readout | str) -> Readout:
    """``draft`` by name; anything else must be a readout."""
    if isinstance(readout, str) and readout == "draft":
        return DraftReadout()
    if isinstance(readout, str | type) or not hasattr(readout, "begin") or not hasattr(readout, "layers"):
        raise InputError("readout", expected="draft, or a Readout", received=repr(readout), hint="see docs/readouts.md")
    return readout


def _draft(pair: Pair) -> DFlashDraft:
    if pair.draft is None:
        raise InputError(
            "readout", expected="a pair with a draft", received="a target alone", hint="give load_pair a draft"
        )
    return check_draft(pair)
