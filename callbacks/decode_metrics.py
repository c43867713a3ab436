"""`DecodeMetrics`: τ, acceptance, throughput and speed-up into TensorBoard while running, and a table at the end."""

from __future__ import annotations

import sys
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dgd_lightning import run_folder
from dgd_lightning.callbacks.arm_stats import ArmStats, Cost, collect, speed_up
from dgd_lightning.callbacks.curve import acceptance_figure, bar_line
from dgd_lightning.callbacks.prediction_writer import written_before
from dgd_lightning.report.print_tables import print_tables


class DecodeMetrics(Callback):
    """Logs per arm: τ micro and macro, acceptance per slot, tokens/s, speed-up, histogram, curve, sample texts.

    The x axis of the live curves counts tasks. The final numbers come from the merged predictions, so they cover rows
    of all ranks and of earlier sessions of the run.

    Args:
        samples: tasks whose answers are shown in TensorBoard.
    """

    def __init__(self, samples: int = 4) -> None:
        self.samples = samples
        self.stats: dict[str, ArmStats] = {}
        self.folder = Path()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes up the rows of an earlier session.

        Raises:
            InputError: no `PredictionWriter` comes before this callback.
        """
        if stage != "predict":
            return
        self.stats, self.folder = {}, written_before(trainer, self)
        if trainer.is_global_zero:
            for row in run_folder.rows_so_far(self.folder):
                collect(self.stats, row)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Live curves, of rank 0's own rows."""
        if not trainer.is_global_zero or not outputs:
            return
        for row in outputs:
            if run_folder.key(row) not in pl_module.done:  # type: ignore[operator]  # else counted in `setup`
                collect(self.stats, row)
        if (writer := _writer(trainer)) is not None:
            for arm in self.stats.values():
                _scalars(writer, arm, self.stats, step=arm.tasks + arm.skipped)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Final numbers from the merged predictions."""
        if not trainer.is_global_zero:
            return
        self.stats = {}
        samples: list[dict[str, Any]] = []
        for row in run_folder.read_predictions(self.folder):
            collect(self.stats, row)
            if len(samples) < self.samples * len(pl_module.arms):  # type: ignore[arg-type]
                samples.append(row)
        if (writer := _writer(trainer)) is not None:
            _final(writer, self.stats, samples)
        total = len(trainer.datamodule.tasks)  # type: ignore[attr-defined]
        tables = [summary_table(self.stats, total), *notes(self.stats), *histogram_tables(self.stats)]
        for table in reversed(tables):
            pl_module.summary_tables.insert(0, table)  # type: ignore[union-attr,operator]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prints what this and other callbacks put into ``pl_module.summary_tables``, once all of them have."""
        if stage != "predict" or not trainer.is_global_zero:
            return
        console = Console(width=None if sys.stdout.isatty() else 120, markup=False, emoji=False)
        print_tables(console, pl_module.summary_tables)  # type: ignore[arg-type]
        print(f"run folder: {self.folder}")
        print(f"curves:     tensorboard --logdir {self.folder.parent}")


def summary_table(stats: dict[str, ArmStats], total: int) -> Table:
    """One line per arm.

    Args:
        stats: by arm name.
        total: tasks of the data.
    """
    table = Table(title="Decoding", title_justify="left")
    for column in ("arm", "tasks", "tokens", "τ micro", "τ macro", "tokens/s", "speed-up", "acceptance by slot"):
        table.add_column(column, justify="left" if column in ("arm", "acceptance by slot") else "right")
    for arm in stats.values():
        tasks = f"{arm.tasks}/{total}" + (f" ({arm.skipped} skipped)" if arm.skipped else "")
        numbers = [arm.tau.micro, arm.tau.macro, arm.tokens_per_second, speed_up(arm, stats)]
        formats = ("{:.2f}", "{:.2f}", "{:.1f}", "{:.2f}×")
        cells = [
            form.format(number) if number == number else "–" for form, number in zip(formats, numbers, strict=True)
        ]
        table.add_row(arm.name, tasks, f"{arm.tokens:,}", *cells, bar_line(arm.rates.overall.tolist()))
    return table


def notes(stats: dict[str, ArmStats]) -> list[Text]:
    """What the table's speeds mean, of arms that were decoded together and of reranked ones."""
    lines = []
    shared = [arm.shared for arm in stats.values() if arm.shared.tokens]
    if shared:
        whole = reduce(Cost.plus, shared)
        lines.append(
            f"{len(shared)} arms were decoded together, {whole.tokens:,} tokens in {whole.seconds:.1f} s "
            f"({whole.speed:.1f} tokens/s): none has a speed of its own."
        )
    if any(arm.method == "rerank" for arm in stats.values()):
        lines.append("Reranked arms: τ and tokens are the chosen answers'; tokens/s counts the time of all answers.")
    return [Text(line) for line in lines]


def histogram_tables(stats: dict[str, ArmStats]) -> list[Table]:
    """How many tokens the verifications committed, a line per drafting arm; no table where no arm drafts."""
    drafting = [arm for arm in stats.values() if arm.block_size > 1 and arm.histogram.sum() > 0]
    if not drafting:
        return []
    table = Table(title="Tokens per verification (share of verifications)", title_justify="left")
    table.add_column("arm")
    for length in range(1, max(arm.block_size for arm in drafting) + 1):
        table.add_column(str(length), justify="right")
    for arm in drafting:
        shares = arm.histogram[1:] / arm.histogram.sum()
        table.add_row(arm.name, *(f"{100 * share:.0f}%" for share in shares.tolist()))
    return [table]


def _writer(trainer: Trainer) -> Any:
    """TensorBoard's writer, or None where the user chose another logger or none."""
    logger = trainer.logger
    return logger.experiment if isinstance(logger, TensorBoardLogger) else None


def _scalars(writer: Any, arm: ArmStats, stats: dict[str, ArmStats], step: int) -> None:
    values = {
        "tau_micro": arm.tau.micro,
        "tau_macro": arm.tau.macro,
        "tokens_per_second": arm.tokens_per_second,
        "speed_up": speed_up(arm, stats),
    }
    for slot, rate in enumerate(arm.rates.overall.tolist(), 1):
        values[f"acceptance/slot_{slot:02d}"] = rate
    for slot, rate in enumerate(arm.rates.given_reached.tolist(), 1):
        values[f"acceptance_given_reached/slot_{slot:02d}"] = rate
    for name, value in values.items():
        if value == value:  # NaN: nothing to draw
            writer.add_scalar(f"{arm.name}/{name}", value, step)


def _final(writer: Any, stats: dict[str, ArmStats], samples: list[dict[str, Any]]) -> None:
    for arm in stats.values():
        step = arm.tasks + arm.skipped
        _scalars(writer, arm, stats, step)
        if len(arm.lengths):
            bins = [length + 0.5 for length in range(arm.block_size + 1)]
            writer.add_histogram(f"{arm.name}/acceptance_length", arm.lengths.numpy(), step, bins=np.array(bins))
    drafting = [arm for arm in stats.values() if arm.block_size > 1 and arm.verified.any()]
    if drafting:
        writer.add_figure("acceptance_curve", acceptance_figure(drafting), max(arm.tasks for arm in drafting))
    for row in samples:
        text = "\n".join(f"    {line}" for line in str(row["model_output"]).splitlines())  # Markdown: shown as it is
        writer.add_text(f"sample {row['idx']}/{row['dgd']['arm']}", text)
    writer.flush()
