"""Case studies: one HTML page of a run with the answers of every arm side by side, tokens coloured by correction.

    python -m dgd_lightning.report.case_studies logs/NAME/version_N

The page holds no scripts and asks for nothing from elsewhere; every text in it is escaped.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dgd_lightning.checks import check_integer
from dgd_lightning.errors import InputError
from dgd_lightning.files import whole_files
from dgd_lightning.grader import CHECK, checked, package_graders
from dgd_lightning.report.text import rendered
from dgd_lightning.run_folder import PREDICTIONS, read_predictions
from dgd_lightning.types import Score

PAGE, LIMIT = "case_studies.html", 20
LEVELS = 10  # shades of correction
FAINT = 0.01  # share of moved probability below which a token has no colour
PLACES = 60  # of one answer whose likeliest tokens are listed
DISTRIBUTIONS = ("target", "readout", "guided")
SIGNS = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥"})
Row = dict[str, Any]
Verdict = Callable[[Row, str], Score | None]  # of a row and an answer to it; None where nobody can say


@dataclass
class ArmSummary:
    """What one arm did on all tasks of the run."""

    settings: dict[str, str]
    tasks: int = 0
    solved: int = 0
    graded: int = 0
    changed: int = 0
    tokens: int = 0  # of rows that say what was changed


class Chosen(NamedTuple):
    """A task on the page."""

    idx: str
    differs: bool  # whether some arms solved it and others did not
    changed: int  # tokens whose top-1 token guidance changed, all arms


class Selection(NamedTuple):
    """Which tasks are shown, out of how many."""

    shown: list[Chosen]
    tasks: int
    differing: int  # tasks that some arms solved and others did not
    with_changes: int  # tasks with a changed token
    arms: dict[str, ArmSummary]


def choose(rows: Iterable[Row], limit: int, verdict: Verdict) -> Selection:
    """At most ``limit`` tasks: first those that some arms solved and others did not, each by changed tokens."""
    verdicts: dict[str, set[bool]] = defaultdict(set)
    changes: dict[str, int] = defaultdict(int)
    arms: dict[str, ArmSummary] = {}
    for row in rows:
        idx, record, solved = row["idx"], row["dgd"], _solved(row, row["model_output"], verdict)
        changed = (record.get("divergence") or {}).get("argmax_changed", [])
        changes[idx] += sum(changed)
        if solved is not None:
            verdicts[idx].add(solved)
        arm = arms.setdefault(record["arm"], ArmSummary(_settings(record)))
        arm.tasks += 1
        arm.solved += bool(solved)
        arm.graded += solved is not None
        arm.changed += sum(changed)
        arm.tokens += len(changed)
    tasks = [Chosen(idx, len(verdicts[idx]) == 2, changed) for idx, changed in changes.items()]
    shown = sorted(tasks, key=lambda task: (not task.differs, -task.changed))[:limit]  # stable: ties as in the data
    return Selection(shown, len(tasks), sum(t.differs for t in tasks), sum(t.changed > 0 for t in tasks), arms)


def page(title: str, rows: Iterable[Row], selection: Selection, verdict: Verdict) -> str:
    """The whole page: those of the rows whose tasks are selected."""
    wanted: dict[str, list[Row]] = {task.idx: [] for task in selection.shown}
    for row in rows:
        if row["idx"] in wanted:
            wanted[row["idx"]].append(row)
    settings = [set(arm.settings.items()) for arm in selection.arms.values()]
    return rendered(
        "case_studies.html.j2",
        heading=f"Case studies: {title}",
        selection=selection,
        shared=set.intersection(*settings) if len(settings) > 1 else set(),  # settings of all arms are left out
        cases=[_case(task, wanted[task.idx], verdict) for task in selection.shown],
        solved=partial(_solved, verdict=verdict),
        tokens=_tokens,
        levels=LEVELS,
        faint=FAINT,
        most=PLACES,
        distributions=DISTRIBUTIONS,
        signs=SIGNS,
    )


def write_case_studies(
    folder: Path, read: Callable[[], Iterable[Row]], limit: int = LIMIT, verdict: Verdict | None = None
) -> Path:
    """Writes ``case_studies.html`` into a run folder, with at most ``limit`` tasks.

    ``read`` gives all rows of the run; it is called twice, since only the shown tasks are held in memory. Without a
    ``verdict`` the package's graders that check text alone are asked.
    """
    check_integer("limit", limit, hint=f"use e.g. {LIMIT}")
    verdict = verdict or partial(checked, graders=package_graders({}, costs=[CHECK]))
    selection = choose(read(), limit, verdict)
    resolved = folder.resolve()
    with whole_files(folder, PAGE) as scratch:
        text = page(f"{resolved.parent.name}/{resolved.name}", read(), selection, verdict)
        (scratch / PAGE).write_text(text, encoding="utf-8")
    return folder / PAGE


def _solved(row: Row, answer: str | None, verdict: Verdict) -> bool | None:
    """Whether an answer to a row is right; None where there is none or nobody can say."""
    score = None if answer is None else verdict(row, answer)
    return None if score is None else score.value == 1.0


def _settings(record: Row) -> dict[str, str]:
    """How an arm decodes: its method, the method's own settings, and what it adds to them."""
    settings = record.get("settings")
    found = {"method": record.get("method"), **(settings if isinstance(settings, dict) else {})}
    found |= {"temperature": record.get("temperature") or None, "ttt": bool(record.get("ttt")) or None}
    return {str(name): _short(value) for name, value in found.items() if value is not None}


