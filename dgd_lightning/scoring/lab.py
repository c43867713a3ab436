"""`LabGrader`: the lab's rubrics, checked by a program; no judge is asked."""

from __future__ import annotations

from typing import Any

from dgd_lightning.lab.checks import grade, has_checks
from dgd_lightning.scoring.grader import Grader
from dgd_lightning.types import Score


class LabGrader(Grader):
    """Rows of the lab's worlds: solved where every rubric's check holds."""

    name = "lab"

    def takes(self, row: dict[str, Any]) -> bool:
        """See `Grader.takes`."""
        return has_checks(row)

    def grade(self, row: dict[str, Any], answer: str) -> Score:
        """See `Grader.grade`; ``status`` has an entry per rubric."""
        return grade(row, answer)

    def fingerprint(self) -> dict[str, Any]:
        """See `Grader.fingerprint`."""
        return {"grader": self.name}
