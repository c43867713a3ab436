"""``scores.jsonl``: a score per line, appended and on the disk as soon as it is made; read with damage in it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from dgd_lightning import jsonl, run_folder
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


def score_of(record: Record) -> Score:
    """The score that a record keeps."""
    return Score(record.score, record.requirement_status, record.grading_rationale, record.details)


def finished(record: Record) -> bool:
    """Whether nothing about a row is left to be asked."""
    details = record.details or {}
    second = details.get("second") or {"score": 0}  # a second judge that failed is asked again
    return None not in (record.score, details.get("error_class", ""), second["score"])


def read_scores(path: Path) -> dict[Key, Record]:
    """The last score of every row; a torn or damaged line is left out, so that its row is graded again."""
    found: dict[Key, Record] = {}
    if path.exists():
        for line in jsonl.lines(path):
            with contextlib.suppress(ValueError, TypeError):
                record = Record(**json.loads(line.text))
                found[record.idx, record.arm] = record
    return found
