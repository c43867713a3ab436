"""Case studies: one HTML page of a run with the answers of every arm side by side, tokens coloured by correction.

    python -m dgd_lightning.report.case_studies logs/NAME/version_N

The page holds no scripts and asks for nothing from elsewhere; every text in it is escaped.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dgd_lightning.errors import InputError
from dgd_lightning.files import whole_files
from dgd_lightning.lab.checks import grade, has_checks
from dgd_lightning.report.style import CSS, LEVELS
from dgd_lightning.report.text import escaped
from dgd_lightning.run_folder import PREDICTIONS, read_predictions
from dgd_lightning.types import Score

PAGE, LIMIT = "case_studies.html", 20
FAINT = 0.01  # share of moved probability below which a token has no colour
PLACES = 60  # of one answer whose likeliest tokens are listed
SIGNS = {"yes": '<b class="yes">✓</b>', "no": '<b class="no">✗</b>'}
Row = dict[str, Any]


class ArmSummary(NamedTuple):
    """What one arm did on all tasks of the run."""

    settings: dict[str, Any]
    tasks: int = 0
    solved: int = 0
    graded: int = 0
    changed: int = 0
    tokens: int = 0  # of rows that tell what was changed


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


def choose(rows: Iterable[Row], limit: int) -> Selection:
    """First the tasks that some arms solved and others did not, then the others, each by changed tokens.

    Args:
        rows: of all tasks and arms.
        limit: most tasks that are chosen.
    """
    verdicts: dict[str, set[bool]] = defaultdict(set)
    changes: dict[str, int] = defaultdict(int)
    arms: dict[str, ArmSummary] = {}
    for row in rows:
        idx, record, score = row["idx"], row["dgd"], graded(row)
        changed = (record.get("divergence") or {}).get("argmax_changed", [])
        changes[idx] += sum(changed)
        if score is not None:
            verdicts[idx].add(score.value == 1.0)
        arm = arms.setdefault(record["arm"], ArmSummary(_settings(record)))
        arms[record["arm"]] = arm._replace(
            tasks=arm.tasks + 1,
            solved=arm.solved + (score is not None and score.value == 1.0),
            graded=arm.graded + (score is not None),
            changed=arm.changed + sum(changed),
            tokens=arm.tokens + len(changed),
        )
    tasks = [Chosen(idx, len(verdicts[idx]) == 2, changed) for idx, changed in changes.items()]
    shown = sorted(tasks, key=lambda task: (not task.differs, -task.changed))[:limit]  # stable: ties as in the data
    return Selection(shown, len(tasks), sum(t.differs for t in tasks), sum(t.changed > 0 for t in tasks), arms)


def graded(row: Row) -> Score | None:
    """The verdict of the lab's program checks; None for rows without an answer or without checks that can be read."""
    if row["model_output"] is None or not has_checks(row):
        return None
    try:
        return grade(row, row["model_output"])
    except (KeyError, TypeError, ValueError):  # metadata of another origin
        return None


def page(title: str, rows: Iterable[Row], selection: Selection) -> str:
    """The whole page.

    Args:
        title: names the run.
        rows: of all tasks and arms; of these the chosen are kept.
        selection: from :func:`choose`.
    """
    wanted: dict[str, list[Row]] = {task.idx: [] for task in selection.shown}
    for row in rows:
        if row["idx"] in wanted:
            wanted[row["idx"]].append(row)
    cases = (_case(number, task, wanted[task.idx]) for number, task in enumerate(selection.shown, 1))
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>Case studies: {escaped(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>",
            *_head(title, selection),
            *cases,
            "</main>\n</body>\n</html>\n",
        ]
    )


