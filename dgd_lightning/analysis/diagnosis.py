"""From a diagnostic's rows to its numbers: every reader in every bucket, against target, draft and random features."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dgd_lightning.metrics.diagnosis import (
    ADAPTED,
    DRAFT,
    RANDOM,
    SHUFFLED,
    TARGET,
    AnswerTokens,
    By,
    Placement,
    Reader,
    Verdict,
    Wins,
    bucket_names,
    bucket_of,
    placement,
    verdict,
    wins,
)
from dgd_lightning.scoring.summary import plain

ALL = "all tokens"
MAIN = (DRAFT, ADAPTED, SHUFFLED, RANDOM)


class Cell(NamedTuple):
    """One reader on the tokens of one bucket; comparisons are None with itself."""

    placement: Placement
    rank: Wins | None  # against the target
    probability: Wins | None  # against the target
    control: Wins | None  # against random features, by rank
    draft: Wins | None  # against the draft, by rank; of further readers only


class Diagnosis(NamedTuple):
    """All numbers of a run."""

    cells: dict[str, dict[str, Cell]]  # [bucket or ALL][reader]
    buckets: list[str]  # names; the first decides
    tokens: AnswerTokens
    bucket: np.ndarray  # [T]
    verdicts: list[Verdict]
    tasks: int
    skipped: int
    contexts: int
    kept: int | None  # contexts whose adapter was kept; None without test-time training
    further: list[str]  # readers that the user added

    @property
    def unsure(self) -> dict[str, Cell]:
        """The cells that decide."""
        return self.cells[self.buckets[0]]

    def group(self, prefix: str) -> list[str]:
        """Readers called ``layer 0``, ``slot 2`` …, by number."""
        return [name for name in self.cells[ALL] if name.startswith(prefix + " ") and name not in self.further]


def diagnose(rows: Iterable[dict[str, Any]], edges: Sequence[float], further: Sequence[str] = ()) -> Diagnosis:
    """Sums the rows of `dgd test` with a diagnostic up.

    ``edges``: of the buckets of the target's confidence; ``further``: readers that are compared with the draft too.
    """
    confidence: list[float] = []
    context: list[int] = []
    numbers: dict[str, int] = {}
    notes: dict[str, tuple[list[Any], list[Any]]] = {}
    adapted: dict[str, bool] = {}
    tasks = skipped = 0
    for row in rows:
        record = row["dgd"]
        if "skipped" in record:
            skipped += 1
            continue
        tasks += 1
        context += [numbers.setdefault(record["context"], len(numbers))] * len(record["confidence"])
        confidence += record["confidence"]
        for name, reader in record["readers"].items():
            rank, log_probability = notes.setdefault(name, ([], []))
            rank += reader["rank"]
            log_probability += reader["log_probability"]
        if record["ttt"] is not None:
            adapted[record["context"]] = record["ttt"]["kept"]
    readers = {name: Reader(*(np.array(values, dtype=float) for values in note)) for name, note in notes.items()}
    tokens = AnswerTokens(np.array(context, dtype=int), np.array(confidence, dtype=float), readers)
    bucket, names = bucket_of(tokens.confidence, edges), bucket_names(edges)
    masks = {name: bucket == number for number, name in enumerate(names)} | {ALL: np.ones(len(bucket), dtype=bool)}
    order = list(dict.fromkeys([*(name for name in (TARGET, *MAIN) if name in readers), *readers]))
    cells = {name: _cells(tokens.part(mask), order, further) for name, mask in masks.items()}
    verdicts = []
    for name, called in ((DRAFT, DRAFT), (ADAPTED, "adapted draft")):
        if name in readers:
            cell = cells[names[0]][name]
            assert cell.rank is not None
            assert cell.control is not None
            verdicts.append(verdict(called, cell.rank, cell.control, names[0]))
    kept = sum(adapted.values()) if adapted else None
    return Diagnosis(cells, names, tokens, bucket, verdicts, tasks, skipped, len(numbers), kept, list(further))


def _cells(part: AnswerTokens, order: Sequence[str], further: Sequence[str]) -> dict[str, Cell]:
    def against(name: str, other: str, by: By = "rank") -> Wins | None:
        return None if name == other else wins(part.readers[name], part.readers[other], part.context, by=by)

    return {
        name: Cell(
            placement(part.readers[name]),
            against(name, TARGET),
            against(name, TARGET, "probability"),
            against(name, RANDOM),
            against(name, DRAFT) if name in further else None,
        )
        for name in order
    }


def summary(found: Diagnosis) -> dict[str, Any]:
    """Everything as plain JSON values, NaN as null."""
    return {
        "verdicts": [one._asdict() for one in found.verdicts],
        "tasks": found.tasks,
        "skipped": found.skipped,
        "contexts": found.contexts,
        "adapters_kept": found.kept,
        "deciding_bucket": found.buckets[0],
        "buckets": {where: {name: plain(cell) for name, cell in cells.items()} for where, cells in found.cells.items()},
    }