def _short(value: Any) -> str:
    """A setting in a few characters; of an object its class name and settings."""
    if not isinstance(value, dict) or "class_path" not in value:
        return str(value)
    inner = ", ".join(f"{k}={_short(v)}" for k, v in (value.get("init_args") or {}).items() if v is not None)
    return f"{str(value['class_path']).rpartition('.')[2]}({inner})"


def _case(task: Chosen, rows: Sequence[Row], verdict: Verdict) -> dict[str, Any]:
    """A task with its rows: what stands around their answers."""
    row = rows[0]
    metadata = row["metadata"] if isinstance(row.get("metadata"), dict) else {}
    about = [metadata[name] for name in ("context_category", "sub_category", "context_id") if name in metadata]
    prompt = _prompt(row)
    rubrics = row["rubrics"] if isinstance(row.get("rubrics"), list) else []
    answered = [row for row in rows if row["model_output"] is not None]
    graded = [(row["dgd"]["arm"], verdict(row, row["model_output"])) for row in answered]
    return {
        "task": task,
        "rows": rows,
        "about": " · ".join(map(str, about)),
        "prompt": prompt,
        "asked": prompt[-1][1].rstrip().rpartition("\n\n")[2] if prompt else "",
        "characters": sum(len(text) for _, text in prompt),
        "rubrics": rubrics,
        "status": {arm: score.status for arm, score in graded if score and len(score.status) == len(rubrics)},
    }


def _prompt(row: Row) -> list[tuple[str, str]]:
    """Roles and texts of the chat; of rows that are none, the fields that are text."""
    messages = row.get("messages")
    if isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
        return [(str(message.get("role")), str(message.get("content"))) for message in messages]
    return [(name, text) for name, text in row.items() if isinstance(text, str) and name not in ("idx", "model_output")]


def _tokens(found: Row) -> Iterable[dict[str, str]]:
    """Of a ``dgd.divergence`` each token: its colour, and its numbers to be pointed at."""
    tops = {entry["at"]: entry for entry in found["top"]}
    for at, text in enumerate(found["tokens"]):
        moved, top = found["tv_target_guided"][at], tops.get(at, {})
        level = 0 if moved < FAINT else min(LEVELS, 1 + int(moved * LEVELS))
        kinds = [f"m{level}"] * (level > 0) + ["c"] * bool(found["argmax_changed"][at])
        kl, js = found["kl_target_readout"][at], found["js"][at]
        divergence = f"JS {js:.3f}, KL(target‖readout) {'∞' if kl is None else f'{kl:.3f}'}"
        lines = [f"token {at + 1}: {text!r}", f"guidance moved {moved:.1%}; {divergence}"]
        for name in DISTRIBUTIONS:
            rank = f", rank {found[f'{name}_rank'][at]}" if f"{name}_rank" in found else ""
            lines.append(f"{name}: probability {found[f'{name}_prob'][at]:.4f}{rank}")
        for name in DISTRIBUTIONS:
            if name in top:
                lines.append(f"{name}'s first: " + ", ".join(f"{word!r} {p:.3f}" for word, p in top[name]))
        shown = text.replace("\n", "⏎\n") if kinds else text
        yield {"kinds": " ".join(kinds), "title": "\n".join(lines), "text": shown}


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page of a run folder; 2 where there are no predictions."""
    parser = argparse.ArgumentParser(prog="python -m dgd_lightning.report.case_studies", description=__doc__)
    parser.add_argument("folder", type=Path, help="a run folder, such as logs/NAME/version_0")
    parser.add_argument("--limit", type=int, default=LIMIT, help="most tasks on the page")
    options = parser.parse_args(argv)
    try:
        if not (options.folder / PREDICTIONS).is_file():
            expected = f"a run folder of dgd predict with {PREDICTIONS}"
            raise InputError(
                "folder", expected=expected, received=options.folder, hint="give the path that the run printed"
            )
        print(write_case_studies(options.folder, lambda: read_predictions(options.folder), options.limit))
    except InputError as error:
        print(f"case_studies: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