def write_case_studies(folder: Path, read: Callable[[], Iterable[Row]], limit: int = LIMIT) -> Path:
    """Writes ``case_studies.html`` into a run folder.

    Args:
        folder: of the run.
        read: gives all rows of the run; called twice, since only the shown tasks are held in memory.
        limit: most tasks on the page.

    Raises:
        InputError: a limit that shows nothing.
    """
    if limit < 1:
        raise InputError("limit", expected="at least 1 task", received=limit, hint=f"use e.g. {LIMIT}")
    selection = choose(read(), limit)
    resolved = folder.resolve()
    with whole_files(folder, PAGE) as scratch:
        text = page(f"{resolved.parent.name}/{resolved.name}", read(), selection)
        (scratch / PAGE).write_text(text, encoding="utf-8")
    return folder / PAGE


def _settings(record: Row) -> dict[str, Any]:
    """What a reader wants to know of an arm."""
    names = ("method", "temperature", "rank_by", "num_answers", "betas")
    guidance = ("beta", "readout", "space", "schedule", "candidates", "plausibility")
    usual = {"temperature": 0.0, "space": "logits"}
    blends = (record.get("guidance") or {}) if record.get("method") == "rerank" else record
    found = {name: record.get(name) for name in names} | {name: blends.get(name) for name in guidance}
    if found["betas"] is not None:  # then there is one candidate for each
        found["num_answers"] = None
    found["ttt"] = True if record.get("ttt") else None
    return {name: _short(value) for name, value in found.items() if value is not None and value != usual.get(name)}


def _short(value: Any) -> Any:
    """An object's class name and settings."""
    if not isinstance(value, dict) or "class_path" not in value:
        return value
    inner = ", ".join(f"{k}={_short(v)}" for k, v in (value.get("init_args") or {}).items() if v is not None)
    return f"{str(value['class_path']).rpartition('.')[2]}({inner})"


# Parts of the page.


def _head(title: str, selection: Selection) -> Iterator[str]:
    shown, tasks = len(selection.shown), selection.tasks
    yield f"<h1>Case studies: {escaped(title)}</h1>"
    yield (
        f"<p>{shown} of {tasks} tasks, chosen in this order: tasks that some arms solved and others did not "
        f"({selection.differing} in all), then tasks with most tokens whose top-1 token guidance changed "
        f"({selection.with_changes} in all have any), then the others as in the data. "
        "<strong>This is a selection of what differs most, not a statistic.</strong> The table counts all tasks.</p>"
    )
    yield '<div class="wide"><table>\n<tr><th>arm<th>settings<th>tasks<th>solved<th>tokens changed</tr>'
    for name, arm in selection.arms.items():
        settings = " · ".join(f"{key} {value}" for key, value in arm.settings.items())
        solved = f"{arm.solved}/{arm.graded}" if arm.graded else "–"
        changed = f"{arm.changed:,}/{arm.tokens:,}" if arm.tokens else "–"
        yield f"<tr><th>{escaped(name)}<td>{escaped(settings)}<td>{arm.tasks:,}<td>{solved}<td>{changed}</tr>"
    yield "</table></div>"
    steps = "".join(
        f'<span class="m{level}"> {max(FAINT, (level - 1) / LEVELS):.0%} </span>' for level in range(1, LEVELS + 1)
    )
    yield (
        "<p>Colour: how much probability guidance moved at a token, the total variation of target and guided "
        f'distribution, from <span class="answer">{steps}</span> on. '
        '<span class="answer"><b class="c">Underlined</b></span>: guidance changed the top-1 token. '
        "An arm without guidance moves nothing. Point at a token for its numbers; below each answer stand the "
        "likeliest tokens where guidance changed something or target and readout differ much.</p>"
    )
    yield "<nav><ol>"
    for number, task in enumerate(selection.shown, 1):
        yield f'<li><a href="#case-{number}">{escaped(task.idx)}</a> {_why(task)}'
    yield "</ol></nav>"


def _why(task: Chosen) -> str:
    differs = "arms differ in solving it; " if task.differs else ""
    return f'<span class="faint">{differs}{task.changed} changed token{"" if task.changed == 1 else "s"}</span>'


