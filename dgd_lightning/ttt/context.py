"""One context as adaptation sees it: read once by the target; which blocks a step draws and which are held out."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dgd_lightning.draft.objective import sample_anchors
from dgd_lightning.errors import ContextError, InputError
from dgd_lightning.pair import Pair
from dgd_lightning.seeds import mixed_seed
from dgd_lightning.target.cache import PositionCache
from dgd_lightning.ttt.config import TTTConfig

FEW_BLOCKS = 4  # to train on: with fewer of them, blocks are nearly all the same


class ReadContext(NamedTuple):
    """What one prefill of the target leaves for all steps."""

    ids: Tensor  # [1, S]
    features: Tensor  # [1, S, F·H], of the draft's tapped layers
    states: Tensor  # [1, S − start, H], the target's last hidden states (after its final norm) from ``start`` on
    start: int
    seconds: float


class ValidationText(NamedTuple):
    """What the target wrote itself behind the context, and how it read it; the context ends at ``origin``."""

    ids: Tensor  # [1, L], context included
    origin: int
    first_anchor: int  # where decoding would draft its first block
    features: Tensor  # [1, L − origin, F·H]
    states: Tensor  # [1, L − origin, H]

    @property
    def length(self) -> int:
        """L, tokens with the context."""
        return self.ids.shape[1]


class Blocks(NamedTuple):
    """Blocks of one forward and the span of text that they read."""

    anchors: Tensor  # [1, N]
    keep: Tensor  # [1, N]
    first: int  # the forward reads positions first … end − 1
    end: int
    label_end: int  # labels are at positions before it
    text: int = 0  # 0: the context; n: the n-th validation text


class Split(NamedTuple):
    """Labels in ``train_start … train_end − 1`` are trained on; anchors from ``train_end`` on are held out."""

    length: int
    train_end: int
    train_start: int = 0


def split_context(length: int, block_size: int, config: TTTConfig) -> Split:
    """Where the held-out span begins: it is the context's end, which is what decoding goes on from.

    Where validation texts are held out, nothing of the context is. Warns of a context that holds little more than a
    block.

    Args:
        length: tokens of the context, before it is repeated.

    Raises:
        InputError: a window that holds no block.
        ContextError: the context does not hold a block to train on and the held-out span.
    """
    if config.window is not None and config.window <= block_size:
        raise InputError(
            "ttt.window",
            expected=f"more than a block of {block_size}, or null",
            received=config.window,
            hint="use e.g. 4096",
        )
    spanned = config.holdout > 0 and config.validation_texts == 0
    held_out = max(block_size, round(length * config.holdout)) if spanned else 0
    least = block_size + 1 + held_out
    if length < least:
        raise ContextError(
            "context_ids",
            expected=f"a context of at least {least} tokens: one, a block of {block_size}"
            + f", {held_out} held out" * (held_out > 0),
            received=length,
            hint="leave short contexts unadapted" + (", or set ttt.holdout to 0" if held_out else ""),
        )
    if length - held_out < FEW_BLOCKS * block_size and config.steps > 0:
        warnings.warn(
            f"the context has {length - held_out} tokens to train on, fewer than {FEW_BLOCKS} blocks of {block_size}: "
            "an adapter can hardly learn from it",
            stacklevel=3,
        )
    total = length * config.repeats
    return Split(total, total - held_out, total - length)


@torch.no_grad()
def read_context(
    pair: Pair, context_ids: Tensor, config: TTTConfig, split: Split, cache: PositionCache | None = None
) -> ReadContext:
    """Prefill the context; features of all positions are kept, last hidden states only where labels need them.

    Args:
        context_ids: [S].
        cache: to read it into; None makes one, and it is gone afterwards.
    """
    target, draft = pair.target, pair.require_draft()
    synchronise(target.device)
    began = time.perf_counter()
    ids = context_ids.to(target.device)[None]  # [1, S]
    layer_ids = (*draft.config.target_layer_ids, target.num_layers - 1)
    width = draft.config.num_features
    start = 0 if config.labels == "target" else max(0, split.train_end - 1)
    features = torch.empty(1, split.length, width, dtype=target.dtype, device=target.device)
    states = torch.empty(1, split.length - start, target.hidden_size, dtype=target.dtype, device=target.device)

    seen = 0  # positions so far, known to the host

    def keep(chunk: Tensor, positions: Tensor) -> None:
        nonlocal seen
        low, high = seen, seen + chunk.shape[1]
        seen = high
        features[:, low:high] = chunk[..., :width]
        if high > start:
            states[:, max(low, start) - start : high - start] = chunk[:, max(0, start - low) :, width:]

    cache = target.new_cache(1, split.length) if cache is None else cache
    target.prefill(ids, [split.length], cache, layer_ids=layer_ids, on_features=keep)
    synchronise(target.device)
    return ReadContext(ids, features, states, start, time.perf_counter() - began)


def synchronise(device: torch.device) -> None:
    """Wait for a CUDA device, so that seconds are those of what was done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def draw_blocks(
    split: Split, config: TTTConfig, step: int, device: torch.device, validation_texts: Sequence[ValidationText] = ()
) -> Blocks:
    """The random blocks of a step: they depend on the seed, the step and the lengths of the texts alone.

    Args:
        validation_texts: trained on too: a step draws its blocks from the context or, every other time, from one of
            them.
    """
    generator = torch.Generator().manual_seed(mixed_seed(config.seed, step))
    if validation_texts and step % 2:
        number = int(torch.randint(len(validation_texts), (1,), generator=generator))
        return _validation_blocks(validation_texts[number], number + 1, config, device, generator)
    first, end = 0, split.train_end
    if config.window is not None and config.window < end:
        low = max(0, min(split.train_start, end - config.window))
        first = low + int(torch.randint(end - config.window - low + 1, (1,), generator=generator))
        end = first + config.window
    mask = torch.zeros(1, split.length, dtype=torch.bool)
    mask[:, max(first + (first > 0), split.train_start) : end] = True  # a window's first entry has nothing before it
    anchors, keep = sample_anchors(mask, config.anchors_per_step, generator)
    return Blocks(anchors.to(device), keep.to(device), first, end, end)


