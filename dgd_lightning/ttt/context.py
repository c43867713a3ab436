"""One context as adaptation sees it: read once by the target; which blocks a step draws and which are held out."""

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


class ReadText(NamedTuple):
    """A text of L tokens as the target read it: the context, or what it wrote itself behind one.

    Of such a validation text only what the target read behind the context is kept, from position ``origin`` on.
    """

    ids: Tensor  # [1, L], from position 0
    features: Tensor  # [1, L − origin, F·H], of the draft's tapped layers
    states: Tensor  # [1, …, H], the target's last hidden states (after its final norm) from ``states_from`` on
    states_from: int = 0
    origin: int = 0
    first_anchor: int = 0  # of a validation text: where decoding would draft its first block

    @property
    def length(self) -> int:
        """L, tokens with the context."""
        return self.ids.shape[1]


class Blocks(NamedTuple):
    """Blocks of one forward and the span of text that they read."""

    anchors: Tensor  # [1, N]
    keep: Tensor  # [1, N]
    first: int  # the forward reads positions first … end − 1, and labels lie before ``end`` too
    end: int
    text: int = 0  # 0: the context; n: the n-th validation text


class Split(NamedTuple):
    """Labels in ``train_start … train_end − 1`` are trained on; anchors from ``train_end`` on are held out."""

    length: int
    train_end: int
    train_start: int = 0


def split_context(length: int, block_size: int, config: TTTConfig) -> Split:
    """Where the held-out span begins: it is the context's end, which is what decoding goes on from.

    Where validation texts are held out, nothing of the context is. Warns of a context that holds little more than a
    block; ``length`` counts its tokens before it is repeated.
    """
    if config.window is not None and config.window <= block_size:
        expected = f"more than a block of {block_size}, or null"
        raise InputError("ttt.window", expected=expected, received=config.window, hint="use e.g. 4096")
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
) -> ReadText:
    """Prefill the context [S], into ``cache`` or one that is gone afterwards.

    Features of all positions are kept, last hidden states only where labels need them.
    """
    target, draft = pair.target, pair.require_draft()
    ids = context_ids.to(target.device)[None]  # [1, S]
    layer_ids = (*draft.config.target_layer_ids, target.num_layers - 1)
    width = draft.config.num_features
    start = 0 if config.labels == "target" else max(0, split.train_end - 1)
    features = torch.empty(1, split.length, width, dtype=target.dtype, device=target.device)
    states = torch.empty(1, split.length - start, target.hidden_size, dtype=target.dtype, device=target.device)

    high = 0  # positions so far, known to the host

    def keep(chunk: Tensor, positions: Tensor) -> None:
        nonlocal high
        low, high = high, high + chunk.shape[1]
        features[:, low:high] = chunk[..., :width]
        if high > start:
            states[:, max(low, start) - start : high - start] = chunk[:, max(0, start - low) :, width:]

    cache = target.new_cache(1, split.length) if cache is None else cache
    target.prefill(ids, [split.length], cache, layer_ids=layer_ids, on_features=keep)
    return ReadText(ids, features, states, start)


def synchronise(device: torch.device) -> None:
    """Wait for a CUDA device, so that seconds are those of what was done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def draw_blocks(
    split: Split, config: TTTConfig, step: int, device: torch.device, trained: Sequence[ReadText] = ()
) -> Blocks:
    """The random blocks of a step: they depend on the seed, the step and the lengths of the texts alone.

    They lie in the context or, every other step, in one of the validation texts that are trained on.
    """
    generator = torch.Generator().manual_seed(mixed_seed(config.seed, step))
    number, first, end, length = 0, 0, split.train_end, split.length
    if trained and step % 2:
        number = 1 + int(torch.randint(len(trained), (1,), generator=generator))
        text = trained[number - 1]
        first, end, length, least = _first(text.first_anchor, config), text.length, text.length, text.first_anchor
    else:
        if config.window is not None and config.window < end:
            low = max(0, min(split.train_start, end - config.window))
            first = low + int(torch.randint(end - config.window - low + 1, (1,), generator=generator))
            end = first + config.window
        least = max(first + (first > 0), split.train_start)  # a window's first entry has nothing before it
    mask = torch.zeros(1, length, dtype=torch.bool)
    mask[:, least:end] = True
    anchors, keep = sample_anchors(mask, config.anchors_per_step, generator)
    return Blocks(anchors.to(device), keep.to(device), first, end, number)


def held_out_blocks(
    split: Split, config: TTTConfig, device: torch.device, texts: Sequence[ReadText] = (), trained: int = 0
) -> list[Blocks]:
    """Of each validation text a block at every position where decoding could draft one.

    Without such texts evenly spaced blocks of the context's held-out end, or none where nothing of it is held out.
    ``texts`` are numbered behind those that are trained on.
    """

    def blocks(anchors: Tensor, begin: int, end: int, number: int = 0) -> Blocks:
        anchors = anchors.long()[None].to(device)  # [1, N]
        return Blocks(anchors, torch.ones_like(anchors, dtype=torch.bool), _first(begin, config), end, number)

    if texts:
        return [
            blocks(torch.arange(text.first_anchor, text.length - 1), text.first_anchor, text.length, number)
            for number, text in enumerate(texts, 1 + trained)
        ]
    if split.train_end >= split.length:
        return []
    last = split.length - 2  # the last anchor that has a label
    count = min(config.holdout_anchors, last - split.train_end + 1)
    anchors = torch.linspace(split.train_end, last, count).round()
    return [blocks(anchors, split.train_end, split.length)]


def _first(begin: int, config: TTTConfig) -> int:
    """The first position that blocks from ``begin`` on read."""
    return 0 if config.window is None else max(0, begin - config.window)