def _case(number: int, task: Chosen, rows: Sequence[Row]) -> str:
    row = rows[0]
    found = row.get("metadata")
    metadata = found if isinstance(found, dict) else {}
    about = [metadata[name] for name in ("context_category", "sub_category", "context_id") if name in metadata]
    parts = _prompt(row)
    asked = parts[-1][1].rstrip().rpartition("\n\n")[2] if parts else ""
    size = sum(len(text) for _, text in parts)
    prompt = "".join(f'<h4>{escaped(role)}</h4><pre dir="auto">{escaped(text)}</pre>' for role, text in parts)
    return "\n".join(
        [
            f'<section id="case-{number}">\n<h2>{number}. {escaped(task.idx)}</h2>',
            f'<p class="faint">{" · ".join(map(escaped, about))}</p><p>{_why(task)}</p>',
            f'<h3>End of the prompt</h3><pre dir="auto">{escaped(asked)}</pre>',
            f"<details><summary>Context and question ({size:,} characters)</summary>{prompt}</details>",
            '<h3>Answers</h3><div class="wide"><div class="arms">',
            *map(_answer, rows),
            "</div></div>",
            _rubrics(rows),
            "</section>",
        ]
    )


def _prompt(row: Row) -> list[tuple[str, str]]:
    """Roles and texts of the chat; of rows that are none, the fields that are text."""
    messages = row.get("messages")
    if isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
        return [(str(message.get("role")), str(message.get("content"))) for message in messages]
    return [(name, text) for name, text in row.items() if isinstance(text, str) and name not in ("idx", "model_output")]


def _answer(row: Row) -> str:
    record, score = row["dgd"], graded(row)
    found = record.get("divergence")
    title = f"<article><h4>{escaped(record['arm'])}</h4>"
    if row["model_output"] is None:
        return f'{title}<p class="faint">no answer: {escaped(record.get("skipped", "unknown"))}</p></article>'
    verdict = (
        ""
        if score is None
        else '<b class="yes">solved</b> · '
        if score.value == 1.0
        else '<b class="no">not solved</b> · '
    )
    changed = f" · {sum(found['argmax_changed'])} changed" if found else ""
    about = f"<p>{verdict}{record['tokens']:,} tokens{changed}</p>"
    others = _answers(row) if record.get("method") == "rerank" else ""
    if not found:
        text = escaped(row["model_output"])
        return f'{title}{about}<div class="answer" dir="auto">{text}</div>{others}</article>'
    top = {entry["at"]: entry for entry in found["top"]}
    tokens = "".join(_token(found, at, top.get(at)) for at in range(len(found["tokens"])))
    return f'{title}{about}<div class="answer" dir="auto">{tokens}</div>{_places(found)}{others}</article>'


def _answers(row: Row) -> str:
    """All answers among which the best was chosen, folded away."""
    record = row["dgd"]
    answers = record["answers"]
    words = f"{len(answers)} answers, of which number {record['chosen'] + 1} was chosen"
    lines = [f"<details><summary>{words}</summary>"]
    for number, one in enumerate(answers, 1):
        score = graded({**row, "model_output": one["text"]})
        verdict = "" if score is None else f"{SIGNS['yes' if score.value == 1.0 else 'no']} "
        rank = "−∞" if one["score"] is None else f"{one['score']:.4g}"
        beta = "" if one["beta"] is None else f" · β {one['beta']:g}"
        about = f"score {rank}{beta} · {one['tokens']:,} tokens · {escaped(one['stop_reason'])}"
        lines.append(f'<p>{verdict}{number}. {about}</p><pre dir="auto">{escaped(one["text"])}</pre>')
    return "\n".join([*lines, "</details>"])


