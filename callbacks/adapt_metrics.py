"""`AdaptMetrics`: what test-time training gained in predict: Δτ per context and in sum, held-out scores, its cost."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Trainer

from dgd_lightning import run_folder
from dgd_lightning.analysis import adaptation
from dgd_lightning.analysis.adaptation import SECONDS, Counts, Gain, Record, gain_of, is_scored
from dgd_lightning.callbacks.rows import FinishedRows, tensorboard
from dgd_lightning.report.figures import held_out_figure, tau_figure
from dgd_lightning.report.run_tables import adaptation_table, gain_table
from dgd_lightning.report.sentences import adaptation_sentences


class AdaptMetrics(FinishedRows):
    """Compares every arm that adapts (``ttt``, ``online_every`` or both) with the arm that differs in nothing else.

    τ is compared per context and pooled, with a 95% bootstrap interval over contexts; adaptations are summed up by how
    many were kept, the scores of the held-out texts before and after, and their cost. The numbers come from the merged
    predictions, so they cover all ranks and all sessions of the run.
    """

    def finish(self, trainer: Trainer, module: Any) -> None:
        """Adds a sentence, tables, curves and pictures."""
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
            _log(writer, counts, list(records.values()), gains)


def _log(writer: Any, counts: Counts, records: Sequence[Record], gains: Sequence[Gain]) -> None:
    for found in gains:
        arm, base, gain, contexts = found
        for name in ("difference", "ratio", "median"):
            for part, value in getattr(gain, name)._asdict().items():
                writer.add_scalar(f"{arm}/tau_gain_{name}/{part}", value, gain.contexts)
        writer.add_scalar(f"{arm}/tau_gain_worst", gain.worst, gain.contexts)
        for number, context in enumerate(contexts):
            delta = counts[arm][context].tau - counts[base][context].tau
            writer.add_scalar(f"{arm}/tau_gain_by_context", delta, number)
        writer.add_figure(f"{arm}/tau_by_context", tau_figure(counts, found), len(contexts))
    for number, record in enumerate(records):
        if not is_scored(record):
            continue
        for when in ("before", "after"):
            score = record[f"held_out_{when}"]
            for name in ("loss", "tau"):
                writer.add_scalar(f"ttt/held_out_{name}_{when}", score[name], number)
            for slot, rate in enumerate(score["acceptance"], 1):
                writer.add_scalar(f"ttt/held_out_acceptance_{when}/slot_{slot:02d}", rate, number)
        for name in SECONDS:
            writer.add_scalar(name.replace("ttt_", "ttt/", 1), record[name], number)
    if scored := list(filter(is_scored, records)):
        writer.add_figure("ttt/held_out_acceptance", held_out_figure(scored), len(scored))
    writer.flush()
