"""`AsGraded`: rows that CL-bench's own evaluation (or an earlier run) has graded already keep their score."""

from __future__ import annotations

from typing import Any

from dgd_lightning.scoring.grader import Grader
from dgd_lightning.types import Score


class AsGraded(Grader):
    """Reads ``score``, ``requirement_status`` and ``grading_rationale`` of a row; asks nobody."""

    name = "as graded"

    def takes(self, row: dict[str, Any]) -> bool:
        """See `Grader.takes`: a row without a score, or with one that failed, is for another grader."""
        score = row.get("score")
        return isinstance(score, int | float) and not isinstance(score, bool) and "grading_rationale" in row

    def grade(self, row: dict[str, Any], answer: str) -> Score:
        """See `Grader.grade`."""
        status = [str(one).strip().lower() for one in row.get("requirement_status") or []]
        return Score(float(row["score"]), status, str(row["grading_rationale"]))

    def fingerprint(self) -> dict[str, Any]:
        """See `Grader.fingerprint`."""
        return {"grader": self.name}
