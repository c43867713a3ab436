"""Scores a run's rows: graders work from threads, every score is on the disk as soon as it is made.

``scores.jsonl`` is appended to and fsynced, so a killed run continues; at the end ``graded.jsonl`` appears whole, the
rows with CL-bench's own fields (``score``, ``requirement_status``, ``grading_rationale``), which its scripts read.
"""

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

from dgd_lightning import jsonl, run_folder
from dgd_lightning.checks import check_unicode
from dgd_lightning.clbench import with_context
from dgd_lightning.errors import InputError
from dgd_lightning.files import whole_files
from dgd_lightning.grader import Grader, grader_for, remarked
from dgd_lightning.old_rows import upgraded
from dgd_lightning.row_files import kind_of, read_rows, shown, stem
from dgd_lightning.scoring.graded import Graded, comparisons, read_graded
from dgd_lightning.scoring.summary import Compared, compared, summary
from dgd_lightning.types import Score

Row = dict[str, Any]
Key = run_folder.Key
IDS = ("task_id", "unique_id", "id")  # of HumanEval and MBPP, of MATH-500, of others
ASKED = ("question", "problem", "prompt", "messages", "text", "instruction", "input")
AHEAD = 2  # rows per worker that wait for it


class Source(NamedTuple):
    """Where rows come from and where their scores go."""

    rows: Path
    scores: Path  # appended to
    graded: Path  # the rows with their scores
    summary: Path


class Record(NamedTuple):
    """One line of ``scores.jsonl``."""

    idx: str
    arm: str
    key: str  # hash of the row and of all that can change its score
    score: float | None
    requirement_status: list[str]
    grading_rationale: str
    grader: str
    details: dict[str, Any] | None

    @property
    def finished(self) -> bool:
        """Whether nothing about the row is left to be asked."""
        details = self.details or {}
        second = details.get("second") or {"score": 0}  # a second judge that failed is asked again
        return None not in (self.score, details.get("error_class", ""), second["score"])


class Counts(NamedTuple):
    """How far scoring has come, for a progress bar."""

    rows: int = 0  # looked at, those scored before included
    scored: int = 0
    unscored: int = 0  # graders gave up
    reused: int = 0  # scored by an earlier run
    skipped: int = 0  # without an answer
    left: int = 0  # for no grader that is here


class GradedRun(NamedTuple):
    """What a run came to."""

    scores: list[Graded]  # of every row, but for those left to other graders
    kept: list[Graded]  # without the excluded tasks
    compared: list[Compared]  # over all tasks
    counts: Counts


def source(path: str | Path, argument: str = "runs") -> Source:
    """A run folder, or a file of rows with ``model_output``; ``argument``: what the command calls it.

    What is written of ``x.csv`` stands beside it: ``x_graded.jsonl``; ``x.csv_graded.jsonl`` beside an ``x.jsonl``.

    Raises:
        InputError: neither is there.
    """
    path = Path(path)
    if path.is_dir():
        rows = path / run_folder.PREDICTIONS
        if not rows.is_file():
            received, hint = f"{path}", "name a run folder"
            if any(path.glob(run_folder.SHARDS[0])):
                received += ", whose run is not finished"
                hint = "let `dgd predict` finish: the same command continues it"
            elif (newest := run_folder.newest_version(path)) is not None:
                hint = f"name one of its versions: {newest}"
            raise InputError(argument, expected=f"a folder with {run_folder.PREDICTIONS}", received=received, hint=hint)
        return Source(rows, *(path / name for name in ("scores.jsonl", "graded.jsonl", "scores.json")))
    if not path.is_file():
        raise InputError(argument, expected="a run folder or a file of rows", received=path, hint="check the path")
    ends = (".scores.jsonl", "_graded.jsonl", ".scores.json")
    alike = any(one != path and stem(one) == stem(path) and one.is_file() for one in path.parent.iterdir())
    name = path.name if alike else stem(path)
    return Source(path, *(path.with_name(name + end) for end in ends))


