"""`SolveRate`: tasks whose rubrics all hold, per category, for rows that carry program checks (the lab's)."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from rich.table import Table

from callbacks import run_folder
from dgd_lightning.lab.checks import grade, has_checks, reverted_to_prior

ALL = "all tasks"


class Count(NamedTuple):
    """Solved tasks out of those that were graded."""

    solved: int = 0
    graded: int = 0

    def plus(self, solved: bool) -> Count:
        return Count(self.solved + solved, self.graded + 1)

    @property
    def rate(self) -> float:
        return self.solved / self.graded if self.graded else float("nan")


class SolveRate(Callback):
    """Grades answers by program and adds a table of solve rates per category to the run's summary.

    A task counts as solved if all its rubrics hold, as in CL-bench. A failure on a fact whose usual value the context
    overrides counts as *reverted to prior* where the answer gives the usual value. Rows without an answer (skipped
    ones) are not graded.
    """

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        log_dir = trainer.log_dir  # a collective: every rank asks
        if not trainer.is_global_zero or log_dir is None:
            return
        solved: dict[str, dict[str, Count]] = defaultdict(lambda: defaultdict(Count))  # [category][arm]
        reverted: dict[str, Count] = defaultdict(Count)  # [arm], out of the facts that go against their prior
        for row in run_folder.read_predictions(Path(log_dir)):
            text, arm = row["model_output"], row["dgd"]["arm"]
            if text is None or not has_checks(row):
                continue
            right = grade(row, text).value == 1.0
            for group in (row["metadata"]["context_category"], ALL):
                solved[group][arm] = solved[group][arm].plus(right)
            if row["metadata"]["lab"]["prior"] == "contradict":
                reverted[arm] = reverted[arm].plus(reverted_to_prior(row, text))
        if not solved:
            return
        arms = list(solved[ALL])
        pl_module.summary_tables.append(table(solved, reverted, arms))  # type: ignore[union-attr,operator]
        if isinstance(trainer.logger, TensorBoardLogger):
            writer: Any = trainer.logger.experiment
            for group, by_arm in solved.items():
                for arm, count in by_arm.items():
                    writer.add_scalar(f"{arm}/solve_rate/{group}", count.rate, count.graded)
            for arm, count in reverted.items():
                writer.add_scalar(f"{arm}/reverted_to_prior", count.rate, count.graded)
            writer.flush()


def table(solved: dict[str, dict[str, Count]], reverted: dict[str, Count], arms: list[str]) -> Table:
    """Solve rates by category, a column per arm; below them how often a contradicted prior came back."""
    result = Table(title="Solve rate (all rubrics hold)", title_justify="left")
    result.add_column("category")
    for arm in arms:
        result.add_column(arm, justify="right")
    for group in sorted(solved, key=lambda name: (name == ALL, name)):
        if group == ALL:
            result.add_section()
        result.add_row(group, *(_cell(solved[group][arm]) for arm in arms))
    if reverted:
        result.add_section()
        result.add_row("reverted to the prior (facts that contradict it)", *(_cell(reverted[arm]) for arm in arms))
    return result


def _cell(count: Count) -> str:
    return f"{100 * count.rate:.1f}% ({count.solved}/{count.graded})" if count.graded else "–"
