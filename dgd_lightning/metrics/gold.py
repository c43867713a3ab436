"""How logits rate the token that was right: its rank, its probability, and their confidence in any token."""

from __future__ import annotations

import torch
from torch import Tensor

from dgd_lightning.distributions import real_dtype


def gold_rank(logits: Tensor, tokens: Tensor) -> Tensor:
    """Rank of each token among all: 1 for the top-1 token.

    Tokens with equal logits share the mean of the ranks they take up, the expected rank if ties were broken at random:
    constant logits give rank (V + 1) / 2 everywhere, neither the best nor the worst.

    Args:
        logits: [.., V].
        tokens: [..].

    Returns:
        [..], fp64, in 1 … V.
    """
    own = logits.gather(-1, tokens[..., None])  # [.., 1]
    above = (logits > own).sum(-1, dtype=real_dtype(logits.device))
    equal = (logits == own).sum(-1, dtype=real_dtype(logits.device))  # itself included
    return above + (equal + 1) / 2


def gold_log_probability(logits: Tensor, tokens: Tensor) -> Tensor:
    """Natural logarithm of each token's probability.

    Args:
        logits: [.., V].
        tokens: [..].

    Returns:
        [..], fp32 or wider.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.gather(-1, tokens[..., None])[..., 0] - wide.logsumexp(-1)


def confidence(logits: Tensor) -> Tensor:
    """Probability of the top-1 token: logits [.., V] -> [..], fp32 or wider."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (wide.amax(-1) - wide.logsumexp(-1)).exp()
