"""`dgd report RUN…`: one page about graded runs: rates, what arms changed, and a verdict; no model is loaded.

Reads run folders that `dgd score` has graded, and graded files of CL-bench's own evaluation. Writes ``report.html`` and
``report.json``, and prints the same tables.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import Namespace

from dgd_lightning.commands.errors import add_switch, command_parser, parsed
from dgd_lightning.errors import InputError
from dgd_lightning.files import whole_files
from dgd_lightning.report.print_tables import plain_console, print_tables
from dgd_lightning.report.runs import read_runs, study
from dgd_lightning.report.runs_page import page
from dgd_lightning.report.solve_rates import agreement_table, score_tables, shown_arms, verdict
from dgd_lightning.report.text import visible
from dgd_lightning.report.words import words_of
from dgd_lightning.scoring.graded import odd_scores
from dgd_lightning.scoring.statistics import agreement
from dgd_lightning.scoring.summary import compared, plain, summary

PAGE, NUMBERS = "report.html", "report.json"
SOON = 2_000  # comparisons times contexts that take a second or two


def main(argv: Sequence[str]) -> int:
    """Run `dgd report RUN… [--against ARM …]`."""
    options = parse_options(list(argv)[1:])
    subject = study(read_runs(options.runs), pool=options.pool, common=options.common, against=options.against)
    if len(subject.wanted) * len({one.context for one in subject.scores}) > SOON:
        print(f"simulating what {len(subject.wanted)} comparisons could find …", file=sys.stderr, flush=True)
    found = compared(subject.scores, subject.wanted)
    judges = agreement(row for run in subject.runs for row in run.twice)
    tables = score_tables(subject.scores, found) + ([agreement_table(judges)] if judges.tasks else [])
    console = plain_console()
    for table in tables:
        table.title = f"{table.title}{subject.note}"
        table.min_width = min(len(table.title), console.width)
    sentences = verdict(found, subject.scores)
    remarks = [
        f"{run.label}: {run.without_status} answers have score 0 and no rubric's status; perhaps their judge failed. "
        "They count as not solved; CL-bench's script leaves answers out whose judge failed. "
        "`dgd score --regrade true` judges anew."
        for run in subject.runs
        if run.without_status
    ]
    remarks += [f"{run.label}: {odd_scores(run.odd)}" for run in subject.runs if run.odd]
    numbers = {
        "verdict": sentences,
        "runs": [
            {
                "name": run.label,
                "file": str(run.file),
                "arms": [arm.name for arm in run.arms],
                "tasks": len(run.tasks),
                "zeros_without_status": run.without_status,
            }
            for run in subject.runs
        ],
        "note": subject.note.strip(" ()") or None,
        "judges": plain(judges) if judges.tasks else None,
        **summary(subject.scores, found),
    }
    title = ", ".join(run.label for run in subject.runs)
    shown = shown_arms(subject.scores, found)
    words = words_of(subject.scores)
    html = page(title, [*sentences, *remarks], numbers, found, tables, shown=shown, words=words, note=subject.note)
    home = subject.runs[0].file.parent if len(subject.runs) == 1 else Path()
    folder = home if options.out is None else Path(options.out)
    try:
        with whole_files(folder, PAGE, NUMBERS) as scratch:
            (scratch / PAGE).write_text(html, encoding="utf-8")
            (scratch / NUMBERS).write_text(json.dumps(numbers, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(
            "out",
            expected="a folder that can be written",
            received=f"{folder} ({error.strerror})",
            hint="use --out FOLDER",
        ) from error
    print_tables(console, tables)
    print(visible("\n".join(remarks)) + "\n" if remarks else "", end="")
    print(visible("verdict: " + "\n         ".join(sentences)))
    print(f"page:    {folder / PAGE}\nnumbers: {folder / NUMBERS}")
    return 0


def parse_options(argv: list[str]) -> Namespace:
    """The command's options, given without its name."""
    parser = command_parser("report", __doc__)
    parser.add_argument("runs", type=str, nargs="+", help="graded run folders, or files of graded rows")
    pool = "the same arms with other seeds: count all their answers"
    add_switch(parser, "--pool", pool)
    add_switch(parser, "--common", "compare over the tasks that all runs have")
    parser.add_argument("--against", type=str | None, default=None, help="arm that all others are compared with")
    parser.add_argument("--out", type=str | None, default=None, help="folder; else that of a single run, or this one")
    return parsed(parser, argv)
