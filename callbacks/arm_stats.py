"""Per-arm sums that τ, acceptance rates, throughput and speed-up come from; made of prediction rows alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgd_lightning.metrics import AcceptanceRates, Tau, acceptance_rates, length_histogram, tau_of_histogram


class Cost(NamedTuple):
    """What a row cost: its share of the decode time of the group it was decoded with."""

    tokens: int  # committed after the prefill's first token
    seconds: float


class ArmStats:
    """Everything of one arm; adding a row and reading a number cost the same after ten rows and after ten thousand.

    Args:
        name: of the arm.
        method: of the arm.
        temperature: of the arm.
        block_size: K; 1 for arms that draft nothing.
    """

    def __init__(self, name: str, method: str, temperature: float, block_size: int) -> None:
        self.name, self.method, self.temperature, self.block_size = name, method, temperature, block_size
        self.tasks = self.skipped = self.tokens = self.answered = 0
        self.macro_sum = 0.0
        self.histogram = torch.zeros(block_size + 1, dtype=torch.long)  # [K + 1] counts of acceptance lengths
        self.verified = torch.zeros(block_size + 1, dtype=torch.long)  # [K + 1] counts of verified lengths
        self.costs: dict[str, Cost] = {}  # by idx

    def add(self, row: dict[str, Any]) -> None:
        """Adds a prediction row of this arm."""
        record = row["dgd"]
        if "skipped" in record:
            self.skipped += 1
            return
        lengths = record["acceptance_lengths"]
        committed = sum(lengths)
        self.tasks += 1
        self.tokens += record["tokens"]
        if lengths:
            self.answered += 1
            self.macro_sum += committed / len(lengths)
        self.histogram += length_histogram(lengths, self.block_size)
        self.verified += length_histogram(record["verified_lengths"], self.block_size)
        share = committed / record["batch_tokens"] if record["batch_tokens"] else 0.0
        self.costs[row["idx"]] = Cost(committed, record["decode_seconds"] * share)

    @property
    def tau(self) -> Tau:
        """τ, micro and macro."""
        macro = self.macro_sum / self.answered if self.answered else float("nan")
        return Tau(tau_of_histogram(self.histogram), macro)

    @property
    def lengths(self) -> Tensor:
        """All acceptance lengths, sorted."""
        return torch.arange(self.block_size + 1).repeat_interleave(self.histogram)

    @property
    def rates(self) -> AcceptanceRates:
        """Acceptance per slot [K - 1]; NaN where nothing was verified."""
        return acceptance_rates(self.verified)

    @property
    def tokens_per_second(self) -> float:
        """Committed tokens per second of decode time, prefill excluded."""
        return _speed(list(self.costs.values()))


def _speed(costs: list[Cost]) -> float:
    seconds = sum(cost.seconds for cost in costs)
    return sum(cost.tokens for cost in costs) / seconds if seconds > 0 else float("nan")


def collect(stats: dict[str, ArmStats], row: dict[str, Any]) -> None:
    """Adds a row to its arm's stats, which are made where they are missing."""
    record = row["dgd"]
    name = record["arm"]
    if name not in stats:
        stats[name] = ArmStats(name, record["method"], record["temperature"], record["block_size"] or 1)
    stats[name].add(row)


def speed_up(arm: ArmStats, stats: dict[str, ArmStats]) -> float:
    """Tokens per second over those of the autoregressive arm of the same temperature, over the tasks that both did.

    NaN where there is no such arm.
    """
    for base in stats.values():
        if base.method == "autoregressive" and base.temperature == arm.temperature:
            common = [idx for idx in arm.costs if idx in base.costs]
            reference = _speed([base.costs[idx] for idx in common])
            return _speed([arm.costs[idx] for idx in common]) / reference if reference else float("nan")
    return float("nan")
