"""`CaseStudies`: a page with the tasks on which the arms differ most, made when a predict run ends."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

from dgd_lightning import run_folder
from dgd_lightning.callbacks.rows import FinishedRows
from dgd_lightning.checks import check_integer
from dgd_lightning.report.case_studies import LIMIT, write_case_studies


class CaseStudies(FinishedRows):
    """Writes ``case_studies.html`` into the run folder: answers side by side, tokens coloured by correction.

    Colours and likeliest tokens need ``model.divergence``; verdicts need rows with program checks (the lab's).
    ``python -m dgd_lightning.report.case_studies RUN_FOLDER`` makes the page of a finished run.

    Args:
        limit: most tasks on the page.

    Raises:
        InputError: a limit that shows nothing.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = check_integer("CaseStudies.limit", limit, hint=f"use e.g. {LIMIT}")

    def finish(self, trainer: Trainer, module: Any) -> None:
        """Reads the merged predictions."""
        path = write_case_studies(self.folder, lambda: run_folder.read_predictions(self.folder), self.limit)
        module.summary.pointers.append(f"case studies: {path}")
