"""`CaseStudies`: a page with the tasks on which the arms differ most, made when a predict run ends."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.text import Text

from dgd_lightning import run_folder
from dgd_lightning.callbacks.prediction_writer import written_folder
from dgd_lightning.checks import check_integer
from dgd_lightning.report.case_studies import LIMIT, write_case_studies


class CaseStudies(Callback):
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

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reads the merged predictions."""
        folder = written_folder(trainer)
        if trainer.is_global_zero and folder is not None:
            path = write_case_studies(folder, lambda: run_folder.read_predictions(folder), self.limit)
            pl_module.summary_tables.append(Text(f"case studies: {path}"))  # type: ignore[union-attr,operator]
