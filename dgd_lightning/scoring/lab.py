"""`LabGrader`: the lab's rubrics, checked by a program; no judge is asked."""

from __future__ import annotations

from typing import Any

from dgd_lightning.lab.checks import grade, has_checks
from dgd_lightning.scoring.grader import Grader
from dgd_lightning.scoring.taxonomy import VERSION, lab_error
from dgd_lightning.types import Score


class LabGrader(Grader):
    """Rows of the lab's worlds: solved where every rubric's check holds."""

    name = "lab"

    def takes(self, row: dict[str, Any]) -> bool:
        """See `Grader.takes`."""
        return has_checks(row)

    def grade(self, row: dict[str, Any], answer: str) -> Score:
        """See `Grader.grade`; ``status`` has an entry per rubric, ``details`` the error class of a failed answer."""
        try:
            return with_class(row, answer, grade(row, answer))
        except (ValueError, LookupError, TypeError, AttributeError) as error:  # checks that nobody here wrote
            return Score(None, [], f"lab_error: {type(error).__name__}: {error}")

    def fingerprint(self) -> dict[str, Any]:
        """See `Grader.fingerprint`."""
        return {"grader": self.name, "taxonomy": VERSION}


def with_class(row: dict[str, Any], answer: str, score: Score) -> Score:
    """The score of a lab answer, with its error class in ``details`` where it failed."""
    if score.value is None or score.value == 1.0:
        return score
    return score._replace(details={**(score.details or {}), "error_class": lab_error(row, answer)})
