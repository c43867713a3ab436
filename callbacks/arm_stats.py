"""Per-arm sums that τ, acceptance rates, throughput and speed-up come from; made of prediction rows alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgd_lightning.metrics.functional import AcceptanceRates, Tau, acceptance_rates, length_histogram, tau_of_histogram
from dgd_lightning.run_folder import batch_share


class Cost(NamedTuple):
    """What a row cost: its share of the decode time of the batch it was decoded in, prefill excluded.

    Of reranked answers: the share of all answers, and the time of ranking them.
    """

    tokens: int = 0  # of the answer, committed after the prefill's first token
    seconds: float = 0.0

    def plus(self, other: Cost) -> Cost:
        return Cost(self.tokens + other.tokens, self.seconds + other.seconds)

    @property
    def speed(self) -> float:
        """Tokens per second; NaN where no time was spent."""
        return self.tokens / self.seconds if self.seconds > 0 else float("nan")


class Sampling(NamedTuple):
    """What shapes the distribution of an arm's output: only arms that share it are compared in speed."""

    temperature: float
    top_k: int | None
    top_p: float | None


class ArmStats:
    """Everything of one arm; adding a row and reading a number cost the same after ten rows and after ten thousand.

    Args:
        name: of the arm.
        method: of the arm.
        sampling: of the arm.
        block_size: K; 1 for arms that draft nothing.
    """

    def __init__(self, name: str, method: str, sampling: Sampling, block_size: int) -> None:
        self.name, self.method, self.sampling, self.block_size = name, method, sampling, block_size
        self.tasks = self.skipped = self.tokens = self.answered = 0
        self.macro_sum = 0.0
        self.histogram = torch.zeros(block_size + 1, dtype=torch.long)  # [K + 1] counts of acceptance lengths
        self.verified = torch.zeros(block_size + 1, dtype=torch.long)  # [K + 1] counts of verified lengths
        self.costs: dict[str, Cost] = {}  # by idx; seconds are NaN where other arms were in the batch
        self.total = Cost()
        self.shared = Cost()  # of rows that were decoded together with other arms
        self.common: dict[
            str, Common
        ] = {}  # by name of the baseline; kept as sums: reading one costs no pass over tasks

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
        cost = cost_of(record)
        if record.get("joined_with"):  # one arm more would have cost next to nothing: no arm has a speed of its own
            self.shared = self.shared.plus(cost)
            cost = cost._replace(seconds=float("nan"))
        self.costs[row["idx"]] = cost
        self.total = self.total.plus(cost)

    def compare(self, base: ArmStats, idx: str) -> None:
        """Adds a task that this arm and a baseline have both done, once."""
        own, other = self.common.get(base.name, Common())
        self.common[base.name] = Common(own.plus(self.costs[idx]), other.plus(base.costs[idx]))

    @property
    def is_baseline(self) -> bool:
        """Whether speed-ups may refer to it."""
        return self.method == "autoregressive"

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
        """Committed tokens per second of decode time, prefill excluded; NaN where arms shared it."""
        return self.total.speed


def cost_of(record: dict[str, Any]) -> Cost:
    """Of a row with an answer."""
    seconds = record["decode_seconds"] * batch_share(record) + record.get("rank_seconds", 0.0)
    return Cost(sum(record["acceptance_lengths"]), seconds)


class Common(NamedTuple):
    """Summed costs over the tasks that an arm and its baseline both did."""

    own: Cost = Cost()
    base: Cost = Cost()


def collect(stats: dict[str, ArmStats], row: dict[str, Any]) -> None:
    """Adds a row to its arm's stats, which are made where they are missing, and to the sums behind speed-ups."""
    record, idx = row["dgd"], row["idx"]
    name = record["arm"]
    if name not in stats:
        sampling = Sampling(record["temperature"], record["top_k"], record["top_p"])
        stats[name] = ArmStats(name, record["method"], sampling, record["block_size"] or 1)
    arm = stats[name]
    arm.add(row)
    if idx not in arm.costs:  # skipped
        return
    for other in stats.values():
        if other.sampling == arm.sampling and idx in other.costs:
            if other.is_baseline:
                arm.compare(other, idx)
            if arm.is_baseline and other is not arm:
                other.compare(arm, idx)


def speed_up(arm: ArmStats, stats: dict[str, ArmStats]) -> float:
    """Tokens per second over those of the first autoregressive arm with the same sampling, over the tasks both did.

    Sampling is temperature, top_k and top_p. NaN where there is no such arm.
    """
    for base in stats.values():
        if base.is_baseline and base.sampling == arm.sampling:
            common = arm.common.get(base.name, Common())
            reference = common.base.speed
            return common.own.speed / reference if reference else float("nan")
    return float("nan")
