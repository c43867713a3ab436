"""The training objective of DFlash: which blocks, their labels, and the position-weighted loss, a few logits at a time.

Source: the DFlash paper, training section; weights as in SpecForge's ``OnlineDFlashModel``.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dgd_lightning.distributions import wide

_PUBLISHED_GAMMA = {16: 7.0, 10: 5.0, 8: 4.0}


class Anchors(NamedTuple):
    """Sampled anchors, ascending in each row; dropped ones come last, at position 0."""

    anchors: Tensor  # [B, N] long
    keep: Tensor  # [B, N] bool


class BlockLoss(NamedTuple):
    """The loss and how often the draft's top-1 token was right, over supervised slots."""

    loss: Tensor  # [], Σ w·nll / Σ w; 0 where nothing is supervised
    accuracy: Tensor  # [], over all supervised slots
    per_slot_accuracy: Tensor  # [K−1], slots 1…K−1; NaN where a slot has no supervised position
    per_slot_count: Tensor  # [K−1], supervised positions per slot, to pool over batches


def default_gamma(block_size: int) -> float:
    """Decay of the loss weights over the block: the paper's 7, 5, 4 for K = 16, 10, 8, else K / 2."""
    return _PUBLISHED_GAMMA.get(block_size, block_size / 2)


def sample_anchors(loss_mask: Tensor, num_anchors: int, generator: torch.Generator | None) -> Anchors:
    """Draw anchors without replacement among positions p ≥ 1 where p and p + 1 are both supervised.

    Decoding always starts a block at a generated token with some context before it, and so does training.
    ``loss_mask`` [B, S] is non-zero where a token is supervised. There are N = ``num_anchors`` of them, or as many as
    the row with the most candidates has; rows with fewer get dropped ones.
    """
    batch, length = loss_mask.shape
    supervised = loss_mask > 0
    valid = supervised[:, :-1] & supervised[:, 1:]  # [B, S−1]
    valid[:, :1] = False
    where = loss_mask.device if generator is None else generator.device
    noise = torch.rand(batch, length - 1, generator=generator, device=where).to(loss_mask.device)
    most = max(1, min(num_anchors, int(valid.sum(1).max())))
    order = noise.masked_fill(~valid, 2.0).argsort(dim=1)[:, :most]  # valid ones first, at random
    chosen = torch.where(valid.gather(1, order), order, length)  # `length` marks a dropped one and sorts last
    chosen = chosen.sort(dim=1).values
    keep = chosen < length
    return Anchors(torch.where(keep, chosen, 0), keep)


def block_ids(input_ids: Tensor, anchors: Tensor, block_size: int, mask_token_id: int) -> Tensor:
    """Input tokens of the blocks at anchors [B, N], ``[anchor token, mask, …, mask]`` each: [B, S] -> [B, N·K]."""
    ids = torch.full((*anchors.shape, block_size), mask_token_id, dtype=input_ids.dtype, device=input_ids.device)
    ids[..., 0] = input_ids.gather(1, anchors)
    return ids.flatten(1)


def block_loss(
    hidden: Tensor,
    lm_head: Callable[[Tensor], Tensor],
    input_ids: Tensor,
    loss_mask: Tensor,
    anchors: Tensor,
    keep: Tensor,
    *,
    block_size: int,
    gamma: float,
    chunk: int = 2048,
) -> BlockLoss:
    """Cross-entropy of slots 1…K−1 against the tokens at anchor + slot, weighted by ``exp(−(slot − 1)/γ)``.

    Logits are made for ``chunk`` slots at a time and made again in the backward pass, so that [B·N·K, V] never exists.

    Args:
        hidden: [B, N·K, H], the draft's output.
        lm_head: [.., H] -> [.., V], the target's.
        input_ids: [B, S].
        loss_mask: [B, S], weight of each token as a label.
        anchors: [B, N].
        keep: [B, N], False: the block is ignored.
        block_size: K.
        gamma: decay γ in slots (:func:`default_gamma`).
    """
    length = input_ids.shape[1]
    slots = torch.arange(1, block_size, device=anchors.device)  # [K−1]
    where = anchors[..., None] + slots  # [B, N, K−1]
    inside = keep[..., None] & (where < length)
    flat = where.clamp(max=length - 1).flatten(1)  # [B, N·(K−1)]
    labels = input_ids.gather(1, flat)
    weights = loss_mask.gather(1, flat).view_as(where).to(torch.promote_types(hidden.dtype, torch.float32)) * inside
    decayed = weights * torch.exp(-(slots - 1).to(weights.dtype) / gamma)

    states = hidden.unflatten(1, (-1, block_size))[:, :, 1:].flatten(0, 2)  # [B·N·(K−1), H]
    targets, scale = labels.flatten(), decayed.flatten()
    total = scale.new_zeros(())
    hits = []
    for start in range(0, states.shape[0], chunk):
        piece = slice(start, start + chunk)
        part, hit = checkpoint(_weighted_nll, states[piece], lm_head, targets[piece], scale[piece], use_reentrant=False)
        total = total + part
        hits.append(hit)

    tiny = torch.finfo(scale.dtype).tiny
    counted = weights > 0  # [B, N, K−1]
    right = (torch.cat(hits).view_as(counted) & counted).sum(dim=(0, 1))  # [K−1]
    count = counted.sum(dim=(0, 1))
    return BlockLoss(
        loss=total / scale.sum().clamp_min(tiny),
        accuracy=right.sum() / count.sum(),
        per_slot_accuracy=right / count,
        per_slot_count=count,
    )


def _weighted_nll(
    states: Tensor, lm_head: Callable[[Tensor], Tensor], labels: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """(Σ w·nll, whether the top-1 token is the label): states [C, H], labels and weights [C]."""
    logits = wide(lm_head(states))  # [C, V]
    nll = logits.logsumexp(-1) - logits.gather(1, labels[:, None]).squeeze(1)
    return (nll * weights).sum(), logits.argmax(-1) == labels
