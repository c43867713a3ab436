"""The training objective of DFlash: which blocks, their labels, and losses of slots, a few logits at a time.

Training and test-time training share it. Source: the DFlash paper, training section; weights as in SpecForge's
``OnlineDFlashModel``.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dgd_lightning.distributions import wide

LmHead = Callable[[Tensor], Tensor]

_PUBLISHED_GAMMA = {16: 7.0, 10: 5.0, 8: 4.0}


class Anchors(NamedTuple):
    """Sampled anchors, ascending in each row; dropped ones come last, at position 0."""

    anchors: Tensor  # [B, N] long
    keep: Tensor  # [B, N] bool


class BlockLoss(NamedTuple):
    """The loss and how often the draft's top-1 token was right, over supervised slots."""

    loss: Tensor  # [], Σ w·nll / Σ w; 0 where nothing is supervised
    weight: Tensor  # [], Σ w
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


def decay_weights(inside: Tensor, gamma: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """DFlash's static weights exp(−(slot − 1)/γ) of slots [.., K − 1]; 0 where one is not ``inside``, with a label."""
    slots = torch.arange(inside.shape[-1], device=inside.device, dtype=dtype)
    return torch.exp(-slots / gamma) * inside


def block_loss(
    hidden: Tensor,
    lm_head: LmHead,
    input_ids: Tensor,
    loss_mask: Tensor,
    anchors: Tensor,
    keep: Tensor,
    *,
    block_size: int,
    gamma: float,
    chunk: int = 512,
) -> BlockLoss:
    """Cross-entropy of slots 1…K−1 against the tokens at anchor + slot, weighted by ``exp(−(slot − 1)/γ)``.

    Args:
        hidden: [B, N·K, H], the draft's output.
        lm_head: [.., H] -> [.., V], the target's.
        input_ids: [B, S].
        loss_mask: [B, S], weight of each token as a label.
        anchors: [B, N].
        keep: [B, N], False: the block is ignored.
        block_size: K.
        gamma: decay γ in slots (:func:`default_gamma`).
        chunk: slots whose logits exist at a time.
    """
    length = input_ids.shape[1]
    where = anchors[..., None] + torch.arange(1, block_size, device=anchors.device)  # [B, N, K−1]
    flat = where.clamp(max=length - 1).flatten(1)  # [B, N·(K−1)]
    labels, mask = (x.gather(1, flat).view_as(where) for x in (input_ids, loss_mask))
    counted = keep[..., None] & (where < length) & (mask > 0)
    states = hidden.unflatten(1, (-1, block_size))[:, :, 1:]  # [B, N, K−1, H]
    scores = slot_scores(states, lm_head, labels, counted, chunk=chunk)
    weights = mask * decay_weights(counted, gamma, scores.loss.dtype)
    total = weights.sum()
    right = ((scores.choice == labels) & counted).sum(dim=(0, 1))  # [K−1]
    count = counted.sum(dim=(0, 1))
    return BlockLoss(
        loss=(scores.loss * weights).sum() / total.clamp_min(torch.finfo(total.dtype).tiny),
        weight=total,
        accuracy=right.sum() / count.sum(),
        per_slot_accuracy=right / count,
        per_slot_count=count,
    )


def pooled(parts: list[BlockLoss]) -> BlockLoss:
    """The loss of a batch from those of its parts."""
    loss, weight, _, accuracy, counts = (torch.stack(column) for column in zip(*parts, strict=True))
    total, count = weight.sum(), counts.sum(0)
    right = (accuracy.nan_to_num() * counts).sum(0).round()  # [K−1]
    mean = (loss * weight).sum() / total.clamp_min(torch.finfo(total.dtype).tiny)
    return BlockLoss(mean, total, right.sum() / count.sum(), right / count, count)


class SlotScores(NamedTuple):
    """What one forward says about slots; only ``loss`` has a gradient. 0 where a slot has no label."""

    loss: Tensor  # [..], fp32 or wider
    confidence: Tensor  # [..], D-PACE's q: probability of the label, or overlap with the target's distribution
    choice: Tensor  # [..], the draft's top-1 token
    target_choice: Tensor | None  # [..], the target's; None where no hidden states of the target were given


def slot_scores(
    states: Tensor,
    lm_head: LmHead,
    tokens: Tensor,
    inside: Tensor,
    target_states: Tensor | None = None,
    *,
    kind: Literal["ce", "kl", "argmax"] = "ce",
    soft: bool = False,
    chunk: int,
) -> SlotScores:
    """Losses of slots; logits exist for ``chunk`` of them at a time and are made once, gradients with them.

    With p the target's distribution and q the draft's: ``ce`` is −log q(token), or −Σ p log q where ``soft``; ``kl`` is
    Σ p (log p − log q); ``argmax`` is −log q(argmax p).

    Args:
        states: [.., H], the draft's output.
        lm_head: [.., H] -> [.., V], frozen.
        tokens: [..], the text's own tokens there.
        inside: [..] boolean: the slots that have a label. No other one goes through the head.
        target_states: [.., H], the target's last hidden state before each slot, or None.
        soft: the labels are the target's distribution, not the tokens.
    """
    chosen, labels = states[inside], tokens[inside]  # [M, H], [M]
    theirs = None if target_states is None else target_states[inside]
    parts = []
    for start in range(0, max(1, len(chosen)), chunk):  # one part, be it empty: the loss has a gradient, of zeros
        piece = slice(start, start + chunk)
        with_target = None if theirs is None else theirs[piece]
        parts.append(_piece(chosen[piece], lm_head, labels[piece], with_target, kind, soft))
    columns = [torch.cat(column) for column in zip(*parts, strict=True) if column[0] is not None]
    loss, confidence, choice, *target_choice = (x.new_zeros(inside.shape).masked_scatter(inside, x) for x in columns)
    return SlotScores(loss, confidence, choice, target_choice[0] if target_choice else None)


def _piece(
    states: Tensor, lm_head: LmHead, tokens: Tensor, target_states: Tensor | None, kind: str, soft: bool
) -> SlotScores:
    """:func:`slot_scores` of C slots that have labels: states [C, H].

    The loss's derivative in the logits is q − p, or q less one at the label: nothing of the softmax is kept for it, and
    only the head's own derivative is left to autograd.
    """
    leaf = states.detach().requires_grad_(torch.is_grad_enabled())
    made = lm_head(leaf)  # [C, V]
    with torch.no_grad():
        logits = wide(made)
        choice = logits.argmax(-1)
        log_q = logits.log_softmax(-1)
        target_choice = log_p = None
        if target_states is not None:
            theirs = wide(lm_head(target_states))
            target_choice = theirs.argmax(-1)
            if soft and kind != "argmax":
                log_p = theirs.log_softmax(-1)
        if log_p is None:
            labels = (tokens if kind != "argmax" or target_choice is None else target_choice)[:, None]
            log_label = log_q.gather(1, labels)
            loss, confidence = -log_label[:, 0], log_label[:, 0].exp()
            if leaf.requires_grad:
                slopes = log_q.exp_().scatter_add_(1, labels, -torch.ones_like(log_label))
        else:
            p = log_p.exp()
            loss = -(p * log_q).sum(-1)
            if kind == "kl":
                loss += (p * log_p).sum(-1)
            slopes = log_q.exp_()
            confidence = torch.minimum(p, slopes).sum(-1)  # the chance that rejection sampling accepts the slot
            slopes -= p
    if leaf.requires_grad:
        (slope,) = torch.autograd.grad(made, leaf, slopes.to(made.dtype))
        loss = _WithSlopes.apply(states, loss, slope)
    return SlotScores(loss, confidence, choice, target_choice)


class _WithSlopes(torch.autograd.Function):
    """Losses [C] of states [C, H] whose gradients were made with them, so that no logits are kept or made again."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, loss: Tensor, slopes: Tensor) -> Tensor:
        ctx.save_for_backward(slopes)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        (slopes,) = ctx.saved_tensors
        return (upstream[:, None] * slopes).to(slopes.dtype), None, None