def _validation_blocks(
    text: ValidationText, number: int, config: TTTConfig, device: torch.device, generator: torch.Generator
) -> Blocks:
    mask = torch.zeros(1, text.length, dtype=torch.bool)
    mask[:, text.first_anchor :] = True
    anchors, keep = sample_anchors(mask, config.anchors_per_step, generator)
    return Blocks(anchors.to(device), keep.to(device), _first(text, config), text.length, text.length, number)


def _first(text: ValidationText, config: TTTConfig) -> int:
    """The first position that the blocks of a validation text read."""
    return 0 if config.window is None else max(0, text.first_anchor - config.window)


def held_out_text(text: ValidationText, number: int, config: TTTConfig, device: torch.device) -> Blocks:
    """A block at every position where decoding could draft one; ``number`` counts validation texts from 1."""
    anchors = torch.arange(text.first_anchor, text.length - 1, device=device)[None]  # [1, N]
    return Blocks(
        anchors, torch.ones_like(anchors, dtype=torch.bool), _first(text, config), text.length, text.length, number
    )


def held_out_span(split: Split, config: TTTConfig, device: torch.device) -> Blocks | None:
    """Evenly spaced blocks of the context's held-out end; None where nothing of it is held out."""
    last = split.length - 2  # the last anchor that has a label
    if split.train_end >= split.length:
        return None
    count = min(config.holdout_anchors, last - split.train_end + 1)
    anchors = torch.linspace(split.train_end, last, count).round().long()[None].to(device)  # [1, N]
    first = 0 if config.window is None else max(0, split.train_end - config.window)
    return Blocks(anchors, torch.ones_like(anchors, dtype=torch.bool), first, split.length, split.length)
