"""torchmetrics wrappers of `functional`: sums and counts that reduce over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from dgd_lightning.metrics.functional import (
    AcceptanceRates,
    Tau,
    acceptance_rates,
    length_histogram,
    tau,
    tau_of_histogram,
)


class AcceptanceLength(Metric):
    """τ, micro and macro, and the histogram it comes from.

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
            self.macro_sum += tau([lengths]).macro
            self.responses += 1

    def compute(self) -> Tau:
        """τ over all responses of all ranks."""
        macro = float(self.macro_sum / self.responses) if self.responses > 0 else float("nan")
        return Tau(tau_of_histogram(self.counts), macro)


class AcceptanceRate(Metric):
    """Acceptance rate of each draft slot.

    Args:
        block_size: K; the draft fills slots 1 … K − 1.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, block_size: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.block_size = block_size
        self.add_state("counts", torch.zeros(block_size + 1, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, lengths: Sequence[int]) -> None:
        """Adds one response's verified lengths."""
        if lengths:
            self.counts += length_histogram(lengths, self.block_size).to(self.counts.device)

    def compute(self) -> AcceptanceRates:
        """Rates over all verifications of all ranks."""
        return acceptance_rates(self.counts)
