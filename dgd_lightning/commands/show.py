"""`dgd show RUN`: the answers of a run, task by task and arm by arm, with their scores where there are some.

Reads a run folder, also of a run that is not finished, or a file of rows with ``model_output``; no model is loaded. On
a terminal the text is paged.
"""

import pydoc
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from dgd_lightning.checks import check_integer
from dgd_lightning.commands.errors import command_parser, parsed
from dgd_lightning.errors import InputError
from dgd_lightning.report.text import visible
from dgd_lightning.run_folder import rows_so_far
from dgd_lightning.scoring.score_run import rows_of, source

Row = dict[str, Any]
QUESTION = 400  # characters of a question's end: before it there may be a context of many thousands


def main(argv: Sequence[str]) -> int:
    """Run `dgd show RUN [--arm NAME] [--limit N]`."""
    parser = command_parser("show", __doc__, config=False)
    parser.add_argument("run", type=str, help="run folder, or a file of rows")
    parser.add_argument("--arm", type=str | None, default=None, help="only this arm's answers")
    parser.add_argument("--limit", type=int | None, default=None, help="only the first so many tasks")
    options = parsed(parser, argv[1:])
    check_integer("limit", options.limit, optional=True)
    tasks: dict[str, dict[str, Row]] = {}  # rows by task and arm
    for row in _rows(Path(options.run)):
        tasks.setdefault(row["idx"], {})[row["dgd"]["arm"]] = row
    arms = dict.fromkeys(arm for rows in tasks.values() for arm in rows)
    if options.arm is not None and options.arm not in arms:
        raise InputError("arm", expected=f"one of {', '.join(arms)}", received=options.arm, hint="use one of them")
    wanted = arms if options.arm is None else [options.arm]
    shown = (_task(idx, [rows[arm] for arm in wanted if arm in rows]) for idx, rows in tasks.items())
    pydoc.pager(visible("\n\n".join(islice(filter(None, shown), options.limit))) + "\n")
    return 0


def _rows(run: Path) -> Iterable[Row]:
    if run.is_dir() and not (run / "graded.jsonl").is_file() and (rows := list(rows_so_far(run))):
        return rows
    where = source(run, "run")
    return rows_of(where.graded if run.is_dir() and where.graded.is_file() else where.rows)


def _task(idx: str, rows: Sequence[Row]) -> str:
    """A task's question and its answers; nothing where it has none."""
    if not rows:
        return ""
    question = _question(rows[0])
    lines = [f"━━ {idx}", f"{'…' * (len(question) > QUESTION)}{question[-QUESTION:]}"]
    for row in rows:
        record = row["dgd"]
        known = (("score", row.get("score")), ("tokens", record.get("tokens")), ("ended by", record.get("stop_reason")))
        facts = ", ".join(f"{name} {value}" for name, value in known if value is not None)
        answer = row["model_output"]
        lines.append(f"── {record['arm']}{f' ({facts})' if facts else ''}")
        lines.append(f"no answer: {record.get('skipped', 'none was written')}" if answer is None else str(answer))
    return "\n".join(lines)


def _question(row: Row) -> str:
    """What was asked last: of messages the last one, else the row's first text."""
    messages = row.get("messages")
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
        return str(messages[-1].get("content", "")).strip()
    return next((value.strip() for value in row.values() if isinstance(value, str) and value != row["idx"]), "")
