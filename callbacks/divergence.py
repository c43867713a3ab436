"""`DivergenceMetrics`: how target and readout differ and what guidance changed: curves, pictures and a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.table import Table

from dgd_lightning import run_folder
from dgd_lightning.callbacks.divergence_stats import CLASSES, COLUMNS, EDGES, ArmDivergence, collect
from dgd_lightning.callbacks.divergence_views import position_figure, text_image
from dgd_lightning.callbacks.prediction_writer import written_before
from dgd_lightning.errors import InputError

BROKEN_DOWN = (
    "kl_target_readout",
    "js",
    "tv",
    "agree",
    "argmax_changed",
    "tv_target_guided",
)  # by class, position and context


class DivergenceMetrics(Callback):
    """Sums up what ``model.divergence`` records, per arm; a run that sets it has this callback.

    Live curves count tasks on their x axis. The final numbers come from the merged predictions, so they cover rows of
    all ranks and of earlier sessions: means over tokens with 95% intervals over contexts; by token class, by position
    and by context; histograms; answers with coloured tokens.

    Args:
        samples: tasks whose answers are shown with coloured tokens.
        positions: curves by position reach so far; later tokens count everywhere else.
    """

    def __init__(self, samples: int = 4, positions: int = 256) -> None:
        for name, value, least in (("samples", samples, 0), ("positions", positions, 1)):
            if value < least:
                raise InputError(
                    f"DivergenceMetrics.{name}", expected=f"at least {least}", received=value, hint="raise it"
                )
        self.samples, self.positions = samples, positions
        self.stats: dict[str, ArmDivergence] = {}
        self.folder = Path()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes up the rows of an earlier session.

        Raises:
            InputError: no `PredictionWriter` comes before this callback, or nothing is recorded.
        """
        if stage != "predict":
            return
        self.stats, self.folder = {}, written_before(trainer, self)
        if getattr(pl_module, "divergence", None) is None:
            raise InputError(
                "model.divergence",
                expected="settings: DivergenceMetrics shows what they record",
                received="null",
                hint="set model.divergence: {}, or drop the callback",
            )
        if trainer.is_global_zero:
            for row in run_folder.rows_so_far(self.folder):
                collect(self.stats, row, self.positions + 1)

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
                collect(self.stats, row, self.positions + 1)
        if isinstance(trainer.logger, TensorBoardLogger):
            for arm in self.stats.values():
                _means(trainer.logger.experiment, arm)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Final numbers from the merged predictions."""
        if not trainer.is_global_zero:
            return
        self.stats = {}
        samples: list[dict[str, Any]] = []
        for row in run_folder.read_predictions(self.folder):
            collect(self.stats, row, self.positions + 1)
            if row["dgd"].get("divergence") and len(samples) < self.samples * len(pl_module.arms):  # type: ignore[arg-type]
                samples.append(row)
        if not self.stats:
            return
        tables = [*divergence_tables(self.stats), class_table(self.stats)]
        pl_module.summary_tables.extend(tables)  # type: ignore[union-attr,operator]
        if isinstance(trainer.logger, TensorBoardLogger):
            _final(trainer.logger.experiment, self.stats, samples)


Columns = dict[str, tuple[str, str]]  # title -> number, format
DIVERGENCES: Columns = {
    "KL(t‖r)": ("kl_target_readout", "{:.2f}"),
    "KL(r‖t)": ("kl_readout_target", "{:.2f}"),
    "JS": ("js", "{:.3f}"),
    "TV": ("tv", "{:.3f}"),
    "same top-1 token": ("agree", "{:.1%}"),
    "H(t) − H(r)": ("entropy_gap", "{:+.2f}"),
}
EMITTED: Columns = {
    "argmax changed": ("argmax_changed", "{:.2%}"),
    "TV(t, g)": ("tv_target_guided", "{:.3f}"),
    "prob t": ("target_prob", "{:.3f}"),
    "prob r": ("readout_prob", "{:.3f}"),
    "rank t": ("target_rank", "{:.2f}"),
    "rank r": ("readout_rank", "{:.2f}"),
}


def divergence_tables(stats: dict[str, ArmDivergence]) -> list[Table]:
    """A line per arm: means over tokens, below them their intervals over contexts."""
    distributions = (
        "t: target; r: readout, of arms without guidance the draft; nats. Means over tokens, 95% over contexts."
    )
    words = (
        "argmax changed: guidance changed the top-1 token. TV(t, g): total variation of target and guided. "
        "prob, rank: of the "
        "emitted token; ranks by geometric mean."
    )
    return [
        _mean_table("Divergence of target and readout", distributions, DIVERGENCES, stats),
        _mean_table("Guidance and emitted tokens", words, EMITTED, stats),
    ]


def _mean_table(title: str, caption: str, columns: Columns, stats: dict[str, ArmDivergence]) -> Table:
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    table.add_column("arm")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for arm in stats.values():
        cells = []
        for name, form in columns.values():
            found = arm.interval(name)
            interval = "" if found.low != found.low else f"{form.format(found.low)}…{form.format(found.high)}"  # NaN
            cells.append(f"{form.format(found.value)}\n{interval}")
        about = f"β {arm.beta:g}, {len(arm.contexts)} contexts, {arm.tokens:,} tokens"
        table.add_row(f"{arm.name}\n{about}", *cells)
    return table


def class_table(stats: dict[str, ArmDivergence]) -> Table:
    """By token class: JS and share of tokens with a changed argmax, one line per arm."""
    table = Table(title="JS, and share of tokens that guidance changed, by token class", title_justify="left")
    table.add_column("arm")
    found = {arm.name: arm.by_class() for arm in stats.values()}
    kinds = [kind for kind in CLASSES if any(kind in classes for classes in found.values())]
    for kind in kinds:
        table.add_column(kind, justify="right")
    for arm, classes in found.items():
        cells = (classes.get(kind) for kind in kinds)
        table.add_row(arm, *("–" if c is None else f"{c['js']:.3f}  {c['argmax_changed']:.1%}" for c in cells))
    return table


def _means(writer: Any, arm: ArmDivergence) -> None:
    for name, mean in arm.means().items():
        if mean == mean:  # NaN: nothing to draw
            writer.add_scalar(f"{arm.name}/divergence/{name}", mean, arm.tasks)


def _final(writer: Any, stats: dict[str, ArmDivergence], samples: list[dict[str, Any]]) -> None:
    for arm in stats.values():
        _means(writer, arm)
        for name in COLUMNS:
            found = arm.interval(name)
            for part in ("low", "high"):
                if (bound := getattr(found, part)) == bound:
                    writer.add_scalar(f"{arm.name}/divergence_interval/{name}_{part}", bound, arm.tasks)
        for kind, means in arm.by_class().items():
            for name in BROKEN_DOWN:
                writer.add_scalar(f"{arm.name}/divergence_by_class/{name}/{kind}", means[name], arm.tasks)
        for number, means in enumerate(arm.by_context().values()):
            for name in BROKEN_DOWN:
                writer.add_scalar(f"{arm.name}/divergence_by_context/{name}", means[name], number)
        curves, counts = arm.positions.compute(), arm.positions.counts
        for position in range(len(counts) - 1):  # the last group holds all later positions
            for name in BROKEN_DOWN if counts[position] else ():
                value = float(curves[position, COLUMNS.index(name)])
                writer.add_scalar(f"{arm.name}/divergence_by_position/{name}", value, position)
        for name, edges in EDGES.items():
            writer.add_histogram(f"{arm.name}/divergence/{name}", arm.samples(name), arm.tasks, bins=edges)
    writer.add_figure(
        "divergence_by_position", position_figure(list(stats.values())), max(a.tasks for a in stats.values())
    )
    for row in samples:
        title = f"{row['dgd']['arm']} · {row['idx']}"
        image = text_image(title, row["dgd"]["divergence"])
        writer.add_image(f"divergence {row['idx']}/{row['dgd']['arm']}", image, dataformats="HWC")
    writer.flush()
