"""How far target and readout differ: per-arm sums behind the divergence numbers; made of prediction rows alone."""

import math
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from dgd_lightning.data.tasks import context_of
from dgd_lightning.metrics.clustered import Difference, clustered_mean
from dgd_lightning.metrics.divergence import GroupedMeans, TokenClass, TokenDivergence, token_class
from dgd_lightning.types import Task

CLASSES: tuple[str, ...] = get_args(TokenClass)
# What is averaged over tokens: all that a row holds, the gap of the entropies, and ranks by their logarithms.
NUMBERS = (*(name for name in TokenDivergence._fields if not name.endswith("_rank")), "entropy_gap")
RANKS = ("target_rank", "readout_rank")
COLUMNS = (*NUMBERS, *RANKS)
_SHARES = np.linspace(0, 1, 41)
EDGES = {  # of the histograms; what lies beyond is counted in the outermost bins
    "kl_target_readout": np.array([0, *np.geomspace(1e-3, 1e3, 37)]),
    "kl_readout_target": np.array([0, *np.geomspace(1e-3, 1e3, 37)]),
    "js": np.linspace(0, math.log(2), 41),
    "tv": _SHARES,
    "tv_target_guided": _SHARES,
    "target_prob": _SHARES,
    "readout_prob": _SHARES,
    "entropy_gap": np.linspace(-12, 12, 49),
    "target_rank": 2.0 ** np.arange(19),
    "readout_rank": 2.0 ** np.arange(19),
}


class ArmDivergence:
    """Everything of one arm; adding a row and reading a mean cost the same after ten rows and after ten thousand.

    Positions from ``positions`` − 1 on share the last group.
    """

    def __init__(self, name: str, positions: int) -> None:
        self.name, self.tasks, self.beta = name, 0, 0.0
        # Rows of all ranks come from the run folder, and rank 0 alone adds them up: it must not wait for the others.
        self.classes = GroupedMeans(len(CLASSES), len(COLUMNS), sync_on_compute=False)
        self.positions = GroupedMeans(positions, len(COLUMNS), sync_on_compute=False)
        self.contexts: dict[str, tuple[Tensor, int]] = {}  # sums [n], tokens
        self.histograms = {name: np.zeros(len(edges) - 1, dtype=np.int64) for name, edges in EDGES.items()}

    def add(self, context: str, record: dict[str, Any]) -> None:
        """Adds a row's ``dgd.divergence``."""
        values = columns(record)  # [T, n]
        self.tasks, self.beta = self.tasks + 1, record["beta"]
        kinds = [CLASSES.index(token_class(text)) for text in record["tokens"]]
        self.classes.update(values, torch.tensor(kinds, dtype=torch.long))
        self.positions.update(values, torch.arange(len(values)).clamp(max=len(self.positions.counts) - 1))
        sums, tokens = self.contexts.get(context, (torch.zeros(len(COLUMNS), dtype=torch.float64), 0))
        self.contexts[context] = (sums + values.sum(0), tokens + len(values))
        for name, edges in EDGES.items():
            column = values[:, COLUMNS.index(name)].numpy()
            if name in RANKS:
                column = np.exp(column) + 0.5  # whole numbers would lie on the edges
            self.histograms[name] += np.histogram(column.clip(edges[0], edges[-1]), edges)[0]

    @property
    def tokens(self) -> int:
        return int(self.classes.counts.sum())

    def means(self) -> dict[str, float]:
        """By name, over all tokens; of ranks the geometric mean. NaN where there is no token."""
        return named(self.classes.sums.sum(0) / self.classes.counts.sum())

    def interval(self, name: str) -> Difference:
        """The mean of a number, with a 95% interval over contexts."""
        at, contexts = COLUMNS.index(name), self.contexts.values()
        found = clustered_mean([float(sums[at]) for sums, _ in contexts], [tokens for _, tokens in contexts])
        return Difference(*map(math.exp, found)) if name in RANKS else found

    def by_context(self) -> dict[str, dict[str, float]]:
        """Means of every context."""
        return {context: named(sums / tokens) for context, (sums, tokens) in self.contexts.items()}

    def by_class(self) -> dict[str, dict[str, float]]:
        """Means of every class of which there is a token."""
        found = zip(CLASSES, self.classes.counts.tolist(), self.classes.compute(), strict=True)
        return {name: named(means) for name, count, means in found if count}

    def by_position(self) -> dict[int, dict[str, float]]:
        """Means of every position that has a token, the group of all later ones left out."""
        found = zip(self.positions.counts.tolist()[:-1], self.positions.compute(), strict=False)
        return {position: named(means) for position, (count, means) in enumerate(found) if count}

    def samples(self, name: str) -> np.ndarray:
        """Every token's number, as the middle of its histogram's bin."""
        edges = EDGES[name]
        return np.repeat((edges[:-1] + edges[1:]) / 2, self.histograms[name])


def columns(record: dict[str, Any]) -> Tensor:
    """A row's ``dgd.divergence`` as numbers [T, n] fp64 in the order of ``COLUMNS``; ranks by their logarithms."""
    stored = {
        name: torch.tensor([math.inf if number is None else number for number in record[name]], dtype=torch.float64)
        for name in TokenDivergence._fields
    }
    stored["entropy_gap"] = stored["target_entropy"] - stored["readout_entropy"]
    for name in RANKS:
        stored[name] = stored[name].log()
    return torch.stack([stored[name] for name in COLUMNS], dim=-1)


def named(means: Tensor) -> dict[str, float]:
    """Means [n] by name; of ranks the geometric ones."""
    return {name: math.exp(mean) if name in RANKS else mean for name, mean in zip(COLUMNS, means.tolist(), strict=True)}


def collect(stats: dict[str, ArmDivergence], row: dict[str, Any], positions: int) -> None:
    """Adds a row to its arm's stats, which are made where they are missing; rows without a record add nothing."""
    record, name = row["dgd"].get("divergence"), row["dgd"]["arm"]
    if record:
        context = context_of(Task(row["idx"], None, None, row))
        stats.setdefault(name, ArmDivergence(name, positions)).add(context, record)