def rows_of(path: Path, *, graded: bool = False) -> Iterator[Row]:
    """Rows of a file, each with ``idx``, ``model_output`` and ``dgd.arm``, also where another program wrote it.

    Of ``graded`` ones those with a score need no answer; they get None.

    Raises:
        InputError: the file can't be read, or a row has no answer field.
    """
    seen: set[Key] = set()
    typed = (
        {"score", "requirement_status", "rubrics", "metadata", "dgd"} if kind_of(path, str(path)) == "table" else set()
    )
    for place, number, row in read_rows(path, str(path)):
        if lost := sorted(typed & row.keys()):
            raise InputError(
                place,
                expected=f"{', '.join(lost)} as JSON has them",
                received="texts, as all cells of a table are",
                hint="save the rows as JSONL or Parquet",
            )
        if graded and "score" in row and not isinstance(row.get("model_output"), str):
            row["model_output"] = None
        if not isinstance(row.get("model_output", 0), str | None):
            raise InputError(
                place,
                expected="a row with model_output, a text or null",
                received=shown(row["model_output"]) if "model_output" in row else f"fields {', '.join(row)}"[:80],
                hint="delete the row, or name the file of predictions",
            )
        if not isinstance(row.get("idx"), str | int):  # what can't name a task
            row["idx"] = _named(row, number)
        check_unicode(f"{place}: idx", str(row["idx"]))
        record = row["dgd"] if isinstance(row.get("dgd"), dict) else {}
        row["dgd"] = {**record, "arm": str(record.get("arm", stem(path)))}
        if run_folder.key(row) in seen:
            raise InputError(
                place,
                expected="each idx (without one, each question) once per arm",
                received=f"{row['idx']} again",
                hint="delete the repeated row, or give several answers to a question an idx each and one context_id",
            )
        seen.add(run_folder.key(row))
        yield upgraded(with_context(row))


def _named(row: Row, number: int) -> str:
    """What names the task of a row without ``idx``, so that rows of two files are paired by task, not by place.

    Its data set's id, else a hash of what it asks; the row's number only where it has neither.
    """
    metadata = row.get("metadata")
    known = [metadata.get("task_id")] if isinstance(metadata, dict) else []
    for name in [*known, *(row.get(field) for field in IDS)]:
        if isinstance(name, str | int):
            return str(name)
    asked = [row[field] for field in ASKED if row.get(field)]
    if not asked:
        return str(number)
    return "asked-" + hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]


def read_scores(path: Path) -> dict[Key, Record]:
    """The last score of every row; a torn or damaged line is left out, so that its row is graded again."""
    found: dict[Key, Record] = {}
    if path.exists():
        for line in jsonl.lines(path):
            with contextlib.suppress(ValueError, TypeError):
                record = Record(**json.loads(line.text))
                found[record.idx, record.arm] = record
    return found


def score_rows(
    where: Source,
    graders: Sequence[Grader],
    *,
    leave: bool = False,
    on_progress: Callable[[Counts], None] | None = None,
) -> dict[Key, Record]:
    """Score every row that has an answer and no score yet.

    A row that was given up (score or error class None) is tried again by the next call; one whose row or grader has
    changed is graded anew.

    Args:
        where: see :func:`source`.
        graders: the first that takes a row grades it.
        leave: rows that no grader takes stay without a score; otherwise they are an error.
        on_progress: called after every score.

    Returns:
        Scores by (idx, arm); rows without an answer have none.

    Raises:
        InputError: no grader takes a row, or a grader can't work; what was scored until then is kept.
    """
    out = jsonl.JsonLines(where.scores)  # waits for another process that scores this run, then knows what it wrote
    known = read_scores(where.scores)
    found: dict[Key, Record] = {}
    pools = {grader.name: ThreadPoolExecutor(grader.workers) for grader in graders}
    limit = AHEAD * sum(grader.workers for grader in graders)
    prints = {grader.name: grader.fingerprint() for grader in graders}
    pending: set[Future[Record]] = set()
    tally: Counter[str] = Counter()

    def grade(row: Row, answer: str, grader: Grader, key: str) -> Record:
        score = remarked(row, answer, grader.grade(row, answer), graders)
        place = run_folder.key(row)
        return Record(*place, key, score.value, score.status, score.rationale, grader.name, score.details)

    def report() -> None:
        if on_progress is not None:
            on_progress(Counts(**tally))

    def drain(*, until: int) -> None:
        while len(pending) > until:
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            pending.difference_update(done)
            for future in sorted(done, key=lambda future: future.exception() is not None):  # scores before an error
                record = future.result()
                found[record.idx, record.arm] = record
                out.append([record._asdict()])
                tally["unscored" if record.score is None else "scored"] += 1
            report()

    try:
        for row in rows_of(where.rows):
            tally["rows"] += 1
            answer = row["model_output"]
            if answer is None:
                tally["skipped"] += 1
                continue
            if leave and not any(grader.takes(row) for grader in graders):
                tally["left"] += 1
                continue
            try:
                grader = grader_for(row, graders)
            except InputError as error:
                raise error.named(f"{where.rows} row {tally['rows']}") from error
            place, key = run_folder.key(row), content_key(row, grader.name, prints[grader.name])
            before = known.get(place)
            if before is not None and before.key == key and before.finished:
                score = Score(before.score, before.requirement_status, before.grading_rationale, before.details)
                found[place] = before._replace(details=remarked(row, answer, score, graders).details)
                tally["reused"] += 1
                continue
            pending.add(pools[grader.name].submit(grade, row, answer, grader, key))
            drain(until=limit - 1)
        drain(until=0)
    except BaseException:  # a mistake ends it at once, and so does Ctrl-C: nobody waits for a silent judge
        for grader in graders:
            grader.stop()
        raise
    finally:
        for future in pending:
            future.cancel()
        for pool in pools.values():
            pool.shutdown(wait=True, cancel_futures=True)
        for future in pending:  # what others finished meanwhile is kept
            if not future.cancelled() and future.exception() is None:
                with contextlib.suppress(InputError):  # a full disk: the error that brought us here is reported
                    out.append([future.result()._asdict()])
        out.close()
    report()
    return found


