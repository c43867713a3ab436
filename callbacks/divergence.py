"""How target and readout differ and what guidance changed: `DivergenceMetrics` in numbers, `CaseStudies` in answers."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from dgd_lightning import run_folder
from dgd_lightning.analysis.divergence import COLUMNS, EDGES, ArmDivergence, collect
from dgd_lightning.callbacks.rows import FinishedRows, RowSums, add_scalars, tensorboard
from dgd_lightning.checks import check_integer
from dgd_lightning.errors import InputError
from dgd_lightning.report.case_studies import LIMIT, write_case_studies
from dgd_lightning.report.figures import position_figure, text_image
from dgd_lightning.report.run_tables import class_table, divergence_tables

BROKEN_DOWN = ("kl_target_readout", "js", "tv", "agree", "argmax_changed", "tv_target_guided")  # by class, position …


class DivergenceMetrics(RowSums):
    """Sums up what ``model.divergence`` records, per arm; a run that sets it has this callback.

    Live curves count tasks on their x axis. The final numbers come from the merged predictions, so they cover rows of
    all ranks and of earlier sessions: means over tokens with 95% intervals over contexts; by token class, by position
    and by context; histograms; answers with coloured tokens.

    Args:
        samples: tasks whose answers are shown with coloured tokens.
        positions: curves by position reach so far; later tokens count everywhere else.
    """

    def __init__(self, samples: int = 4, positions: int = 256) -> None:
        super().__init__(check_integer("DivergenceMetrics.samples", samples, least=0))
        self.positions = check_integer("DivergenceMetrics.positions", positions)
        self.stats: dict[str, ArmDivergence] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes up the rows of an earlier session; ``model.divergence`` must be set."""
        super().setup(trainer, pl_module, stage)
        if stage == "predict" and getattr(pl_module, "divergence", None) is None:
            raise InputError(
                "model.divergence",
                expected="settings: DivergenceMetrics shows what they record",
                received="null",
                hint="set model.divergence: {}, or drop the callback",
            )

    def reset(self) -> None:
        self.stats = {}

    def add(self, row: dict[str, Any]) -> None:
        collect(self.stats, row, self.positions + 1)

    def is_sample(self, row: dict[str, Any]) -> bool:
        return bool(row["dgd"].get("divergence"))

    def draw(self, writer: Any) -> None:
        for arm in self.stats.values():
            add_scalars(writer, arm.means(), arm.tasks, f"{arm.name}/divergence/")

    def finish(self, trainer: Trainer, module: Any) -> None:
        if not self.stats:
            return
        module.summary.details += [*divergence_tables(self.stats), class_table(self.stats)]
        if (writer := tensorboard(trainer)) is not None:
            self.draw(writer)
            arms = list(self.stats.values())
            for arm in arms:
                _log(writer, arm)
            writer.add_figure("divergence_by_position", position_figure(arms), max(arm.tasks for arm in arms))
            for row in self.sampled:
                image = text_image(f"{row['dgd']['arm']} · {row['idx']}", row["dgd"]["divergence"])
                writer.add_image(f"divergence {row['idx']}/{row['dgd']['arm']}", image, dataformats="HWC")
            writer.flush()


def _log(writer: Any, arm: ArmDivergence) -> None:
    """Intervals; numbers by class, context and position; histograms."""

    def add(tag: str, means: dict[str, float], step: int, kind: str = "") -> None:
        add_scalars(writer, {f"{tag}/{name}{kind}": means[name] for name in BROKEN_DOWN}, step, f"{arm.name}/")

    for name in COLUMNS:
        found = arm.interval(name)
        bounds = {f"{name}_low": found.low, f"{name}_high": found.high}
        add_scalars(writer, bounds, arm.tasks, f"{arm.name}/divergence_interval/")
    for kind, means in arm.by_class().items():
        add("divergence_by_class", means, arm.tasks, f"/{kind}")
    for number, means in enumerate(arm.by_context().values()):
        add("divergence_by_context", means, number)
    for position, means in arm.by_position().items():
        add("divergence_by_position", means, position)
    for name, edges in EDGES.items():
        writer.add_histogram(f"{arm.name}/divergence/{name}", arm.samples(name), arm.tasks, bins=edges)


class CaseStudies(FinishedRows):
    """Writes ``case_studies.html`` into the run folder: answers side by side, tokens coloured by correction.

    Colours and likeliest tokens need ``model.divergence``; verdicts need rows with program checks (the lab's).
    ``python -m dgd_lightning.report.case_studies RUN_FOLDER`` makes the page of a finished run.

    Args:
        limit: most tasks on the page.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = check_integer("CaseStudies.limit", limit, hint=f"use e.g. {LIMIT}")

    def finish(self, trainer: Trainer, module: Any) -> None:
        path = write_case_studies(self.folder, lambda: run_folder.read_predictions(self.folder), self.limit)
        module.summary.pointers.append(f"case studies: {path}")
