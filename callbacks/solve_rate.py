"""`SolveRate`: tasks whose rubrics all hold, per arm and category, for rows that carry program checks (the lab's)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from dgd_lightning import run_folder
from dgd_lightning.report.solve_rates import ALL, Compared, compared, comparison_table, rate_table
from dgd_lightning.scoring.graded import ArmFacts, Graded, arm_facts, by_arm, comparisons, graded_by_program


class SolveRate(Callback):
    """Grades answers by program and adds two tables to the run's summary: solve rates, and what arms changed.

    A task counts as solved if all its rubrics hold, as in CL-bench. A failure on a fact whose usual value the context
    overrides counts as *reverted to prior* where the answer gives the usual value. Rows without an answer (skipped
    ones) are not graded. Arms with another law than the target's own are compared with their baseline and with their
    null controls, task by task.
    """

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        log_dir = trainer.log_dir  # a collective: every rank asks
        if not trainer.is_global_zero or log_dir is None:
            return
        scores: list[Graded] = []
        arms: dict[str, ArmFacts] = {}
        for row in run_folder.read_predictions(Path(log_dir)):
            if (one := graded_by_program(row)) is not None:
                scores.append(one)
                arms.setdefault(one.arm, arm_facts(row))
        if not scores:
            return
        found = compared(scores, comparisons(list(arms.values())))
        tables = [rate_table(scores), *([comparison_table(found)] if found else [])]
        pl_module.summary_tables += tables  # type: ignore[operator]
        if isinstance(trainer.logger, TensorBoardLogger):
            _log(trainer.logger.experiment, scores, found)


def _log(writer: Any, scores: Sequence[Graded], found: Sequence[Compared]) -> None:
    for arm, tasks in by_arm(scores).items():
        groups: dict[str, list[float]] = defaultdict(list)
        for one in tasks.values():
            for group in (one.category, ALL):
                groups[group].append(float(one.score or 0.0))
            if one.reverted is not None:
                groups["reverted"].append(float(one.reverted))
        for group, values in groups.items():
            name = "reverted_to_prior" if group == "reverted" else f"solve_rate/{group}"
            writer.add_scalar(f"{arm}/{name}", sum(values) / len(values), len(values))
    for versus, result, _ in found:
        for part, value in result.difference._asdict().items():
            if value == value:  # NaN: no interval
                writer.add_scalar(f"{versus.arm}/solve_rate_against/{versus.base}/{part}", value, result.tasks)
    writer.flush()
