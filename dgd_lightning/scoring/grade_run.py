"""One run from answers to files of scores: what `dgd score` and the callback `CLBenchScorer` share."""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dgd_lightning.files import whole_files
from dgd_lightning.grader import Grader
from dgd_lightning.scoring.graded import Graded, comparisons, read_graded
from dgd_lightning.scoring.score_run import Counts, Source, rows_of, score_rows, write_graded
from dgd_lightning.scoring.summary import Compared, compared, summary


class GradedRun(NamedTuple):
    """What a run came to."""

    scores: list[Graded]  # of every row, but for those left to other graders
    kept: list[Graded]  # without the excluded tasks
    compared: list[Compared]  # over all tasks
    counts: Counts


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
        InputError: see :func:`score_rows`.
    """
    counts = Counts()
    asked = [grader.totals() for grader in graders]  # so far, of other runs

    def keep(now: Counts) -> None:
        nonlocal counts
        counts = now
        if on_progress is not None:
            on_progress(now)

    write_graded(where, score_rows(where, graders, leave=leave, on_progress=keep))
    rows = rows_of(where.graded)
    scores, arms = read_graded(row for row in rows if not leave or row["dgd"]["grader"] or row["model_output"] is None)
    wanted = comparisons(arms)
    found = compared(scores, wanted)
    kept = [one for one in scores if one.idx not in excluded]
    report: dict[str, Any] = summary(scores, found)
    if excluded:
        report["without_excluded"] = {"excluded": sorted(excluded), **summary(kept, compared(kept, wanted))}
    used = {row["dgd"]["grader"] for row in rows_of(where.graded)}
    report["graders"] = {grader.name: grader.fingerprint() for grader in graders if grader.name in used}
    spent = [_since(before, grader.totals()) for before, grader in zip(asked, graders, strict=True)]
    report["judge"] = next((one for one in spent if one is not None), None)
    name = where.summary.name
    with whole_files(where.summary.parent, name) as scratch:
        (scratch / name).write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return GradedRun(scores, kept, found, counts)


def _since(before: Any, now: Any) -> Any:
    """Counts that rose since; what is no count stays as it is."""
    if isinstance(now, dict):
        return {name: _since((before or {}).get(name), value) for name, value in now.items()}
    counts = isinstance(now, int | float) and isinstance(before, int | float)
    return now - before if counts else now
