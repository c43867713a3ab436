"""`DecodeMetrics`: τ, acceptance, throughput, speed-up and the run's summary; `AdaptMetrics`: what adapting gained."""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from lightning.pytorch import Trainer

from dgd_lightning import run_folder
from dgd_lightning.analysis import adaptation
from dgd_lightning.analysis.adaptation import SECONDS, Counts, Gain, Record, gain_of, is_scored
from dgd_lightning.analysis.arms import ArmStats, collect, scalars
from dgd_lightning.callbacks.rows import FinishedRows, RowSums, add_scalars, tensorboard
from dgd_lightning.report.figures import acceptance_figure, held_out_figure, tau_figure
from dgd_lightning.report.run_summary import (
    adaptation_sentences,
    add_decoding,
    finish,
    speed_sentences,
    ungraded_sentences,
)
from dgd_lightning.report.run_tables import (
    adaptation_table,
    compute_tables,
    decoding_table,
    gain_table,
    histogram_tables,
    notes,
)
from dgd_lightning.report.words import GRADED


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
        module.summary.details += [decoding_table(self.stats, total), *notes(self.stats), *compute_tables(self.stats)]
        module.summary.details += histogram_tables(self.stats)

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
        if not any(name in cells for cells in summary.cells.values() for name in GRADED):
            summary.sentences += ungraded_sentences(self.stats)
        finish(summary, self.folder, verbose=getattr(pl_module, "verbose", False))
        print(f"run folder: {self.folder}\nanswers:    dgd show {self.folder}")
        print(f"curves:     tensorboard --logdir {self.folder.parent}")


class AdaptMetrics(FinishedRows):
    """Compares every arm that adapts (``ttt``, ``online_every`` or both) with the arm that differs in nothing else.

    τ is compared per context and pooled, with a 95% interval over contexts; adaptations are summed up by how
    many were kept, the scores of the held-out texts before and after, and their cost. The numbers come from the merged
    predictions, so they cover all ranks and all sessions of the run.
    """

    def finish(self, trainer: Trainer, module: Any) -> None:
        pairs = [(arm.name, adaptation.twin(arm, module.arms)) for arm in module.arms if arm.adapts]
        if not pairs:
            return
        counts, records = adaptation.collect(run_folder.read_predictions(self.folder))
        gains = [gain_of(counts, base.name, arm) for arm, base in pairs if base is not None]
        module.summary.sentences += adaptation_sentences(gains, [arm for arm, base in pairs if base is None])
        if gains:
            module.summary.details.append(gain_table(gains))
        if records:
            module.summary.details.append(adaptation_table(adaptation.summed(records.values())))
        if (writer := tensorboard(trainer)) is not None:
            _log_gains(writer, counts, list(records.values()), gains)


def _log_gains(writer: Any, counts: Counts, records: Sequence[Record], gains: Sequence[Gain]) -> None:
    for found in gains:
        arm, base, gain, contexts = found
        for name in ("difference", "ratio", "median"):
            add_scalars(writer, getattr(gain, name)._asdict(), gain.contexts, f"{arm}/tau_gain_{name}/")
        writer.add_scalar(f"{arm}/tau_gain_worst", gain.worst, gain.contexts)
        for number, context in enumerate(contexts):
            delta = counts[arm][context].tau - counts[base][context].tau
            writer.add_scalar(f"{arm}/tau_gain_by_context", delta, number)
        writer.add_figure(f"{arm}/tau_by_context", tau_figure(counts, found), len(contexts))
    for number, record in enumerate(records):
        if not is_scored(record):
            continue
        values = {name.removeprefix("ttt_"): record[name] for name in SECONDS}
        for when in ("before", "after"):
            score = record[f"held_out_{when}"]
            values |= {f"held_out_{name}_{when}": score[name] for name in ("loss", "tau")}
            rates = enumerate(score["acceptance"], 1)
            values |= {f"held_out_acceptance_{when}/slot_{slot:02d}": rate for slot, rate in rates}
        add_scalars(writer, values, number, "ttt/")
    if scored := list(filter(is_scored, records)):
        writer.add_figure("ttt/held_out_acceptance", held_out_figure(scored), len(scored))
    writer.flush()
