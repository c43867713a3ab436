"""`DiagnosticReport`: from the rows of a diagnostic to its table, its pictures and a verdict in plain words."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console, Group
from rich.text import Text

from dgd_lightning import run_folder
from dgd_lightning.callbacks.diagnosis import ALL, Diagnosis, diagnose, summary
from dgd_lightning.callbacks.diagnostic_figures import figures
from dgd_lightning.callbacks.diagnostic_tables import LEGEND, bucket_table, further_table, reader_table
from dgd_lightning.callbacks.prediction_writer import written_folder
from dgd_lightning.files import whole_files

REPORT, SUMMARY, PLOTS = "diagnostic.txt", "diagnostic_summary.json", "plots"
WIDTH = 132  # columns of the tables where stdout is no terminal, and of the file


class DiagnosticReport(Callback):
    """Reads `diagnostic.jsonl` when all is there, so that it covers all ranks and all sessions of the run.

    It prints the tables and the verdict, and writes them to `diagnostic.txt`; all numbers to
    `diagnostic_summary.json`; pictures to `plots/` and TensorBoard.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.found: Diagnosis | None = None

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reads the rows and writes the files."""
        self.folder = written_folder(trainer)
        if not trainer.is_global_zero or self.folder is None:
            return
        rows = run_folder.read_predictions(self.folder, run_folder.DIAGNOSTIC)
        self.found = found = diagnose(rows, pl_module.edges, list(pl_module.readouts))  # type: ignore[arg-type]
        if not found.tasks:
            return
        plain = Console(file=io.StringIO(), width=WIDTH)
        plain.print(report(found))
        pictures = figures(found)
        with whole_files(self.folder, REPORT, SUMMARY) as scratch:
            (scratch / REPORT).write_text(plain.file.getvalue(), encoding="utf-8")  # type: ignore[attr-defined]
            (scratch / SUMMARY).write_text(json.dumps(summary(found), indent=1, allow_nan=False) + "\n")
        (self.folder / PLOTS).mkdir(exist_ok=True)
        for name, figure in pictures.items():
            figure.savefig(self.folder / PLOTS / f"{name}.png", dpi=150)
        if isinstance(trainer.logger, TensorBoardLogger):
            _log(trainer.logger.experiment, found, pictures)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prints the report, after the progress bar has gone."""
        if stage != "test" or self.found is None or self.folder is None:
            return
        if not self.found.tasks:
            print(f"no answer fits the target: {self.found.skipped} tasks were skipped")
        else:
            Console(width=None if sys.stdout.isatty() else WIDTH).print(report(self.found))
            print(f"pictures:   {self.folder / PLOTS}")
        print(f"run folder: {self.folder}")
        print(f"curves:     tensorboard --logdir {self.folder.parent}")


def report(found: Diagnosis) -> Group:
    """Legend, tables and verdict."""
    unsure = found.buckets[0]
    what = [f"{found.tasks} gold answers of {found.contexts} contexts, {len(found.bucket):,} tokens"]
    if found.kept is not None:
        what.append(f"adapters kept for {found.kept} of them (elsewhere the adapted draft is the draft)")
    if found.skipped:
        what.append(f"{found.skipped} tasks skipped, too long")
    parts: list[Any] = [
        Text("; ".join(what) + ".\n"),
        Text(LEGEND + "\n"),
        reader_table(found, unsure, f"Where the target is unsure (its top-1 token {unsure}): these tokens decide"),
        Text(),
        reader_table(found, ALL, "All answer tokens"),
        Text(),
        bucket_table(found),
    ]
    if found.further:
        parts += [Text(), further_table(found)]
    return Group(*parts, *(Text("\n" + one.text) for one in found.verdicts))


def _log(writer: Any, found: Diagnosis, pictures: dict[str, Any]) -> None:
    """Everything that the table says, into TensorBoard; the x axis counts tasks."""
    for bucket, cells in found.cells.items():
        for name, cell in cells.items():
            scalars = {"first_choice": cell.standing.first_choice, "mean_rank": cell.standing.mean_rank}
            for what in ("rank", "probability", "control"):
                won = getattr(cell, what)
                if won is not None:
                    scalars[f"net_{what}"] = won.net.value
            for what, value in scalars.items():
                if value == value:  # NaN: no token
                    writer.add_scalar(f"{name}/{what}/{bucket}", value, found.tasks)
    for name, figure in pictures.items():
        writer.add_figure(f"diagnostic/{name}", figure, found.tasks, close=False)
    writer.add_text("verdict", "\n\n".join(one.text for one in found.verdicts))
    writer.flush()
