"""`CLBenchScorer`: grades the answers at the end of a predict run, where that needs no judge elsewhere."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from dgd_lightning import run_folder
from dgd_lightning.callbacks.rows import FinishedRows, add_scalars, tensorboard
from dgd_lightning.errors import InputError
from dgd_lightning.grader import Grader, package_graders
from dgd_lightning.report.run_summary import add_solve_rates
from dgd_lightning.report.solve_rates import comparison_table, rate_table, verdict
from dgd_lightning.report.words import words_of
from dgd_lightning.scoring.graded import Graded, by_arm
from dgd_lightning.scoring.judge_config import JudgeConfig
from dgd_lightning.scoring.score_run import grade_run, source
from dgd_lightning.scoring.summary import Compared


class CLBenchScorer(FinishedRows):
    """Adds solve rates and what the arms changed to the run's summary, to TensorBoard and to the run folder.

    Rows with program checks (the lab's), GSM8K's and MATH's are graded here; what needs a judge or a sandbox only where
    it is asked for. Rows that nobody here grades are left for ``dgd score``. A task counts as solved if all its rubrics
    hold, as in CL-bench. Arms with another distribution than the target's own are compared with their baseline and with
    their null controls, task by task.

    Args:
        judge: of rows with rubrics that no program checks; None leaves them.
        allow_code_execution: run programs that the model wrote, in a sandbox; HF_ALLOW_CODE_EVAL=1 says so too.
        allow_no_isolation: run them also where the kernel shuts off neither your files nor the network.
        workers: programs and answers looked at at once.
    """

    def __init__(
        self,
        judge: JudgeConfig | None = None,
        allow_code_execution: bool = False,
        workers: int = 2,
        allow_no_isolation: bool = False,
    ) -> None:
        self.options: dict[str, Any] = {"judge": judge, "allow_code_execution": allow_code_execution, "leave": True}
        self.options |= {"allow_no_isolation": allow_no_isolation, "code_workers": workers, "math_workers": workers}
        for grader in package_graders(self.options):  # what can be known before hours of decoding
            grader.close()

    def finish(self, trainer: Trainer, module: Any) -> None:
        """Grades the merged predictions."""
        graders: list[Grader] = []
        try:
            graders = package_graders(self.options)
            run = grade_run(source(self.folder), graders, leave=True)
            left = self._left(run.counts.left)
        except InputError as error:  # the answers are there: hours of decoding must not end in a traceback
            rank_zero_warn(f"not all answers are graded: {error}; `dgd score {self.folder}` goes on")
            return
        finally:
            for grader in graders:
                grader.close()
        summary = module.summary
        if any(one.score is not None for one in run.scores):
            summary.details.append(rate_table(run.scores))
            add_solve_rates(summary, run.scores, run.compared)
        if run.compared:
            summary.details.append(comparison_table(run.compared, words_of(run.scores)))
            summary.sentences += verdict(run.compared, run.scores)
        summary.pointers += left
        if (writer := tensorboard(trainer)) is not None:
            log_scores(writer, run.scores, run.compared)

    def _left(self, answers: int) -> list[str]:
        """Where answers that nobody here graded are graded; some rows carry nothing that any grader reads."""
        if not answers:
            return []
        graders = package_graders({**self.options, "leave": False})
        try:
            answered = (row for row in run_folder.read_predictions(self.folder) if row["model_output"] is not None)
            ungradable = sum(not any(grader.takes(row) for grader in graders) for row in answered)
        finally:
            for grader in graders:
                grader.close()
        reasons = {
            f"a judge or a sandbox (dgd score {self.folder})": answers - ungradable,
            "fields that a grader reads": ungradable,
        }
        return [f"answers not graded for want of {why}: {count}" for why, count in reasons.items() if count]


def log_scores(writer: Any, scores: Sequence[Graded], found: Sequence[Compared]) -> None:
    """Rates of all tasks and by category, and differences, as scalars of TensorBoard, in the data set's own words."""
    words = words_of(scores)
    for arm, tasks in by_arm(scores).items():
        groups: dict[str, list[float]] = defaultdict(list)
        for one in tasks.values():
            if one.score is not None:
                for group in filter(None, (one.category, words.every)):
                    groups[f"{words.tag}/{group}"].append(one.score)
            if one.reverted is not None:
                groups["reverted_to_prior"].append(float(one.reverted))
        for name, values in groups.items():
            writer.add_scalar(f"{arm}/{name}", sum(values) / len(values), len(values))
    for versus, result, *_ in found:
        prefix = f"{versus.arm}/{words.tag}_against/{versus.base}/"
        add_scalars(writer, result.difference._asdict(), result.tasks, prefix)
    writer.flush()
