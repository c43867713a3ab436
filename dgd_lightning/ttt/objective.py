"""Losses of single slots, their weights, and the rule by which a slot would have been accepted."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dgd_lightning.distributions import wide

LmHead = Callable[[Tensor], Tensor]


class SlotScores(NamedTuple):
    """What one forward says about M slots; only ``loss`` has a gradient."""

    loss: Tensor  # [M], fp32 or wider
    confidence: Tensor  # [M], D-PACE's q: probability of the label, or overlap with the target's distribution
    choice: Tensor  # [M], the draft's top-1 token
    target_choice: Tensor | None  # [M], the target's; None where no hidden states of the target were given


def slot_scores(
    states: Tensor,
    lm_head: LmHead,
    tokens: Tensor,
    target_states: Tensor | None,
    *,
    kind: Literal["ce", "kl", "argmax"],
    soft: bool,
    chunk: int,
) -> SlotScores:
    """Losses of M slots; logits exist for ``chunk`` slots at a time and are made once, gradients with them.

    With p the target's distribution and q the draft's: ``ce`` is −log q(token), or −Σ p log q where ``soft``; ``kl`` is
    Σ p (log p − log q); ``argmax`` is −log q(argmax p).

    Args:
        states: [M, H], the draft's output.
        lm_head: [.., H] -> [.., V].
        tokens: of M slots in any shape, which the scores have too: the text's own tokens there.
        target_states: [M, H], the target's last hidden state before each slot, or None.
        soft: the labels are the target's distribution, not the tokens.
    """
    parts = []
    for start in range(0, states.shape[0], chunk):
        piece = slice(start, start + chunk)
        theirs = None if target_states is None else target_states[piece]
        leaf = states[piece].detach().requires_grad_(torch.is_grad_enabled())
        scores = _piece(leaf, lm_head, tokens.flatten()[piece], theirs, kind, soft)
        if leaf.requires_grad:
            scores.loss.sum().backward()  # row by row: a slot's loss reads its own state alone, and the head is frozen
            scores = scores._replace(loss=_WithSlopes.apply(states[piece], scores.loss.detach(), leaf.grad))
        parts.append(scores)
    columns = [torch.cat(column).view_as(tokens) for column in zip(*parts, strict=True) if column[0] is not None]
    loss, confidence, choice, *target_choice = columns
    return SlotScores(loss, confidence, choice, target_choice[0] if target_choice else None)


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


def _piece(
    states: Tensor, lm_head: LmHead, tokens: Tensor, target_states: Tensor | None, kind: str, soft: bool
) -> SlotScores:
    logits = wide(lm_head(states))  # [C, V]
    log_q = logits - logits.logsumexp(-1, keepdim=True)
    choice = logits.argmax(-1)
    if target_states is None:
        log_token = log_q.gather(1, tokens[:, None])[:, 0]
        return SlotScores(-log_token, log_token.detach().exp(), choice, None)
    with torch.no_grad():
        theirs = wide(lm_head(target_states))
        log_p = theirs - theirs.logsumexp(-1, keepdim=True)
        target_choice = theirs.argmax(-1)
    if not soft or kind == "argmax":
        labels = target_choice if kind == "argmax" else tokens
        log_label = log_q.gather(1, labels[:, None])[:, 0]
        return SlotScores(-log_label, log_label.detach().exp(), choice, target_choice)
    p = log_p.exp()
    loss = -(p * log_q).sum(-1)
    if kind == "kl":
        loss = loss + (p * log_p).sum(-1)
    with torch.no_grad():
        overlap = torch.minimum(p, log_q.exp()).sum(-1)  # the chance that rejection sampling accepts the slot
    return SlotScores(loss, overlap, choice, target_choice)


def decay_weights(inside: Tensor, gamma: float) -> Tensor:
    """DFlash's static weights exp(−(slot − 1)/γ) of slots [N, K − 1]; 0 where one is not ``inside``, with a label."""
    slots = torch.arange(inside.shape[-1], device=inside.device, dtype=torch.float32)
    return torch.exp(-slots / gamma) * inside


def dpace_weights(confidence: Tensor, inside: Tensor, alpha: float) -> Tensor:
    """D-PACE (arXiv 2605.18810, equations 7 and 8): slot j weighs Σ_{m≥j} Π_{i≤m} ((1 − α) q_i + α).

    The sum over m of the products is a smooth count of accepted slots; w_j is its derivative in log q_j (up to the
    smoothing), so weight moves to the slots that limit acceptance now. No gradient flows through the weights.
    ``confidence`` is q, [N, K − 1]; slots ``inside``, with a label, come first in each block.
    """
    smooth = (1 - alpha) * confidence.detach() + alpha
    products = smooth.cumprod(-1) * inside
    return products.flip(-1).cumsum(-1).flip(-1) * inside


def accepted_slots(choice: Tensor, target_choice: Tensor, tokens: Tensor, inside: Tensor) -> Tensor:
    """Which slots greedy verification would accept, as far as the context can tell.

    A slot is accepted if it and all before it agree with the target. The target's choices are known along the context
    only: where it would have written something else than the context does, the count ends, although decoding might
    accept more. So this is a lower bound, the same for every draft. All [N, K − 1].
    """
    agree = (choice == target_choice) & inside
    on_path = torch.ones_like(agree)
    on_path[:, 1:] = (target_choice == tokens)[:, :-1]
    return (agree & on_path).long().cumprod(-1).bool()


def committed_per_block(accepted: list[int]) -> list[int]:
    """Tokens that each verification of decoding commits, where the text is what decoding writes.

    Of ``accepted`` slots of a block at every position but the last, those of the blocks that decoding draws, each with
    its bonus token; the last is cut at the text's end.
    """
    committed, at = [], 0
    while at < len(accepted):
        committed.append(min(accepted[at] + 1, len(accepted) - at))
        at += committed[-1]
    return committed
