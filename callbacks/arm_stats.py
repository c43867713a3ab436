"""Per-arm sums that τ, acceptance rates, throughput and speed-up come from; made of prediction rows alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgd_lightning.metrics import AcceptanceRates, Tau, acceptance_rates, length_histogram, tau


class Cost(NamedTuple):
    """What a row cost: its share of the decode time of the group it was decoded with."""

    tokens: int  # committed after the prefill's first token
    seconds: float


@dataclass
class ArmStats:
    """Everything of one arm."""

    name: str
    method: str
    temperature: float
    block_size: int  # K; 1 for arms that draft nothing
    tasks: int = 0
    skipped: int = 0
    tokens: int = 0
    responses: list[list[int]] = field(default_factory=list)  # acceptance lengths per task
    verified: list[int] = field(default_factory=list)
    costs: dict[str, Cost] = field(default_factory=dict)  # by idx

    def add(self, row: dict[str, Any]) -> None:
        """Adds a prediction row of this arm."""
        record = row["dgd"]
        if "skipped" in record:
            self.skipped += 1
            return
        lengths = record["acceptance_lengths"]
        self.tasks += 1
        self.tokens += record["tokens"]
        self.responses.append(lengths)
        self.verified += record["verified_lengths"]
        committed = sum(lengths)
        share = committed / record["batch_tokens"] if record["batch_tokens"] else 0.0
        self.costs[row["idx"]] = Cost(committed, record["decode_seconds"] * share)

    @property
    def tau(self) -> Tau:
        """τ, micro and macro."""
        return tau(self.responses)

    @property
    def lengths(self) -> list[int]:
        """All acceptance lengths."""
        return [length for response in self.responses for length in response]

    @property
    def histogram(self) -> Tensor:
        """[K + 1] counts of acceptance lengths."""
        return length_histogram(self.lengths, self.block_size)

    @property
    def rates(self) -> AcceptanceRates:
        """Acceptance per slot; empty for arms that draft nothing."""
        if self.block_size < 2:
            return AcceptanceRates(torch.empty(0), torch.empty(0))
        return acceptance_rates(length_histogram(self.verified, self.block_size))

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