def _token(found: Row, at: int, top: Row | None) -> str:
    """One token: its colour, and its numbers to be pointed at."""
    text, moved, changed = found["tokens"][at], found["tv_target_guided"][at], found["argmax_changed"][at]
    level = 0 if moved < FAINT else min(LEVELS, 1 + int(moved * LEVELS))
    kinds = [f"m{level}"] * (level > 0) + ["c"] * bool(changed)
    kl, js = found["kl_target_readout"][at], found["js"][at]
    lines = [
        f"token {at + 1}: {text!r}",
        f"guidance moved {moved:.1%}; JS {js:.3f}, KL(target‖readout) {'∞' if kl is None else f'{kl:.3f}'}",
        *(
            f"{name}: probability {found[f'{name}_prob'][at]:.4f}, rank {found[f'{name}_rank'][at]}"
            for name in ("target", "readout")
        ),
        f"guided: probability {found['guided_prob'][at]:.4f}",
    ]
    for distribution in ("target", "readout", "guided") if top else ():
        if distribution in top:  # type: ignore[operator]
            lines.append(f"{distribution}'s first: " + ", ".join(f"{word!r} {p:.3f}" for word, p in top[distribution]))  # type: ignore[index]
    shown = escaped(text.replace("\n", "⏎\n") if kinds else text)
    return f'<span class="{" ".join(kinds)}" title="{escaped(chr(10).join(lines))}">{shown}</span>'


def _places(found: Row) -> str:
    """The likeliest tokens of each distribution, where the row has them."""
    entries = found["top"][:PLACES]
    if not entries:
        return ""
    distributions = [distribution for distribution in ("target", "readout", "guided") if distribution in entries[0]]
    total = len(found["top"])
    less = f", the first {PLACES}" if total > PLACES else ""
    heads = "".join(f"<th>{name}" for name in distributions)
    lines = [
        f"<details><summary>Likeliest tokens at {total} places{less}</summary>",
        f'<div class="wide"><table class="places"><tr><th>token<th>emitted{heads}</tr>',
    ]
    for entry in entries:
        at = entry["at"]
        kind = ' class="c"' if found["changed"][at] else ""
        cells = "".join(
            "<td>" + "<br>".join(f"<code>{_quoted(word)}</code> {p:.3f}" for word, p in entry[distribution])
            for distribution in distributions
        )
        lines.append(f"<tr><td>{at + 1}<td><code{kind}>{_quoted(found['tokens'][at])}</code>{cells}</tr>")
    return "\n".join([*lines, "</table></div></details>"])


def _quoted(word: str) -> str:
    """A token with its blanks to be seen."""
    return escaped(word.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥"))


def _rubrics(rows: Sequence[Row]) -> str:
    """Which rubrics hold, a column per arm; nothing for rows without program checks."""
    verdicts = [(row, score) for row in rows if (score := graded(row)) is not None]
    if not verdicts:
        return ""
    names = "".join(f"<th>{escaped(row['dgd']['arm'])}" for row, _ in verdicts)
    lines = [f'<h3>Rubrics</h3><div class="wide"><table><tr><th>rubric{names}</tr>']
    for number, rubric in enumerate(verdicts[0][0]["rubrics"]):
        cells = "".join(f'<td class="sign">{SIGNS[score.status[number]]}' for _, score in verdicts)
        lines.append(f"<tr><td>{escaped(rubric)}{cells}</tr>")
    return "\n".join([*lines, "</table></div>"])


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page of a run folder; 2 where there are no predictions.

    Args:
        argv: the arguments; those of the process where None.
    """

    parser = argparse.ArgumentParser(prog="python -m dgd_lightning.report.case_studies", description=__doc__)
    parser.add_argument("folder", type=Path, help="a run folder, such as logs/NAME/version_0")
    parser.add_argument("--limit", type=int, default=LIMIT, help="most tasks on the page")
    options = parser.parse_args(argv)
    try:
        if not (options.folder / PREDICTIONS).is_file():
            raise InputError(
                "folder",
                expected=f"a run folder of dgd predict with {PREDICTIONS}",
                received=options.folder,
                hint="give the path that the run printed",
            )
        print(write_case_studies(options.folder, lambda: read_predictions(options.folder), options.limit))
    except InputError as error:
        print(f"case_studies: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
