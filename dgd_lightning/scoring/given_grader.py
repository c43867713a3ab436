"""`AsGraded`: rows that CL-bench's own evaluation (or an earlier run) has graded already keep their score."""

from collections.abc import Mapping
from typing import Any, Self

from dgd_lightning.grader import READ, Grader
from dgd_lightning.scoring.graded import read_score
from dgd_lightning.types import Score


class AsGraded(Grader):
    """Reads ``score``, ``requirement_status`` and ``grading_rationale`` of a row; asks nobody."""

    name, cost = "as graded", READ

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self | None:
        return None if options.get("regrade") else cls()

    def takes(self, row: dict[str, Any]) -> bool:
        """See `Grader.takes`: a row without a score, or with one that failed, is for another grader."""
        return "grading_rationale" in row and read_score(row).value is not None

    def grade(self, row: dict[str, Any], answer: str) -> Score:
        return read_score(row)

    def fingerprint(self) -> dict[str, Any]:
        return {"grader": self.name}
