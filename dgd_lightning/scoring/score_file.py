"""``scores.jsonl``: a score per line, appended and on the disk as soon as it is made; read with damage in it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import IO, Any, NamedTuple

from dgd_lightning import run_folder
from dgd_lightning.types import Score

Key = run_folder.Key


class Record(NamedTuple):
    """One line of ``scores.jsonl``."""

    idx: str
    arm: str
    key: str  # hash of the row and of all that can change its score
    score: float | None
    requirement_status: list[str]
    grading_rationale: str
    grader: str
    details: dict[str, Any] | None


def record_of(place: Key, key: str, grader: str, score: Score) -> Record:
    """What is kept of a score."""
    return Record(*place, key, score.value, score.status, score.rationale, grader, score.details)


def finished(record: Record) -> bool:
    """Whether nothing about a row is left to be asked."""
    details = record.details or {}
    second = details.get("second") or {"score": 0}  # a second judge that failed is asked again
    return None not in (record.score, details.get("error_class", ""), second["score"])


def read_scores(path: Path) -> dict[Key, Record]:
    """The last score of every row; a torn or damaged line is left out, so that its row is graded again."""
    found: dict[Key, Record] = {}
    if path.exists():
        with path.open("rb") as file:
            for line in file:
                with contextlib.suppress(ValueError, TypeError):
                    record = Record(**json.loads(line))
                    found[record.idx, record.arm] = record
    return found


class Out:
    """``scores.jsonl``, open for appending; a line that a killed process left torn is cut off."""

    def __init__(self, path: Path) -> None:
        self.path, self.failed = path, False
        self.file: IO[bytes] = run_folder.open_shard(path)

    def append(self, record: Record) -> None:
        """Returns when the record is on the disk.

        Raises:
            InputError: it can't be written; what was written before is whole.
        """
        try:
            run_folder.append(self.file, [record._asdict()])
        except OSError as error:
            self.failed = True  # the line may be torn: nothing may follow it in this process
            raise run_folder.unwritable(self.path, error) from error

    def close(self) -> None:
        """Let go of the file and of its lock."""
        with contextlib.suppress(OSError):  # what a full disk did not take: `append` has told of it
            self.file.close()