def content_key(row: Row, grader: str, fingerprint: dict[str, Any]) -> str:
    """Hash of everything that a score depends on: the row, of decoding only why it stopped, and the grader."""
    subject = {name: value for name, value in row.items() if name != "dgd"}
    return jsonl.content_key(subject, row["dgd"].get("stop_reason"), grader, fingerprint)[:32]


def write_graded(where: Source, scores: dict[Key, Record]) -> None:
    """Write the rows with CL-bench's fields of graded ones and ours under ``dgd``, in the rows' order.

    Rows without a score have ``score: null``, and a reason.
    """
    name = where.graded.name
    with whole_files(where.graded.parent, name) as scratch, (scratch / name).open("wb") as out:
        for row in rows_of(where.rows):
            place = run_folder.key(row)
            why = "no answer" if row["model_output"] is None else "not graded yet: see `dgd score`"
            record = scores.get(place) or Record(*place, "", None, [], why, "", None)
            graded = {
                "score": int(record.score) if record.score in (0.0, 1.0) else record.score,
                "requirement_status": record.requirement_status,
                "grading_rationale": record.grading_rationale,
                "dgd": {**row["dgd"], "grader": record.grader or None, "grading": record.details},
            }
            out.write(jsonl.encoded({**row, **graded}))


def grade_run(
    where: Source,
    graders: Sequence[Grader],
    *,
    leave: bool = False,
    excluded: frozenset[str] = frozenset(),
    on_progress: Callable[[Counts], None] | None = None,
) -> GradedRun:
    """Score a run's rows and write ``graded.jsonl`` and ``scores.json`` beside them.

    Args:
        where, graders, leave, on_progress: as in :func:`score_rows`.
        excluded: tasks; rates are reported with and without them.

    Raises:
        InputError: as there.
    """
    counts = Counts()
    asked = [grader.totals() for grader in graders]  # so far, of other runs

    def keep(now: Counts) -> None:
        nonlocal counts
        counts = now
        if on_progress is not None:
            on_progress(now)

    records = score_rows(where, graders, leave=leave, on_progress=keep)
    write_graded(where, records)
    rows = rows_of(where.graded)
    scores, arms = read_graded(row for row in rows if not leave or row["dgd"]["grader"] or row["model_output"] is None)
    wanted = comparisons(arms)
    found = compared(scores, wanted)
    kept = [one for one in scores if one.idx not in excluded]
    report: dict[str, Any] = summary(scores, found)
    if excluded:
        report["without_excluded"] = {"excluded": sorted(excluded), **summary(kept, compared(kept, wanted))}
    used = {record.grader for record in records.values()}
    report["graders"] = {grader.name: grader.fingerprint() for grader in graders if grader.name in used}
    spent = [_since(before, grader.totals()) for before, grader in zip(asked, graders, strict=True)]
    report["judge"] = next((one for one in spent if one is not None), None)
    name = where.summary.name
    with whole_files(where.summary.parent, name) as scratch:
        text = json.dumps(report, ensure_ascii=False, indent=1) + "\n"
        (scratch / name).write_text(text, encoding="utf-8", errors="backslashreplace")  # as `jsonl.encoded`
    return GradedRun(scores, kept, found, counts)


def _since(before: Any, now: Any) -> Any:
    """Counts that rose since; what is no count stays as it is."""
    if isinstance(now, dict):
        return {name: _since((before or {}).get(name), value) for name, value in now.items()}
    counts = isinstance(now, int | float) and isinstance(before, int | float)
    return now - before if counts else now
