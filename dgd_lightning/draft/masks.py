"""Who may look at whom in the draft: dense boolean masks, and the same rule as a FlexAttention mask."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


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
    limit = anchors if keep is None else torch.where(keep, anchors, 0)  # [B, N]
    limit = limit.repeat_interleave(block_size, dim=1)  # [B, N·K]
    keys = torch.arange(context_length, device=device) if context_positions is None else context_positions[:, None]
    context = keys < limit[:, :, None]  # [B, N·K, S]
    owner = torch.arange(blocks * block_size, device=device) // block_size  # [N·K]
    own = (owner[:, None] == owner[None, :]).expand(batch, -1, -1)  # [B, N·K, N·K]
    return torch.cat([context, own], dim=-1)[:, None]


def single_block_mask(anchors: Tensor, block_size: int, key_length: int) -> Tensor:
    """Mask of one block per row whose own keys are in the cache at their positions: ``key < anchor + K``.

    Args:
        anchors: [B, 1].
        block_size: K.
        key_length: number of cached keys in view, at positions 0…L−1.

    Returns:
        [B, 1, K, L].
    """
    seen = torch.arange(key_length, device=anchors.device) < (anchors + block_size)  # [B, L]
    return seen[:, None, None, :].expand(-1, 1, block_size, -1)


def multi_anchor_mask_mod(anchors: Tensor, context_length: int, block_size: int, keep: Tensor | None) -> MaskMod:
    """The rule of :func:`multi_anchor_mask` for ``torch.nn.attention.flex_attention.create_block_mask``."""
    limit = anchors if keep is None else torch.where(keep, anchors, 0)  # [B, N]
    last = anchors.shape[1] - 1

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        block = query // block_size
        # FlexAttention probes indices rounded up to its tile, beyond the last block
        before = (key < context_length) & (key < limit[batch, block.clamp(max=last)])
        return before | ((key >= context_length) & ((key - context_length) // block_size == block))

    return allowed
