"""`DiagnosticReport`: from the rows of a diagnostic to its table, its pictures and a verdict in plain words."""

import io
import json
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console

from dgd_lightning import run_folder
from dgd_lightning.analysis.diagnosis import Diagnosis, diagnose, summary
from dgd_lightning.callbacks.rows import add_scalars, tensorboard, written_folder
from dgd_lightning.files import whole_files
from dgd_lightning.report.diagnostic_figures import figures
from dgd_lightning.report.diagnostic_tables import report
from dgd_lightning.report.print_tables import print_tables

REPORT, SUMMARY, PLOTS = "diagnostic.txt", "diagnostic_summary.json", "plots"
WIDTH = 132  # columns of the tables where stdout is no terminal, and of the file


class DiagnosticReport(Callback):
    """Reads `diagnostic.jsonl` when all is there, so that it covers all ranks and all sessions of the run.

    It prints a table and the verdict (all tables with ``--verbose``), and writes the whole to `diagnostic.txt`; all
    numbers to `diagnostic_summary.json`; pictures to `plots/` and TensorBoard.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.found: Diagnosis | None = None

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.folder = written_folder(trainer)
        if not trainer.is_global_zero or self.folder is None:
            return
        rows = run_folder.read_predictions(self.folder, run_folder.DIAGNOSTIC)
        self.found = found = diagnose(rows, pl_module.edges, list(pl_module.readouts))
        if not found.tasks:
            return
        plain = Console(file=io.StringIO(), width=WIDTH)
        print_tables(plain, report(found, whole=True))
        pictures = figures(found)
        with whole_files(self.folder, REPORT, SUMMARY) as scratch:
            (scratch / REPORT).write_text(plain.file.getvalue(), encoding="utf-8")  # type: ignore[attr-defined]
            (scratch / SUMMARY).write_text(json.dumps(summary(found), indent=1, allow_nan=False) + "\n")
        (self.folder / PLOTS).mkdir(exist_ok=True)
        for name, figure in pictures.items():
            figure.savefig(self.folder / PLOTS / f"{name}.png", dpi=150)
        if (writer := tensorboard(trainer)) is not None:
            _log(writer, found, pictures)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prints the report, after the progress bar has gone."""
        if stage != "test" or self.found is None or self.folder is None:
            return
        if not self.found.tasks:
            print(f"no answer fits the target: {self.found.skipped} tasks were skipped")
        else:
            shown = report(self.found, whole=getattr(pl_module, "verbose", False))
            print_tables(Console(width=None if sys.stdout.isatty() else WIDTH), shown)
            print(f"all tables: {self.folder / REPORT}")
            print(f"pictures:   {self.folder / PLOTS}")
        print(f"run folder: {self.folder}")
        print(f"curves:     tensorboard --logdir {self.folder.parent}")


def _log(writer: Any, found: Diagnosis, pictures: dict[str, Any]) -> None:
    """Everything that the tables hold, into TensorBoard; the x axis counts tasks."""
    for bucket, cells in found.cells.items():
        for name, cell in cells.items():
            won = {"net_rank": cell.rank, "net_probability": cell.probability, "net_control": cell.control}
            values = {"top_1": cell.placement.top_1, "mean_rank": cell.placement.mean_rank}
            values |= {what: one.net.value for what, one in won.items() if one is not None}
            add_scalars(writer, {f"{what}/{bucket}": value for what, value in values.items()}, found.tasks, f"{name}/")
    for name, figure in pictures.items():
        writer.add_figure(f"diagnostic/{name}", figure, found.tasks, close=False)
    writer.add_text("verdict", "\n\n".join(one.text for one in found.verdicts))
    writer.flush()
