"""How blocks attend to the context and themselves: by groups, by tiles, by FlexAttention, or under one dense mask."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache as memoise
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._triton import has_triton

from dgd_lightning.checks import check_choice
from dgd_lightning.draft.masks import multi_anchor_mask, multi_anchor_mask_mod
from dgd_lightning.draft.tiles import attend_in_tiles, plan_of
from dgd_lightning.errors import InputError

Attention = Literal["sdpa", "tiles", "flex", "dense"]
Wanted = Literal["auto", "sdpa", "tiles", "flex", "dense"]
KeysValues = tuple[Tensor, Tensor]  # [B, kv heads, S, D] each
Mix = Callable[[Tensor, KeysValues, KeysValues], Tensor]  # queries, the context's, the blocks' -> [B, heads, N·K, D]
FOLD_QUERIES = 64  # up to here query groups are folded into the query axis, so that keys need not be repeated
GROUP_BLOCKS = 16  # blocks that attend together: more of them read more that lies behind their anchors


class Group(NamedTuple):
    """Neighbouring blocks, and all that they may look at."""

    rows: slice  # of the N·K slots
    limit: int  # no block of the group sees the context from here on
    bias: Tensor  # [B, 1, g·rows, limit + rows], 0 or −∞; g query heads share a key head


def choose_attention(wanted: Wanted, device: torch.device, argument: str = "attention") -> Attention:
    """The kind that ``auto`` means on a device, or the one that was asked for, if it works there.

    On CUDA FlexAttention, which PyTorch compiles by Triton; where there is none, ``sdpa`` with a warning: it needs no
    compiler, and its memory grows with the context alike. By tiles on a CPU, ``sdpa`` elsewhere.

    Args:
        wanted: see :func:`mix_of`.
        device: of the draft.
        argument: what the user calls it.

    Raises:
        InputError: an unknown word, or ``flex`` off CUDA.
    """
    check_choice(argument, wanted, ("auto", "sdpa", "tiles", "flex", "dense"))
    if wanted == "flex" and device.type != "cuda":
        raise InputError(
            argument,
            expected="'sdpa', 'tiles', or 'flex' on a CUDA device",
            received=f"{wanted!r} on {device.type}",
            hint=f"use {argument}='sdpa'",
        )
    if wanted != "auto":
        return wanted
    if device.type == "cuda" and not has_triton():
        warnings.warn("FlexAttention needs Triton, which does not work here: attention sdpa instead", stacklevel=2)
        return "sdpa"
    return {"cuda": "flex", "cpu": "tiles"}.get(device.type, "sdpa")  # type: ignore[return-value]


def mix_of(
    attention: Wanted,
    anchors: Tensor,
    context_length: int,
    block_size: int,
    keep: Tensor | None,
    *,
    heads: int,
    kv_heads: int,
    dtype: torch.dtype,
) -> Mix:
    """Attention of N blocks over ``[context ; own block]``, its masks made once for all layers.

    Args:
        attention: ``sdpa``: blocks group by group, which read no keys behind the last anchor of their group; ``tiles``:
            keys tile by tile, the fastest on a CPU where the context is long; ``flex``: FlexAttention, CUDA; ``dense``:
            all of them under one mask, the oracle of the others; ``auto``: see :func:`choose_attention`.
        anchors: [B, N], in the order of the blocks; ascending ones make ``sdpa`` fast.
        context_length: S.
        block_size: K.
        keep: [B, N] boolean, or None for all.
        heads, kv_heads: query heads and key heads.
        dtype: of the masks.

    Raises:
        InputError: unknown ``attention``, or ``flex`` off CUDA.
    """
    attention = choose_attention(attention, anchors.device)
    if attention == "sdpa":
        groups = groups_of(anchors, context_length, block_size, keep, query_groups=heads // kv_heads, dtype=dtype)
        return partial(attend_in_groups, groups=groups)
    if attention == "tiles":
        limits = _limits(anchors, keep, context_length).tolist()
        rows = heads // kv_heads * block_size
        return partial(attend_in_tiles, plans=[plan_of(row, kv_heads, rows, anchors.device) for row in limits])
    if attention == "dense":
        mask = multi_anchor_mask(anchors, context_length, block_size, keep)
        return lambda queries, context, own: attend(queries, *_joined(context, own), mask)
    rule = _block_mask(anchors, context_length, block_size, keep)
    return lambda queries, context, own: _flex(queries, *_joined(context, own), rule)


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Grouped-query attention under a boolean mask shared by the heads.

    Args:
        queries: [B, heads, Q, D].
        keys, values: [B, kv heads, L, D].
        mask: [B, 1, Q, L], True where attention is allowed.

    Returns:
        [B, heads, Q, D].
    """
    queries = queries.to(values.dtype)
    batch, heads, length, width = queries.shape
    groups = heads // keys.shape[1]
    if groups > 1 and length <= FOLD_QUERIES:
        folded = queries.reshape(batch, -1, groups * length, width)  # [B, kv heads, g·Q, D]
        mixed = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask.repeat(1, 1, groups, 1))
        return mixed.reshape(batch, heads, length, width)
    keys, values = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (keys, values))
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)


