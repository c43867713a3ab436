"""Readouts: second sets of logits, made from what the target has computed, position by position or a block at a time.

A readout is a small frozen description; ``begin`` gives a `ReadoutState`, which holds what it needs for one batch. A
user's own is a class with the same two methods, named by its class path. Each position's logits may depend on the
tokens and
states at and before it only: then a block gives what token by token gives.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dgd_lightning.decode.call import Request, check_prompt
from dgd_lightning.decode.drafter import check_draft
from dgd_lightning.distributions import js_divergence
from dgd_lightning.draft.model import DFlashDraft
from dgd_lightning.errors import InputError
from dgd_lightning.pair import Pair
from dgd_lightning.seeds import mixed_seed
from dgd_lightning.target.cache import PositionCache
from dgd_lightning.target.model import Target


class TargetOutput(NamedTuple):
    """What the target has just read: Q positions of every row."""

    tokens: Tensor  # [b, Q]
    positions: Tensor  # [b, Q]
    logits: Tensor  # [b, Q, V], the target's own
    taps: dict[int, Tensor]  # per tapped layer, [b, Q, H]
    longest: int  # host-known, at least the largest position
    proposed: Tensor | None = None  # [b, V], slot 1 of the proposals' blocks, which are anchored at the first position


class ReadoutState(ABC):
    """A readout at work on one batch. Only `logits` must be written; what keeps nothing needs no more."""

    caches: Sequence[PositionCache] = ()  # of its own: their rows are selected as its own are
    drafts = 0  # forwards of the draft per forward of the target

    def extend(self, taps: dict[int, Tensor], positions: Tensor) -> None:  # noqa: B027
        """Take up states [b, S, H] at positions [b, S]: of prompts, chunk by chunk; of every forward before its logits.

        Rejected positions come too: they lie beyond the row's end, and come again. Of prompts every position comes
        once; what comes at or beyond a prompt's last token is padding.
        """

    def ready(self) -> None:  # noqa: B027
        """The prompts, all but their last tokens, are read."""

    def share(self, cache: PositionCache, block_size: int) -> None:  # noqa: B027
        """The proposals' draft cache, of the same rows and fed with the target's features: it may be read.

        ``block_size``: K of the proposals.
        """

    @abstractmethod
    def logits(self, out: TargetOutput) -> Tensor:
        """[b, Q, V]: for the token after each position."""
        ...

    def select(self, rows: Tensor) -> None:  # noqa: B027
        """Have these rows [r], in this order; a row may come several times (``caches`` are selected by the caller)."""


class Readout(ABC):
    """What the target is blended with."""

    needs_draft = False  # whether the pair must have one

    @abstractmethod
    def layers(self, pair: Pair) -> tuple[int, ...]:
        """Layers of the target whose outputs it needs."""
        ...

    @abstractmethod
    def begin(self, pair: Pair, request: Request, width: int) -> ReadoutState:
        """For one batch whose cycles read ``width`` tokens.

        Raises:
            InputError: the pair or the request can't serve it.
        """
        ...

    def controls(self) -> Readout | None:
        """The readout whose null control it is; None for one that means what it says."""
        return None


# The draft.

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

    def layers(self, pair: Pair) -> tuple[int, ...]:
        return tuple(_draft(pair).config.target_layer_ids)

    def controls(self) -> Readout | None:
        return None if self.features == "own" else DraftReadout(self.block_size)

    def begin(self, pair: Pair, request: Request, width: int) -> ReadoutState:
        if self.features not in ("own", "shuffled", "random"):
            raise InputError(
                "readout.features", expected="own, shuffled or random", received=repr(self.features), hint="use own"
            )
        trained = _draft(pair).config.block_size
        size = trained if self.block_size is None else self.block_size
        if isinstance(size, bool) or not isinstance(size, int) or not 2 <= size <= trained:
            raise InputError(
                "readout.block_size",
                expected=f"an integer from 2 to {trained}, the size the draft was trained with",
                received=repr(self.block_size),
                hint="leave it out",
            )
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
        for row, length in enumerate(self.lengths):  # what stands behind a row's prompt is padding
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


# Layers of the target.


@dataclass(frozen=True)
class LogitLens(Readout):
    """One intermediate layer read through the final norm and the head.

    Args:
        layer: 0-based; its output is transformers' ``hidden_states[layer + 1]``.
        norm: False reads it raw.
    """

    layer: int
    norm: bool = True

    def layers(self, pair: Pair) -> tuple[int, ...]:
        return (_layer(pair.target, self.layer),)

    def begin(self, pair: Pair, request: Request, width: int) -> ReadoutState:
        return LensState(pair.target, self)


class LensState(ReadoutState):
    """See `LogitLens`."""

    def __init__(self, target: Target, readout: LogitLens) -> None:
        self.target, self.readout = target, readout

    def logits(self, out: TargetOutput) -> Tensor:
        return lens(self.target, out.taps[self.readout.layer], self.readout.layer, norm=self.readout.norm)


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
        return tuple(_layer(pair.target, layer, "readout.layer_ids") for layer in self.layer_ids)

    def begin(self, pair: Pair, request: Request, width: int) -> ReadoutState:
        return DoLaState(pair.target, self)


class DoLaState(ReadoutState):
    """See `DoLa`."""

    def __init__(self, target: Target, readout: DoLa) -> None:
        self.target, self.readout = target, readout

    def logits(self, out: TargetOutput) -> Tensor:
        final = wide(out.logits).log_softmax(-1)
        best, furthest = out.logits, torch.full_like(final[..., 0], -1.0)
        for layer in self.readout.layer_ids:
            early = lens(self.target, out.taps[layer], layer, norm=True)
            distance = js_divergence(final, wide(early).log_softmax(-1))  # [b, Q]
            best = torch.where((distance > furthest)[..., None], early, best)
            furthest = torch.maximum(distance, furthest)
        return best


# Other models and other prompts.


@dataclass(frozen=True)
class OtherModel(Readout):
    """A second causal LM with the same vocabulary, reading the same tokens; β < 0 is contrastive decoding.

    Args:
        model: loaded by `load_target`; an arm of a run names a folder, a Hub id or ``lab`` instead, and the run loads
            it once, with the target's dtype, on its device.
        revision: Hub revision of a model that is named: branch, tag or commit.
    """

    model: Target | str
    revision: str | None = None

    def layers(self, pair: Pair) -> tuple[int, ...]:
        return ()

    def begin(self, pair: Pair, request: Request, width: int) -> ReadoutState:
        if isinstance(self.model, str):
            raise InputError(
                "readout.model",
                expected="a loaded model",
                received=repr(self.model),
                hint=f"give load_target({self.model!r}); names are for the arms of dgd predict",
            )
        if self.model.vocab_size != pair.target.vocab_size:
            raise InputError(
                "readout.model",
                expected=f"the target's vocabulary of {pair.target.vocab_size} tokens",
                received=self.model.vocab_size,
                hint="use a model of the same family",
            )
        return PromptState(self.model, request, width, request.ids, request.lengths)


@dataclass(frozen=True)
class WithoutContext(Readout):
    """The target on the same answer behind a prompt without the context; β = −α is context-aware decoding (CAD).

    Args:
        prompts: [S'] each, one per prompt of the batch (Shi et al. 2024, arXiv 2305.14739). An arm of a run names none:
            the run makes them from its tasks (`data.without_context` says how).
    """

    prompts: Sequence[Tensor] = field(default_factory=tuple)

    def layers(self, pair: Pair) -> tuple[int, ...]:
        return ()

    def begin(self, pair: Pair, request: Request, width: int) -> ReadoutState:
        if isinstance(self.prompts, Tensor) or len(self.prompts) != len(request.lengths):
            raise InputError(
                "readout.prompts",
                expected=f"{len(request.lengths)} prompts without their contexts, in a list",
                received=len(self.prompts),
                hint="give what is left of each prompt when its context is taken out",
            )
        vocab = pair.target.vocab_size
        rows = [check_prompt(f"readout.prompts[{i}]", prompt, vocab) for i, prompt in enumerate(self.prompts)]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return PromptState(pair.target, request, width, ids, [len(row) for row in rows])


class PromptState(ReadoutState):
    """A causal LM behind prompts of its own, which reads what the batch decodes."""

    def __init__(self, model: Target, request: Request, width: int, ids: Tensor, lengths: list[int]) -> None:
        self.model, self.ids, self.lengths = model, ids.to(model.device), lengths
        room = max(lengths) + request.max_new_tokens + width
        if room - width > model.max_positions:
            raise InputError(
                "readout",
                expected=f"prompts that leave {request.max_new_tokens} of the model's {model.max_positions} positions",
                received=f"{max(lengths)} tokens",
                hint="shorten them, or lower max_new_tokens",
            )
        self.cache = model.new_cache(len(lengths), room)
        self.caches = [self.cache]
        ours = torch.tensor(lengths, device=model.device)
        self.shift = torch.tensor(request.lengths, device=model.device) - ours  # [b], the target's position less ours
        self.most = max(own - theirs for own, theirs in zip(lengths, request.lengths, strict=True))
        self.ends = ours - 1  # [b] position of each prompt's last token,
        self.last = self.ids.gather(1, self.ends[:, None])  # [b, 1] which need not be the batch's own

    def ready(self) -> None:
        if (longest := max(self.lengths)) > 1:  # the last token of each prompt comes with the first forward
            known = torch.tensor([max(length - 1, 1) for length in self.lengths])
            self.model.prefill(self.ids[:, : longest - 1], known, self.cache)

    def logits(self, out: TargetOutput) -> Tensor:
        positions = out.positions.to(self.shift.device) - self.shift[:, None]
        tokens = torch.where(positions == self.ends[:, None], self.last, out.tokens.to(self.shift.device))
        longest = out.longest + 1 + self.most  # at least every position of ours
        step = self.model.step(tokens, positions, self.cache, max_length=min(longest, self.cache.capacity))
        return step.logits.to(out.logits.device)

    def select(self, rows: Tensor) -> None:
        rows = rows.to(self.shift.device)
        self.shift, self.ends, self.last = self.shift[rows], self.ends[rows], self.last[rows]


def as_readout(readout: Readout | str) -> Readout:
    """``draft`` by name; anything else must be a readout.

    Raises:
        InputError: it is not.
    """
    if isinstance(readout, str) and readout == "draft":
        return DraftReadout()
    if isinstance(readout, str | type) or not hasattr(readout, "begin") or not hasattr(readout, "layers"):
        raise InputError(
            "readout", expected="draft, or a Readout", received=repr(readout), hint="see dgd_lightning.decode.readouts"
        )
    return readout


def split_taps(features: Tensor | None, layer_ids: Sequence[int]) -> dict[int, Tensor]:
    """Features [b, Q, F·H] of these layers, by layer; nothing where no layer is tapped."""
    if not layer_ids:
        return {}
    assert features is not None
    return dict(zip(layer_ids, features.chunk(len(layer_ids), dim=-1), strict=True))


def lens(target: Target, states: Tensor, layer: int, *, norm: bool) -> Tensor:
    """Logits of a layer's output [.., H] -> [.., V]; the last layer's has the final norm behind it already."""
    if norm and layer != target.num_layers - 1:
        states = target.final_norm(states)
    return target.lm_head(states)


def wide(logits: Tensor) -> Tensor:
    """fp32 or wider."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _draft(pair: Pair) -> DFlashDraft:
    if pair.draft is None:
        raise InputError(
            "readout", expected="a pair with a draft", received="a target alone", hint="give load_pair a draft"
        )
    return check_draft(pair)


def _layer(target: Target, layer: int, name: str = "readout.layer") -> int:
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < target.num_layers:
        raise InputError(
            name,
            expected=f"a layer within 0…{target.num_layers - 1}",
            received=repr(layer),
            hint="name one of the target's layers",
        )
    return layer
