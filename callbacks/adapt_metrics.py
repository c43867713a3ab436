"""`AdaptMetrics`: what test-time training gained in predict: Δτ per context and in sum, held-out scores, its cost."""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.table import Table

from dgd_lightning import run_folder
from dgd_lightning.callbacks.prediction_writer import written_folder
from dgd_lightning.data.tasks import context_of
from dgd_lightning.metrics.paired import Difference, TauGain, Verified, tau_gain
from dgd_lightning.modules.arms import Arm
from dgd_lightning.types import Task

COST = ("ttt_prefill_seconds", "ttt_validation_seconds", "ttt_fit_seconds", "ttt_peak_memory")
Counts = dict[str, dict[str, Verified]]  # [arm][context]


class AdaptMetrics(Callback):
    """Compares every arm that adapts (``ttt``, ``online_every`` or both) with the arm that differs in nothing else.

    τ is compared per context and pooled, with a 95% bootstrap interval over contexts; adaptations are summed up by how
    many were kept, what the held-out texts said before and after, and what they cost. The final numbers come from the
    merged predictions, so they cover all ranks and all sessions of the run.
    """

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reads the predictions and adds tables, curves and pictures."""
        folder = written_folder(trainer)
        arms: list[Arm] = pl_module.arms  # type: ignore[assignment]
        if not trainer.is_global_zero or folder is None or not any(map(adapts, arms)):
            return
        counts, records = collect(folder)
        writer: Any = trainer.logger.experiment if isinstance(trainer.logger, TensorBoardLogger) else None
        tables: list[Table] = pl_module.summary_tables  # type: ignore[assignment]
        compared = [(arm, twin(arm, arms)) for arm in arms if adapts(arm)]
        gains = {
            arm.name: (base.name, gain_of(counts, base.name, arm.name)) for arm, base in compared if base is not None
        }
        if gains:
            tables.append(gain_table(gains))
        if records:
            tables.append(adaptation_table(records))
        if writer is not None:
            _log(writer, counts, records, gains)


def adapts(arm: Arm) -> bool:
    """Whether an arm's draft is trained on the context, while it decodes, or both."""
    return arm.ttt or arm.online_every is not None


def twin(arm: Arm, arms: list[Arm]) -> Arm | None:
    """The arm without adaptation whose other settings are those of an adapting one; None where there is none."""
    return next((other for other in arms if not adapts(other) and _settings(other) == _settings(arm)), None)


def _settings(arm: Arm) -> Arm:
    """An arm without its name and its adaptation."""
    return replace(arm, name="", ttt=False, online_every=None)


def collect(folder: Path) -> tuple[Counts, dict[str, dict[str, Any]]]:
    """Verifications by arm and context, and the record of each context's adaptation."""
    counts: Counts = defaultdict(dict)
    records: dict[str, dict[str, Any]] = {}
    for row in run_folder.read_predictions(folder):
        record = row["dgd"]
        if "skipped" in record:
            continue
        context = context_of(Task(row["idx"], None, None, row))
        arm = counts[record["arm"]]
        arm[context] = arm.get(context, Verified(0, 0)).plus(record["acceptance_lengths"])
        if record.get("ttt"):
            records[context] = {**record["ttt"], **{name: record.get(name) for name in COST}}
    return counts, records


def gain_of(counts: Counts, base: str, arm: str) -> TauGain:
    """τ of an arm against another over the contexts that both decoded."""
    return tau_gain([(counts[base][context], counts[arm][context]) for context in shared(counts, base, arm)])


def shared(counts: Counts, base: str, arm: str) -> list[str]:
    """The contexts in which both arms verified something, in the order of the first."""
    ours, theirs = counts.get(arm, {}), counts.get(base, {})
    nothing = Verified(0, 0)
    return [name for name, one in theirs.items() if one.verifications and ours.get(name, nothing).verifications]


def gain_table(gains: dict[str, tuple[str, TauGain]]) -> Table:
    """One line per adapted arm."""
    table = Table(title="Test-time training: τ, paired by context (95% intervals over contexts)", title_justify="left")
    for column in ("arm", "against", "contexts", "τ before", "τ after", "Δτ", "gain", "median gain", "worst"):
        table.add_column(column, justify="left" if column in ("arm", "against") else "right")
    for arm, (base, gain) in gains.items():
        table.add_row(
            arm,
            base,
            str(gain.contexts),
            _shown(gain.base, "{:.2f}"),
            _shown(gain.tau, "{:.2f}"),
            _cell(gain.difference, "{:+.2f}"),
            _cell(gain.ratio, "{:+.1%}"),
            _cell(gain.median, "{:+.1%}"),
            _shown(gain.worst, "{:+.1%}"),
        )
    return table


