"""The draft as a readout: slot 1 of a block anchored at every position. Also, its own null controls."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from dgd_lightning.checks import check_choice, check_integer
from dgd_lightning.decode.call import Request
from dgd_lightning.decode.drafter import check_draft
from dgd_lightning.decode.readouts.base import Readout, ReadoutState, TargetOutput
from dgd_lightning.draft.model import DFlashDraft
from dgd_lightning.errors import InputError
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
    """

    block_size: int | None = None
    features: Features = "own"
    seed: int = 0

    needs_draft = True

    def __post_init__(self) -> None:
        check_choice("readout.features", self.features, get_args(Features))
        check_integer("readout.block_size", self.block_size, least=2, optional=True, hint="leave it out")

    def layers(self, pair: Pair) -> tuple[int, ...]:
        return tuple(_draft(pair).config.target_layer_ids)

    def controls(self) -> Readout | None:
        return None if self.features == "own" else DraftReadout(self.block_size)

    def begin(self, pair: Pair, request: Request, width: int) -> ReadoutState:
        trained = _draft(pair).config.block_size
        size = trained if self.block_size is None else self.block_size
        check_integer("readout.block_size", size, least=2, most=trained, hint="leave it out for the trained size")
        return DraftState(pair, request, width, size, self)


class DraftState(ReadoutState):
    """See `DraftReadout`. It has a draft cache of its own unless the proposals' has the same in it."""

    drafts = 1

    def __init__(self, pair: Pair, request: Request, width: int, size: int, readout: DraftReadout) -> None:
        self.target, self.draft, self.size, self.readout = pair.target, _draft(pair), size, readout
        rows, room = len(request.lengths), request.capacity(width)
        self.cache = self.draft.new_cache(rows, room)
        self.caches = [self.cache]
        self.shared = 0  # K of the proposals whose cache it is
        self.lengths = request.lengths
        masks = torch.full((size - 1,), self.draft.config.mask_token_id, device=pair.target.device)
        self.masks = pair.target.embed(masks)  # [K − 1, H]
        self.prompt: list[tuple[Tensor, Tensor]] | None = [] if readout.features == "shuffled" else None
        if readout.features == "random":
            generator = torch.Generator().manual_seed(mixed_seed(readout.seed, 1))
            shape = (room, len(self.layer_ids), pair.target.hidden_size)
            self.noise = torch.randn(shape, generator=generator).to(pair.target.device, pair.target.dtype)

    @property
    def layer_ids(self) -> tuple[int, ...]:
        return tuple(self.draft.config.target_layer_ids)

    def share(self, cache: PositionCache, block_size: int) -> None:
        if self.readout.features == "own":
            self.cache, self.caches, self.shared = cache, [], block_size

    def extend(self, taps: dict[int, Tensor], positions: Tensor) -> None:
        if self.shared:
            return
        states = torch.stack([taps[i] for i in self.layer_ids], dim=2)  # [b, S, F, H]
        if self.readout.features == "random":
            noise = self.noise[positions]  # [b, S, F, H]
            states = noise * (states.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))
        if self.prompt is not None:
            self.prompt.append((states, positions))
            return
        self.draft.extend(self.cache, states.flatten(2), positions)

    def ready(self) -> None:
        if self.prompt is None:
            return
        prompt, self.prompt = self.prompt, None
        if not prompt:
            return
        states, at = (torch.cat(parts, dim=1) for parts in zip(*prompt, strict=True))  # [b, S, F, H], [b, S]
        count = max(self.lengths) - 1
        whole = states.new_zeros(len(states), count + 1, *states.shape[2:])  # by position; the last one is padding's
        whole.scatter_(1, at.clamp(max=count)[:, :, None, None].expand_as(states), states)
        positions = torch.arange(count, device=at.device).repeat(len(states), 1)  # [b, count]
        order = positions.clone()
        for row, length in enumerate(self.lengths):  # what is behind a row's prompt is padding
            generator = torch.Generator().manual_seed(mixed_seed(self.readout.seed, length - 1))
            order[row, : length - 1] = torch.randperm(length - 1, generator=generator).to(order.device)
        shuffled = whole.gather(1, order[:, :, None, None].expand(-1, -1, *states.shape[2:]))
        self.draft.extend(self.cache, shuffled.flatten(2), positions)

    def logits(self, out: TargetOutput) -> Tensor:
        known = out.proposed if self.size == self.shared else None  # the same block over the same context
        first = 0 if known is None else 1
        tokens, positions = out.tokens[:, first:], out.positions[:, first:]
        rows, count = tokens.shape
        anchors = self.target.embed(tokens)[:, :, None]  # [b, Q, 1, H]
        blocks = torch.cat([anchors, self.masks.expand(rows, count, -1, -1)], dim=2).flatten(1, 2)  # [b, Q·K, H]
        hidden = self.draft.block(
            self.cache, blocks, positions, longest_anchor=out.longest, keep_cache=True, slot=1
        )  # [b, Q, H]
        logits = self.target.lm_head(hidden)
        return logits if known is None else torch.cat([known[:, None], logits], dim=1)


def as_readout(readout: Readout | str) -> Readout:
    """``draft`` by name; anything else must be a readout.

    Raises:
        InputError: it is not.
    """
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
