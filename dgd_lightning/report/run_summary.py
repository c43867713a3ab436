"""What a predict run prints when it ends, one table and a few sentences; the whole of it goes to `summary.txt`."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dgd_lightning.analysis.arms import ArmStats, speed_up
from dgd_lightning.files import whole_files
from dgd_lightning.metrics.clustered import shown
from dgd_lightning.report.print_tables import WIDTH, plain_console, print_tables
from dgd_lightning.report.run_tables import tasks_of
from dgd_lightning.report.solve_rates import change
from dgd_lightning.scoring.graded import Graded, by_arm
from dgd_lightning.scoring.summary import Compared, rates
from dgd_lightning.types import Summary

FILE = "summary.txt"
MOST = 5  # sentences that are printed


def add_decoding(summary: Summary, stats: Mapping[str, ArmStats], total: int) -> None:
    """Sets the columns of the table that decoding fills; ``total``: tasks of the data."""
    for arm in stats.values():
        summary.add_cell(arm.name, "tasks", tasks_of(arm, total))
        summary.add_cell(arm.name, "τ", shown(arm.tau.micro, "{:.2f}"))
        summary.add_cell(arm.name, "tokens/s", shown(arm.tokens_per_second, "{:.1f}"))
        summary.add_cell(arm.name, "speed-up", shown(speed_up(arm, stats), "{:.2f}×"))


def add_solve_rates(summary: Summary, scores: Sequence[Graded], found: Sequence[Compared]) -> None:
    """Sets the columns of the table that grading fills: the rate, and the difference to the arm's baseline."""
    for arm, tasks in by_arm(scores).items():
        summary.add_cell(arm, "solved", shown(rates(list(tasks.values())).official.value, "{:.1%}"))
    for one in found:
        if not one.versus.control:
            points = change(one.result).replace("none", "+0.0").replace(" [", "\n[")
            summary.add_cell(one.versus.arm, "points vs\nbaseline", points)


def finish(summary: Summary, folder: Path, *, verbose: bool) -> None:
    """Writes `summary.txt` into the run folder, and prints the summary; its details too where that is asked for."""
    file = Console(file=io.StringIO(), width=WIDTH, markup=False, emoji=False)
    table = [summary_table(summary)] if summary.cells else []
    print_tables(file, [*table, "", *summary.sentences, "", *summary.details, "", *summary.pointers])
    with whole_files(folder, FILE) as scratch:
        text: str = file.file.getvalue()  # type: ignore[attr-defined]
        (scratch / FILE).write_text(text, encoding="utf-8", errors="backslashreplace")
    console = plain_console()
    print_tables(console, [*(summary.details if verbose else ()), *table, ""])
    for sentence in summary.sentences[:MOST]:
        console.print(sentence, highlight=False)
    more = len(summary.sentences) - MOST
    extra = f"{more} more sentences and all tables" if more > 0 else "all tables"
    pointers = [*summary.pointers, *([] if verbose and more <= 0 else [f"{extra}: {folder / FILE}"])]
    print_tables(console, ["", *pointers])


def summary_table(summary: Summary) -> Table:
    """One line per arm; a cell that nobody has set is a dash."""
    columns = list(dict.fromkeys(column for cells in summary.cells.values() for column in cells))
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("arm")
    for column in columns:
        table.add_column(column, justify="right")
    for arm, cells in summary.cells.items():
        table.add_row(arm, *(cells.get(column, "–") for column in columns))
    return table
