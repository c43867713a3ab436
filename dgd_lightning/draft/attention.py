"""How blocks attend to the context and themselves: by groups, by tiles, by FlexAttention, or under one dense mask.

Letters: B rows, S context length, N anchors, K block size, D head width, g query heads per key head.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import cache as memoise
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._triton import has_triton

from dgd_lightning.checks import check_choice
from dgd_lightning.draft.tiles import attend_in_tiles, plan_of
from dgd_lightning.errors import InputError

Attention = Literal["sdpa", "tiles", "flex", "dense"]
Wanted = Literal["auto", "sdpa", "tiles", "flex", "dense"]
KeysValues = tuple[Tensor, Tensor]  # [B, kv heads, S, D] each
Mix = Callable[[Tensor, KeysValues, KeysValues], Tensor]  # queries, the context's, the blocks' -> [B, heads, N·K, D]
FOLD_QUERIES = 64  # up to here query groups are folded into the query axis, so that keys need not be repeated
GROUP_BLOCKS = 16  # blocks that attend together: more of them read more that lies behind their anchors


def choose_attention(wanted: Wanted, device: torch.device, argument: str = "attention") -> Attention:
    """The kind that ``auto`` means on a device, or the one that was asked for, if it works there.

    On CUDA FlexAttention, which PyTorch compiles by Triton; where there is none, ``sdpa`` with a warning: it needs no
    compiler, and its memory grows with the context alike. By tiles on a CPU, ``sdpa`` elsewhere.
    """
    check_choice(argument, wanted, get_args(Wanted))
    if wanted == "flex" and device.type != "cuda":
        expected, received = "'sdpa', 'tiles', or 'flex' on a CUDA device", f"{wanted!r} on {device.type}"
        raise InputError(argument, expected=expected, received=received, hint=f"use {argument}='sdpa'")
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
    """
    attention = choose_attention(attention, anchors.device)
    if attention == "sdpa":
        groups = groups_of(anchors, context_length, block_size, keep, query_groups=heads // kv_heads, dtype=dtype)
        return partial(attend_in_groups, groups=groups)
    if attention == "tiles":
        limits = _limits(anchors, keep).clamp(0, context_length).tolist()
        rows = heads // kv_heads * block_size
        return partial(attend_in_tiles, plans=[plan_of(row, kv_heads, rows, anchors.device) for row in limits])
    if attention == "dense":
        mask = multi_anchor_mask(anchors, context_length, block_size, keep)
        return lambda queries, context, own: attend(queries, *joined(context, own), mask)
    rule = multi_anchor_mask_mod(anchors, context_length, block_size, keep)
    slots = anchors.shape[1] * block_size
    made = _compiled("create_block_mask")(
        rule, anchors.shape[0], None, slots, context_length + slots, device=anchors.device
    )
    flex = partial(_compiled("flex_attention"), block_mask=made, enable_gqa=True)
    return lambda queries, context, own: flex(queries.to(own[1].dtype), *joined(context, own))


@memoise
def _compiled(name: str) -> Any:
    """FlexAttention's functions, compiled: uncompiled they hold the whole [B, heads, Q, L] grid."""
    from torch.nn.attention import flex_attention as module

    return torch.compile(getattr(module, name), dynamic=True)


def joined(context: KeysValues, own: KeysValues) -> KeysValues:
    """Keys and values, one after the other."""
    return torch.cat([context[0], own[0]], dim=2), torch.cat([context[1], own[1]], dim=2)


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Grouped-query attention of [B, heads, Q, D] under a boolean mask [B, 1, Q, L], True where it is allowed."""
    queries = queries.to(values.dtype)
    groups, length = queries.shape[1] // keys.shape[1], queries.shape[2]
    if groups > 1 and length <= FOLD_QUERIES:
        return _folded(queries, keys, values, mask.repeat(1, 1, groups, 1))
    keys, values = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (keys, values))
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)


def _folded(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """The g query heads of a key head as g·Q queries of it; mask [B, 1, g·Q, L]."""
    folded = queries.reshape(*keys.shape[:2], -1, queries.shape[-1])  # [B, kv heads, g·Q, D]
    return F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask).reshape(queries.shape)


class Group(NamedTuple):
    """Neighbouring blocks, and all that they may look at."""

    rows: slice  # of the N·K slots
    limit: int  # no block of the group sees the context from here on
    bias: Tensor  # [B, 1, g·rows, limit + rows], 0 or −∞


def groups_of(
    anchors: Tensor, context_length: int, block_size: int, keep: Tensor | None, *, query_groups: int, dtype: torch.dtype
) -> list[Group]:
    """Blocks, ``GROUP_BLOCKS`` at a time, with the part of the context that they see; see :func:`mix_of`."""
    seen = _limits(anchors, keep).clamp(0, context_length)  # [B, N]
    largest = torch.stack([part.amax() for part in seen.split(GROUP_BLOCKS, dim=1)]).tolist()
    groups = []
    for number, limit in enumerate(largest):
        part = slice(number * GROUP_BLOCKS, min((number + 1) * GROUP_BLOCKS, anchors.shape[1]))
        mask = multi_anchor_mask(seen[:, part], limit, block_size)
        bias = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))
        rows = slice(part.start * block_size, part.stop * block_size)
        groups.append(Group(rows, limit, bias.repeat(1, 1, query_groups, 1)))
    return groups


def attend_in_groups(queries: Tensor, context: KeysValues, own: KeysValues, groups: Sequence[Group]) -> Tensor:
    """What :func:`attend` gives under the whole mask, without what lies behind a group's anchors."""
    parts = []
    for rows, limit, bias in groups:
        keys, values = (torch.cat([x[:, :, :limit], y[:, :, rows]], 2) for x, y in zip(context, own, strict=True))
        parts.append(_folded(queries[:, :, rows].to(values.dtype), keys, values, bias.to(values.dtype)))
    return torch.cat(parts, dim=2)


def _limits(anchors: Tensor, keep: Tensor | None) -> Tensor:
    """How far each block sees the context, [B, N]; a dropped one sees nothing of it."""
    return anchors if keep is None else torch.where(keep, anchors, 0)


def multi_anchor_mask(
    anchors: Tensor,
    context_length: int,
    block_size: int,
    keep: Tensor | None = None,
    context_positions: Tensor | None = None,
) -> Tensor:
    """Dense mask of N blocks over ``[context ; blocks]``: context strictly before the anchor, own block both ways.

    A dropped block sees itself only, so that its (ignored) rows stay finite.

    Args:
        anchors: [B, N] absolute positions.
        context_length: S.
        block_size: K.
        keep: [B, N] boolean, or None for all.
        context_positions: [B, S], of the context's keys; None: 0…S−1.

    Returns:
        [B, 1, N·K, S + N·K], True where attention is allowed.
    """
    batch, blocks = anchors.shape
    device = anchors.device
    limit = _limits(anchors, keep).repeat_interleave(block_size, dim=1)  # [B, N·K]
    keys = torch.arange(context_length, device=device) if context_positions is None else context_positions[:, None]
    context = keys < limit[:, :, None]  # [B, N·K, S]
    owner = torch.arange(blocks * block_size, device=device) // block_size  # [N·K]
    own = (owner[:, None] == owner[None, :]).expand(batch, -1, -1)  # [B, N·K, N·K]
    return torch.cat([context, own], dim=-1)[:, None]


def multi_anchor_mask_mod(
    anchors: Tensor, context_length: int, block_size: int, keep: Tensor | None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The rule of :func:`multi_anchor_mask` for ``torch.nn.attention.flex_attention.create_block_mask``."""
    limit = _limits(anchors, keep)  # [B, N]
    last = anchors.shape[1] - 1

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        block = query // block_size
        # FlexAttention probes indices rounded up to its tile, beyond the last block
        before = (key < context_length) & (key < limit[batch, block.clamp(max=last)])
        return before | ((key >= context_length) & ((key - context_length) // block_size == block))

    return allowed


def single_block_mask(anchors: Tensor, block_size: int, key_length: int) -> Tensor:
    """One block per row whose own keys are in the cache at their positions: ``key < anchor + K``, [B, 1, K, L]."""
    seen = torch.arange(key_length, device=anchors.device) < (anchors + block_size)  # [B, L]
    return seen[:, None, None, :].expand(-1, 1, block_size, -1)
