"""`DecodeMetrics`: τ, acceptance, throughput and speed-up into TensorBoard; the run's summary at the end."""

import textwrap
from typing import Any

import numpy as np
from lightning.pytorch import Trainer

from dgd_lightning.analysis.arms import ArmStats, collect, scalars
from dgd_lightning.callbacks.rows import RowSums, add_scalars, tensorboard
from dgd_lightning.report.figures import acceptance_figure
from dgd_lightning.report.run_summary import add_decoding, finish
from dgd_lightning.report.run_tables import decoding_table, histogram_tables, notes
from dgd_lightning.report.sentences import speed_sentences, ungraded_sentences


class DecodeMetrics(RowSums):
    """Logs per arm: τ micro and macro, acceptance per slot, tokens/s, speed-up, histogram, curve, sample texts.

    The x axis of the live curves counts tasks. When all callbacks are done, it prints the run's summary.

    Args:
        samples: tasks whose answers are shown in TensorBoard.
    """

    def __init__(self, samples: int = 4) -> None:
        super().__init__(samples)
        self.stats: dict[str, ArmStats] = {}

    def reset(self) -> None:
        self.stats = {}

    def add(self, row: dict[str, Any]) -> None:
        collect(self.stats, row)

    def draw(self, writer: Any) -> None:
        for arm in self.stats.values():
            add_scalars(writer, scalars(arm, self.stats), arm.tasks + arm.skipped, f"{arm.name}/")

    def finish(self, trainer: Trainer, module: Any) -> None:
        """Final curves and pictures; the table's first columns, sentences about speed, tables in detail."""
        if (writer := tensorboard(trainer)) is not None:
            self._log(writer)
        total = len(trainer.datamodule.tasks)  # type: ignore[attr-defined]
        add_decoding(module.summary, self.stats, total)
        module.summary.sentences += speed_sentences(self.stats)
        module.summary.details += [decoding_table(self.stats, total), *notes(self.stats), *histogram_tables(self.stats)]

    def _log(self, writer: Any) -> None:
        self.draw(writer)
        for arm in self.stats.values():
            if len(arm.lengths):
                bins = np.arange(arm.block_size + 1) + 0.5
                step = arm.tasks + arm.skipped
                writer.add_histogram(f"{arm.name}/acceptance_length", arm.lengths.numpy(), step, bins=bins)
        drafting = [arm for arm in self.stats.values() if arm.block_size > 1 and arm.verified.any()]
        if drafting:
            writer.add_figure("acceptance_curve", acceptance_figure(drafting), max(arm.tasks for arm in drafting))
        for row in self.sampled:
            text = textwrap.indent(str(row["model_output"]), "    ", lambda line: True)  # Markdown: shown as it is
            writer.add_text(f"sample {row['idx']}/{row['dgd']['arm']}", text)
        writer.flush()

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Writes and prints what this and other callbacks put into ``pl_module.summary``, once all of them have."""
        if stage != "predict" or not trainer.is_global_zero:
            return
        summary = pl_module.summary
        if not any("solved" in cells for cells in summary.cells.values()):
            summary.sentences += ungraded_sentences(self.stats)
        finish(summary, self.folder, verbose=getattr(pl_module, "verbose", False))
        print(f"run folder: {self.folder}")
        print(f"curves:     tensorboard --logdir {self.folder.parent}")