def adaptation_table(records: dict[str, dict[str, Any]]) -> Table:
    """What the adaptations were, over all contexts."""
    table = Table(title="Adaptations (means per context)", title_justify="left")
    seconds = {"prefill s": "ttt_prefill_seconds", "validation s": "ttt_validation_seconds", "fit s": "ttt_fit_seconds"}
    for column in ("contexts", "kept", "failed", "held-out loss", "held-out τ", *seconds, "peak MiB"):
        table.add_column(column, justify="right")
    fine = [record for record in records.values() if "error" not in record]
    scored = [record for record in fine if record["held_out_before"]]

    def mean(values: list[float]) -> float:
        return statistics.fmean(values) if values else float("nan")

    def change(key: str) -> str:
        before, after = (mean([record[f"held_out_{when}"][key] for record in scored]) for when in ("before", "after"))
        return f"{before:.2f} → {after:.2f}" if scored else "–"

    peaks = [record["ttt_peak_memory"] for record in fine if record["ttt_peak_memory"] is not None]
    table.add_row(
        str(len(records)),
        str(sum(record["kept"] for record in fine)),
        str(len(records) - len(fine)),
        change("loss"),
        change("tau"),
        *(_shown(mean([record[name] for record in fine]), "{:.2f}") for name in seconds.values()),
        f"{max(peaks) / 2**20:.0f}" if peaks else "–",
    )
    return table


def _cell(difference: Difference, form: str) -> str:
    value = _shown(difference.value, form)
    if difference.low != difference.low:  # NaN: too few contexts
        return value
    return f"{value} [{form.format(difference.low)}, {form.format(difference.high)}]"


def _shown(value: float, form: str) -> str:
    return form.format(value) if value == value else "–"  # NaN: there was nothing to measure


def _log(
    writer: Any, counts: Counts, records: dict[str, dict[str, Any]], gains: dict[str, tuple[str, TauGain]]
) -> None:
    for arm, (base, gain) in gains.items():
        for name in ("difference", "ratio", "median"):
            for part, value in getattr(gain, name)._asdict().items():
                writer.add_scalar(f"{arm}/tau_gain_{name}/{part}", value, gain.contexts)
        writer.add_scalar(f"{arm}/tau_gain_worst", gain.worst, gain.contexts)
        both = shared(counts, base, arm)
        for number, context in enumerate(both):
            delta = counts[arm][context].tau - counts[base][context].tau
            writer.add_scalar(f"{arm}/tau_gain_by_context", delta, number)
        writer.add_figure(f"{arm}/tau_by_context", tau_figure(counts, base, arm, both), len(both))
    for number, record in enumerate(records.values()):
        if "error" in record or not record["held_out_before"]:
            continue
        for when in ("before", "after"):
            score = record[f"held_out_{when}"]
            writer.add_scalar(f"ttt/held_out_loss_{when}", score["loss"], number)
            writer.add_scalar(f"ttt/held_out_tau_{when}", score["tau"], number)
            for slot, rate in enumerate(score["acceptance"], 1):
                writer.add_scalar(f"ttt/held_out_acceptance_{when}/slot_{slot:02d}", rate, number)
        for name in COST[:3]:
            writer.add_scalar(name.replace("ttt_", "ttt/", 1), record[name], number)
    scored = [record for record in records.values() if "error" not in record and record["held_out_before"]]
    if scored:
        writer.add_figure("ttt/held_out_acceptance", acceptance_figure(scored), len(scored))
    writer.flush()


def tau_figure(counts: Counts, base: str, arm: str, contexts: list[str]) -> Any:
    """A matplotlib figure: τ of every context before and after, ordered by the gain."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    pairs = sorted(((counts[base][c].tau, counts[arm][c].tau) for c in contexts), key=lambda pair: pair[1] - pair[0])
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, (before, after) in enumerate(pairs):
        axes.plot([number, number], [before, after], color="0.7", zorder=1)
    axes.scatter(range(len(pairs)), [before for before, _ in pairs], label=base, color="tab:gray", zorder=2)
    axes.scatter(range(len(pairs)), [after for _, after in pairs], label=arm, color="tab:blue", zorder=2)
    axes.set_xlabel("contexts, by gain")
    axes.set_ylabel("τ, tokens per verification")
    axes.set_ylim(bottom=1)
    axes.legend()
    return figure


def acceptance_figure(records: list[dict[str, Any]]) -> Any:
    """A matplotlib figure: share of held-out blocks accepted up to each slot, before and after, mean over contexts."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for when, colour in (("before", "tab:gray"), ("after", "tab:blue")):
        rates = [record[f"held_out_{when}"]["acceptance"] for record in records]
        means = [statistics.fmean(values) for values in zip(*rates, strict=True)]
        axes.plot(range(1, len(means) + 1), means, marker="o", color=colour, label=f"{when} adaptation")
    axes.set_xlabel("slot of the block")
    axes.set_ylabel("share accepted up to here")
    axes.set_xticks(range(1, len(means) + 1))
    axes.set_ylim(0, 1)
    axes.set_title(f"Held-out blocks, mean over {len(records)} contexts", loc="left")
    axes.legend()
    return figure
