"""Accept or reject a proposed block: pure functions, vectorised over rows and slots; nothing waits for the device.

A block of K tokens is the anchor and K - 1 proposals. Logits of slot j belong to the token at anchor + j + 1, so the
K distributions are those of the K - 1 proposals and of one bonus token.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dgd_lightning.decode.random_source import ACCEPT, TARGET, RandomSource


class Verdict(NamedTuple):
    """What one verification commits: ``tokens[b, :lengths[b]]``; the entries beyond have no meaning."""

    tokens: Tensor  # [B, K] accepted proposals, then the target's own token
    lengths: Tensor  # [B] accepted proposals + 1


def leading_true(flags: Tensor) -> Tensor:
    """How many flags [B, N] are before the first false one, per row [B]."""
    return flags.long().cumprod(1).sum(1)


def verify_match(proposals: Tensor, target_tokens: Tensor) -> Verdict:
    """Accept while the proposal is the token that the target itself chose, by argmax or by a draw of its own.

    Exact for any proposals [B, K - 1]: every committed token is one of the target's [B, K], given those before it.
    """
    accepted = leading_true(proposals == target_tokens[:, :-1])  # [B]
    return Verdict(target_tokens, accepted + 1)  # accepted proposals are the target's tokens by definition


def residual(p: Tensor, q: Tensor) -> Tensor:
    """The distribution a token is drawn from after a rejection: ``norm(max(p - q, 0))``.

    Where nothing is left (p equals q, so a rejection had probability 0 but for rounding) it is p. p [.., V] is the
    target's, q [.., V] what the rejected token was drawn from; zeros where nothing was rejected.

    Source: Leviathan et al. 2023 (arXiv 2211.17192), section 2.3; Chen et al. 2023 (arXiv 2302.01318), algorithm 2.
    """
    rest = (p - q).clamp(min=0)  # [.., V]
    mass = rest.sum(-1, keepdim=True)  # [.., 1]
    return torch.where(mass > 0, rest / mass.clamp(min=torch.finfo(mass.dtype).tiny), p)


def accept_probability(p: Tensor, q: Tensor, proposals: Tensor) -> Tensor:
    """``min(1, p(x) / q(x))`` [B, N] for tokens x [B, N] proposed by q [B, N, V], with p [B, N, V] the target's.

    Source: Leviathan et al. 2023 (arXiv 2211.17192), section 2.3.
    """
    chosen = proposals[..., None]  # [B, N, 1]
    return (p.gather(-1, chosen) / q.gather(-1, chosen)).squeeze(-1).clamp(max=1.0)


def verify_rejection(
    proposals: Tensor, q: Tensor, p: Tensor, random_source: RandomSource, positions: Tensor
) -> Verdict:
    """Rejection sampling: committed tokens have the target's distribution p [B, K, V], whatever q [B, K - 1, V] is.

    Both are after temperature and filters. Proposals [B, K - 1] were drawn from q; ``positions`` [B, K] are absolute,
    those of the proposals and of the bonus token.
    """
    drafted = proposals.shape[1]
    chances = accept_probability(p[:, :-1], q, proposals)  # [B, K - 1]
    accept = random_source.bernoulli(chances, ACCEPT, positions[:, :-1])  # [B, K - 1]
    accepted = leading_true(accept)[:, None]  # [B, 1]
    p_last = p.take_along_dim(accepted[..., None], 1)  # [B, 1, V] after the last accepted proposal
    # All accepted: nothing was rejected, q counts as zero and the residual is p, the bonus token's distribution.
    q_last = q.take_along_dim(accepted.clamp(max=drafted - 1)[..., None], 1)  # [B, 1, V]
    q_last = q_last * (accepted < drafted)[..., None]
    last = random_source.categorical(residual(p_last, q_last), TARGET, positions.gather(1, accepted))  # [B, 1]
    tokens = torch.cat([proposals, last], dim=1).scatter(1, accepted, last)  # [B, K]
    return Verdict(tokens, accepted[:, 0] + 1)
