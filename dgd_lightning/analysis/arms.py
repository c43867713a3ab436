"""Per-arm sums that τ, acceptance rates, throughput and speed-up come from; made of prediction rows alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgd_lightning.metrics.acceptance import AcceptanceRates, Tau, acceptance_rates, length_histogram, tau_of_histogram
from dgd_lightning.metrics.clustered import NAN
from dgd_lightning.run_folder import batch_share


class Cost(NamedTuple):
    """What a row cost: its share of the decode time of the batch it was decoded in, prefill excluded.

    Where a method chooses among several answers: the share of all of them, and the time of choosing.
    """

    tokens: int = 0  # of the answer, committed after the prefill's first token
    seconds: float = 0.0

    def plus(self, other: Cost) -> Cost:
        return Cost(self.tokens + other.tokens, self.seconds + other.seconds)

    @property
    def speed(self) -> float:
        """Tokens per second; NaN where no time was spent."""
        return self.tokens / self.seconds if self.seconds > 0 else NAN


class ArmStats:
    """Everything of one arm; adding a row and reading a number cost the same after ten rows and after ten thousand.

    ``record``: ``dgd`` of any of its rows.
    """

    def __init__(self, record: dict[str, Any]) -> None:
        self.name: str = record["arm"]
        self.baseline, self.lossless = bool(record["baseline"]), bool(record["lossless"])
        # Only arms that share what shapes the distribution of their output are compared in speed.
        self.sampling = (record["temperature"], record["top_k"], record["top_p"])
        self.block_size: int = record["block_size"] or 1  # K; 1 where nothing is drafted
        self.tasks = self.skipped = self.tokens = self.answered = 0
        self.chooses = False  # among several answers per task
        self.draws_more = False  # than the tokens that it returns
        self.spent = [0, 0]  # forwards of target and draft, counted per row, for all that was decoded and ranked
        self.macro_sum = 0.0
        self.histogram = torch.zeros(self.block_size + 1, dtype=torch.long)  # [K + 1] counts of acceptance lengths
        self.verified = torch.zeros(self.block_size + 1, dtype=torch.long)  # [K + 1] counts of verified lengths
        self.costs: dict[str, Cost] = {}  # by idx; seconds are NaN where other arms were in the batch
        self.total = Cost()
        self.shared = Cost()  # of rows that were decoded together with other arms
        # By baseline, of the tasks that both did: sums of its own and of the baseline's costs.
        self.common: dict[str, tuple[Cost, Cost]] = defaultdict(lambda: (Cost(), Cost()))

    def add(self, row: dict[str, Any]) -> None:
        """Adds a prediction row of this arm."""
        record = row["dgd"]
        if "skipped" in record:
            self.skipped += 1
            return
        lengths = record["acceptance_lengths"]
        self.tasks += 1
        self.tokens += record["tokens"]
        self.chooses |= "answers" in record
        self.draws_more |= "answers" in record or record["tokens"] - 1 < sum(lengths)
        spent = record.get("spent_forwards") or {one: record.get(f"{one}_forwards", 0) for one in ("target", "draft")}
        self.spent = [self.spent[0] + spent["target"], self.spent[1] + spent["draft"]]
        if lengths:
            self.answered += 1
            self.macro_sum += sum(lengths) / len(lengths)
        self.histogram += length_histogram(lengths, self.block_size)
        self.verified += length_histogram(record["verified_lengths"], self.block_size)
        seconds = record["decode_seconds"] * batch_share(record) + record.get("rank_seconds", 0.0)
        cost = Cost(record["tokens"] - 1, seconds)
        if record.get("joined_with"):  # one arm more would have cost next to nothing: no arm has a speed of its own
            self.shared = self.shared.plus(cost)
            cost = cost._replace(seconds=NAN)
        self.costs[row["idx"]] = cost
        self.total = self.total.plus(cost)

    def compare(self, base: ArmStats, idx: str) -> None:
        """Adds a task that this arm and a baseline have both done, once."""
        own, other = self.common[base.name]
        self.common[base.name] = own.plus(self.costs[idx]), other.plus(base.costs[idx])

    @property
    def tau(self) -> Tau:
        """τ, micro and macro."""
        return Tau(tau_of_histogram(self.histogram), self.macro_sum / self.answered if self.answered else NAN)

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


def collect(stats: dict[str, ArmStats], row: dict[str, Any]) -> None:
    """Adds a row to its arm's stats, which are made where they are missing, and to the sums behind speed-ups."""
    record, idx = row["dgd"], row["idx"]
    if record["arm"] not in stats:
        stats[record["arm"]] = ArmStats(record)
    arm = stats[record["arm"]]
    arm.add(row)
    if idx not in arm.costs:  # skipped
        return
    for other in stats.values():
        if other.sampling == arm.sampling and idx in other.costs:
            if other.baseline:
                arm.compare(other, idx)
            if arm.baseline and other is not arm:
                other.compare(arm, idx)


def baseline_of(arm: ArmStats, stats: Mapping[str, ArmStats]) -> ArmStats | None:
    """The first arm that speed-ups of this one may refer to: it has the same temperature, top_k and top_p."""
    return next((base for base in stats.values() if base.baseline and base.sampling == arm.sampling), None)


def speed_up(arm: ArmStats, stats: Mapping[str, ArmStats]) -> float:
    """Tokens per second over those of the arm's baseline, over the tasks both did; NaN where there is no baseline."""
    base = baseline_of(arm, stats)
    own, other = arm.common[base.name] if base is not None else (Cost(), Cost())
    return own.speed / other.speed if other.speed else NAN


def scalars(arm: ArmStats, stats: Mapping[str, ArmStats]) -> dict[str, float]:
    """An arm's numbers by the names that curves have; NaN where there is none."""
    values = {
        "tau_micro": arm.tau.micro,
        "tau_macro": arm.tau.macro,
        "tokens_per_second": arm.tokens_per_second,
        "speed_up": speed_up(arm, stats),
    }
    for name, rates in (("acceptance", arm.rates.overall), ("acceptance_given_reached", arm.rates.given_reached)):
        values |= {f"{name}/slot_{slot:02d}": rate for slot, rate in enumerate(rates.tolist(), 1)}
    return values
