"""`dgd score RUN…`: grade the answers of finished runs, or of any file in CL-bench's format; no model is loaded.

The same command continues what was interrupted; only what has no score yet, or whose answer or grader has changed, is
graded. Each run gets ``scores.jsonl`` (as they come), ``graded.jsonl`` (CL-bench's format) and ``scores.json`` (sums).
"""

import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from jsonargparse import Namespace
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dgd_lightning.checks import check_integer
from dgd_lightning.commands.errors import add_switch, command_parser, parsed
from dgd_lightning.errors import InputError
from dgd_lightning.grader import ASK, READ, Grader, package_graders
from dgd_lightning.metrics.clustered import counted
from dgd_lightning.report.print_tables import plain_console, print_tables
from dgd_lightning.report.solve_rates import rate_table, score_tables
from dgd_lightning.report.words import words_of
from dgd_lightning.row_files import opened
from dgd_lightning.scoring.clbench_file import export
from dgd_lightning.scoring.error_judge import Classified
from dgd_lightning.scoring.graded import odd_score, odd_scores
from dgd_lightning.scoring.judge_config import JudgeConfig
from dgd_lightning.scoring.rubric_grader import RubricJudge
from dgd_lightning.scoring.score_run import Counts, Source, grade_run, rows_of, source

LINE_EVERY = 15.0  # seconds between lines of progress where stderr is no terminal


def main(argv: Sequence[str]) -> int:
    """Run `dgd score RUN… [--judge.model NAME …]`."""
    options = parse_options(list(argv)[1:])
    sources = [source(run) for run in options.runs]
    if options.export_clbench is not None:
        rows = export(sources, options.arm, Path(options.export_clbench))
        print(f"{counted(rows, 'row')} for CL-bench's script: eval.py --input {options.export_clbench}")
        return 0
    excluded = read_excluded(options.exclude, sources)
    graders = make_graders(options)
    try:
        for where in sources:
            score_one(where, graders, excluded)
    finally:
        for grader in graders:
            grader.close()
    return 0


def parse_options(argv: list[str]) -> Namespace:
    """The command's options, given without its name."""
    parser = command_parser("score", __doc__)
    parser.add_argument("runs", type=str, nargs="+", help="run folders, or files of rows with model_output")
    parser.add_argument("--judge", type=JudgeConfig | None, default=None, help="for rows with rubrics")
    add_switch(parser, "--taxonomy", "ask the judge why failed answers failed")
    code = "run programs that a model wrote, for HumanEval and MBPP (or set HF_ALLOW_CODE_EVAL=1)"
    add_switch(parser, "--allow_code_execution", code)
    bare = "run them also where the kernel shuts off neither your files nor the network"
    add_switch(parser, "--allow_no_isolation", bare)
    parser.add_argument("--code_workers", type=int, default=2, help="programs run at once")
    parser.add_argument("--math_workers", type=int, default=2, help="answers compared at once")
    add_switch(parser, "--regrade", "grade rows anew that came with a score")
    parser.add_argument("--exclude", type=str | None, default=None, help="file of task ids: rates also without them")
    export = "write one arm's answers to this file for CL-bench's own eval.py, and grade nothing"
    parser.add_argument("--export_clbench", type=str | None, default=None, help=export)
    parser.add_argument("--arm", type=str | None, default=None, help="of a run of several: the one to export")
    options = parsed(parser, argv)
    for key in ("code_workers", "math_workers"):
        check_integer(key, options[key])
    if options.taxonomy and options.judge is None:
        raise InputError(
            "taxonomy",
            expected="a judge to ask why answers failed",
            received="none (lab answers get their class without one)",
            hint="name one with --judge.model, or set taxonomy to false",
        )
    return options


def make_graders(options: Namespace) -> list[Grader]:
    """All graders, those that ask a judge last."""
    graders = package_graders(vars(options))
    judge = next((grader for grader in graders if isinstance(grader, RubricJudge)), None)
    if not options.taxonomy or judge is None:
        return graders
    errors = judge.error_judge()
    return [Classified(one, errors, judge.workers) if one.cost in (READ, ASK) else one for one in graders]


def read_excluded(path: str | None, sources: Sequence[Source]) -> frozenset[str]:
    """Task ids, one a line; empty lines and what follows a # are passed over.

    A run that lacks one of them is an error: told before anything is graded and paid for.
    """
    if path is None:
        return frozenset()
    with opened(Path(path), "exclude") as lines:
        excluded = frozenset(idx for line in lines if (idx := line.partition("#")[0].strip()))
    for where in sources:
        if unknown := excluded - {row["idx"] for row in rows_of(where.rows)}:
            raise InputError(
                "exclude",
                expected="ids of tasks that are there",
                received=f"{len(unknown)} that are not in {where.rows}, such as {min(unknown)}",
                hint="correct the list",
            )
    return excluded


def score_one(where: Source, graders: Sequence[Grader], excluded: frozenset[str]) -> None:
    """Score one run, write its files and print its tables."""
    with closing(Bar(where.rows, sum(1 for _ in rows_of(where.rows)))) as bar:
        run = grade_run(where, graders, excluded=excluded, on_progress=bar)
    tables = score_tables(run.scores, run.compared)
    if excluded:
        tables.insert(1, rate_table(run.kept))
        tables[1].title = f"Without the {len(excluded)} excluded {words_of(run.scores).tasks}"
    print_tables(plain_console(), tables)
    rows = rows_of(where.rows)
    if odd := sum(odd_score(row) and any(one.cost == READ and one.takes(row) for one in graders) for row in rows):
        print(odd_scores(odd))
    if lost := sum(one.score is None for one in run.scores):
        print(
            f"{lost} of {len(run.scores)} answers have no score: grading_rationale in {where.graded} says why. "
            "The same command tries again."
        )
    print(f"graded rows: {where.graded}")
    print(f"in sum:      {where.summary}")


class Bar:
    """Progress: a bar on a terminal, now and then a line elsewhere."""

    def __init__(self, path: Path, total: int) -> None:
        self.path, self.total, self.shown = path, total, time.monotonic()
        self.bar: Progress | None = None
        if sys.stderr.isatty():
            counts = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            words, lost = TextColumn("scoring"), TextColumn("{task.fields[lost]}")
            self.bar = Progress(words, *counts, lost, console=Console(stderr=True), transient=True)
            self.bar.start()
            self.task = self.bar.add_task("scoring", total=total, lost="")

    def __call__(self, counts: Counts) -> None:
        done = counts.scored + counts.unscored + counts.reused + counts.skipped
        lost = f"{counts.unscored} without a score" if counts.unscored else ""
        if self.bar is not None:
            self.bar.update(self.task, completed=done, lost=lost)
        elif time.monotonic() - self.shown > LINE_EVERY:
            self.shown = time.monotonic()
            print(f"scoring {self.path}: {done} of {self.total} {lost}".rstrip(), file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
