"""How logits rate the token that was right: its rank, its probability, and their confidence in any token."""

from torch import Tensor

from dgd_lightning.distributions import real_dtype, wide


def gold_rank(logits: Tensor, tokens: Tensor) -> Tensor:
    """Rank of each token among all, in fp64, 1 for the top-1 token: logits [.., V], tokens [..] -> [..].

    Tokens with equal logits share the mean of the ranks they take up, the expected rank if ties were broken at random:
    constant logits give rank (V + 1) / 2 everywhere, neither the best nor the worst.
    """
    own = logits.gather(-1, tokens[..., None])  # [.., 1]
    above = (logits > own).sum(-1, dtype=real_dtype(logits.device))
    equal = (logits == own).sum(-1, dtype=real_dtype(logits.device))  # itself included
    return above + (equal + 1) / 2


def gold_log_probability(logits: Tensor, tokens: Tensor) -> Tensor:
    """Natural logarithm of each token's probability, fp32 or wider: logits [.., V], tokens [..] -> [..]."""
    logits = wide(logits)
    return logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1)


def confidence(logits: Tensor) -> Tensor:
    """Probability of the top-1 token, fp32 or wider: logits [.., V] -> [..]."""
    logits = wide(logits)
    return (logits.amax(-1) - logits.logsumexp(-1)).exp()