def groups_of(
    anchors: Tensor,
    context_length: int,
    block_size: int,
    keep: Tensor | None,
    *,
    query_groups: int,
    dtype: torch.dtype,
) -> list[Group]:
    """Blocks, ``GROUP_BLOCKS`` at a time, with the part of the context that they see; see :func:`mix_of`."""
    limits = [int(part) for part in _largest(_limits(anchors, keep, context_length)).tolist()]
    groups = []
    for number, limit in enumerate(limits):
        part = slice(number * GROUP_BLOCKS, min((number + 1) * GROUP_BLOCKS, anchors.shape[1]))
        mask = multi_anchor_mask(anchors[:, part], limit, block_size, None if keep is None else keep[:, part])
        bias = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))
        rows = slice(part.start * block_size, part.stop * block_size)
        groups.append(Group(rows, limit, bias.repeat(1, 1, query_groups, 1)))
    return groups


def attend_in_groups(queries: Tensor, context: KeysValues, own: KeysValues, groups: Sequence[Group]) -> Tensor:
    """What :func:`attend` gives under the whole mask, without what lies behind a group's anchors.

    Args:
        queries: [B, heads, N·K, D].
        context: keys and values of positions 0…S−1.
        own: those of the blocks' slots, [B, kv heads, N·K, D] each.
        groups: from :func:`groups_of`.

    Returns:
        [B, heads, N·K, D].
    """
    parts = []
    for rows, limit, bias in groups:
        keys, values = (torch.cat([x[:, :, :limit], y[:, :, rows]], 2) for x, y in zip(context, own, strict=True))
        some = queries[:, :, rows].to(values.dtype)
        folded = some.reshape(*keys.shape[:2], -1, some.shape[-1])  # [B, kv heads, g·rows, D]
        mixed = F.scaled_dot_product_attention(folded, keys, values, attn_mask=bias.to(values.dtype))
        parts.append(mixed.reshape(some.shape))
    return torch.cat(parts, dim=2)


def _limits(anchors: Tensor, keep: Tensor | None, context_length: int) -> Tensor:
    """How many of the S positions each block sees, [B, N]."""
    seen = anchors if keep is None else torch.where(keep, anchors, 0)
    return seen.clamp(0, context_length)


def _largest(seen: Tensor) -> Tensor:
    """The largest number of each group of columns: [B, N] -> [groups]."""
    return torch.stack([part.amax() for part in seen.split(GROUP_BLOCKS, dim=1)])


def _joined(context: KeysValues, own: KeysValues) -> KeysValues:
    """[B, kv heads, S + N·K, D] each."""
    return torch.cat([context[0], own[0]], dim=2), torch.cat([context[1], own[1]], dim=2)


@memoise
def _compiled(name: str) -> Any:
    """FlexAttention's functions, compiled: uncompiled they hold the whole [B, heads, Q, L] grid."""
    from torch.nn.attention import flex_attention as module

    return torch.compile(getattr(module, name), dynamic=True)


def _flex(queries: Tensor, keys: Tensor, values: Tensor, mask: Any) -> Tensor:
    return _compiled("flex_attention")(queries.to(values.dtype), keys, values, block_mask=mask, enable_gqa=True)


def _block_mask(anchors: Tensor, length: int, block_size: int, keep: Tensor | None) -> Any:
    queries = anchors.shape[1] * block_size
    rule = multi_anchor_mask_mod(anchors, length, block_size, keep)
    make = _compiled("create_block_mask")
    return make(rule, anchors.shape[0], None, queries, length + queries, device=anchors.device)
