"""`AsGraded`: rows that CL-bench's own evaluation (or an earlier run) has graded already keep their score."""

from __future__ import annotations

from typing import Any

from dgd_lightning.lab.checks import has_checks
from dgd_lightning.scoring.graded import read_score
from dgd_lightning.scoring.grader import Grader
from dgd_lightning.scoring.lab import with_class
from dgd_lightning.types import Score


class AsGraded(Grader):
    """Reads ``score``, ``requirement_status`` and ``grading_rationale`` of a row; asks nobody."""

    name = "as graded"

    def takes(self, row: dict[str, Any]) -> bool:
        """See `Grader.takes`: a row without a score, or with one that failed, is for another grader."""
        return "grading_rationale" in row and read_score(row).value is not None

    def grade(self, row: dict[str, Any], answer: str) -> Score:
        """See `Grader.grade`."""
        score = read_score(row)
        return with_class(row, answer, score) if has_checks(row) else score

    def fingerprint(self) -> dict[str, Any]:
        """See `Grader.fingerprint`."""
        return {"grader": self.name}
