"""Weights of single slots, and the rule by which a slot would have been accepted."""

import torch
from torch import Tensor


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
