"""τ, acceptance-length histogram and acceptance rates: pure functions of the lengths that verifications gave.

A length l in 1 … K is what one verification of a block of K slots gives: l − 1 accepted draft tokens and one token of
the target's. *Acceptance lengths* stop at a stop token or the limit and count what was committed: τ is made of them.
*Verified lengths* go on past it and count what agreed: acceptance rates are made of them, since a block that was cut at
a stop token is no evidence against the draft's later slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dgd_lightning.distributions import real_dtype


class Tau(NamedTuple):
    """Tokens committed per target verification; NaN where there was none."""

    micro: float  # all verifications pooled
    macro: float  # mean of the responses' own means


class AcceptanceRates(NamedTuple):
    """Acceptance of the draft's slots 1 … K − 1; NaN where a slot was never reached."""

    given_reached: Tensor  # [K - 1] fp64: P(slot j accepted | slots before it accepted)
    overall: Tensor  # [K - 1] fp64: P(slots 1 … j all accepted)


def length_histogram(lengths: Sequence[int], block_size: int) -> Tensor:
    """How often each length occurred.

    Args:
        lengths: lengths of verifications, each in 1 … K; a 0 (nothing committed) counts as well.
        block_size: K.

    Returns:
        [K + 1] int64; entry l counts length l.

    Raises:
        ValueError: a length outside 0 … K.
    """
    counts = torch.bincount(torch.as_tensor(lengths, dtype=torch.long), minlength=block_size + 1)  # [K + 1]
    if len(counts) != block_size + 1:
        raise ValueError(f"lengths: expected at most block_size {block_size}, received {max(lengths)}")
    return counts


def tau_of_histogram(counts: Tensor) -> float:
    """Micro τ of a histogram [K + 1]."""
    total = counts.sum()
    weights = torch.arange(len(counts), dtype=real_dtype(counts.device), device=counts.device)
    return float((counts * weights).sum() / total) if total > 0 else float("nan")


def tau_micro(responses: Sequence[Sequence[int]]) -> float:
    """Tokens per verification, all verifications of all responses pooled; NaN where there is none.

    Args:
        responses: acceptance lengths of each response.
    """
    verifications = sum(len(lengths) for lengths in responses)
    return sum(map(sum, responses)) / verifications if verifications else float("nan")


def tau_macro(responses: Sequence[Sequence[int]]) -> float:
    """Mean over responses of tokens per verification; responses without one do not count; NaN where none is left.

    Args:
        responses: acceptance lengths of each response.
    """
    means = [sum(lengths) / len(lengths) for lengths in responses if lengths]
    return sum(means) / len(means) if means else float("nan")


def tau(responses: Sequence[Sequence[int]]) -> Tau:
    """τ micro and macro of acceptance lengths per response."""
    return Tau(tau_micro(responses), tau_macro(responses))


def acceptance_rates(counts: Tensor) -> AcceptanceRates:
    """Acceptance rate per slot of a block.

    Args:
        counts: [K + 1] histogram of verified lengths: slot j was accepted in the verifications longer than j.
    """
    beyond = counts.flip(0).cumsum(0).flip(0).to(real_dtype(counts.device))  # [K + 1]: entry l counts lengths >= l
    accepted, reached = beyond[2:], beyond[1:-1]  # [K - 1] each: slot j needs length >= j + 1, and >= j to be reached
    return AcceptanceRates(accepted / reached, accepted / beyond[1])
