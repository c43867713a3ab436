"""τ, acceptance-length histogram and acceptance rates: functions of the lengths that verifications gave, and a metric.

A length l in 1 … K is what one verification of a block of K slots gives: l − 1 accepted draft tokens and one token of
the target's. *Acceptance lengths* stop at a stop token or the limit and count what was committed: τ is made of them.
*Verified lengths* go on past it and count what agreed: acceptance rates are made of them, since a block that was cut at
a stop token is no evidence against the draft's later slots.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from dgd_lightning.distributions import real_dtype
from dgd_lightning.metrics.clustered import NAN


class Tau(NamedTuple):
    """Tokens committed per target verification; NaN where there was none."""

    micro: float  # all verifications pooled
    macro: float  # mean of the responses' own means


class AcceptanceRates(NamedTuple):
    """Acceptance of the draft's slots 1 … K − 1; NaN where a slot was never reached."""

    given_reached: Tensor  # [K - 1] fp64: P(slot j accepted | slots before it accepted)
    overall: Tensor  # [K - 1] fp64: P(slots 1 … j all accepted)


def length_histogram(lengths: Sequence[int], block_size: int) -> Tensor:
    """How often each length occurred: [K + 1] int64, entry l counts length l.

    Args:
        lengths: lengths of verifications, each in 1 … K; a 0 (nothing committed) counts as well.
        block_size: K.

    Raises:
        ValueError: a length outside 0 … K.
    """
    counts = torch.bincount(torch.as_tensor(lengths, dtype=torch.long), minlength=block_size + 1)  # [K + 1]
    if len(counts) != block_size + 1:
        raise ValueError(f"lengths: expected at most block_size {block_size}, received {max(lengths)}")
    return counts


def tau_of_histogram(counts: Tensor) -> float:
    """Micro τ of a histogram [K + 1]."""
    lengths = torch.arange(len(counts), dtype=real_dtype(counts.device), device=counts.device)
    return float((counts * lengths).sum() / counts.sum())


def tau(responses: Sequence[Sequence[int]]) -> Tau:
    """τ of each response's acceptance lengths; responses without a verification do not count."""
    means = [sum(lengths) / len(lengths) for lengths in responses if lengths]
    verifications = sum(map(len, responses))
    return Tau(
        sum(map(sum, responses)) / verifications if verifications else NAN,
        sum(means) / len(means) if means else NAN,
    )


def acceptance_rates(counts: Tensor) -> AcceptanceRates:
    """Acceptance rate per slot of a block.

    Args:
        counts: [K + 1] histogram of verified lengths: slot j was accepted in the verifications longer than j.
    """
    beyond = counts.flip(0).cumsum(0).flip(0).to(real_dtype(counts.device))  # [K + 1]: entry l counts lengths >= l
    accepted, reached = beyond[2:], beyond[1:-1]  # [K - 1] each: slot j needs length >= j + 1, and >= j to be reached
    return AcceptanceRates(accepted / reached, accepted / beyond[1])


class AcceptanceLength(Metric):
    """τ, micro and macro, and the histogram it comes from; sums that reduce over ranks.

    Args:
        block_size: K; lengths are 1 … K.
    """

    full_state_update = False
    counts: Tensor
    macro_sum: Tensor
    responses: Tensor

    def __init__(self, block_size: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.block_size = block_size
        self.add_state("counts", torch.zeros(block_size + 1, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("macro_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("responses", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, lengths: Sequence[int]) -> None:
        """Adds one response's acceptance lengths."""
        if lengths:
            self.counts += length_histogram(lengths, self.block_size).to(self.counts.device)
            self.macro_sum += sum(lengths) / len(lengths)
            self.responses += 1

    def compute(self) -> Tau:
        """τ over all responses of all ranks."""
        return Tau(tau_of_histogram(self.counts), float(self.macro_sum / self.responses))
