"""A file of one arm for CL-bench's own ``eval.py``; what that writes, `dgd score` and `dgd report` read."""

from collections.abc import Sequence
from pathlib import Path

from dgd_lightning import jsonl
from dgd_lightning.errors import InputError
from dgd_lightning.files import whole_files
from dgd_lightning.scoring.judge_text import rubric_texts
from dgd_lightning.scoring.score_run import Source, rows_of

FIELDS = ("idx", "messages", "model_output", "rubrics", "metadata")  # that eval.py reads (commit 76a395a), or copies


def export(sources: Sequence[Source], arm: str | None, path: Path) -> int:
    """Write the rows of one arm. The script names tasks by ``metadata.task_id`` alone, so it can't hold two.

    Rows keep ``dgd``: the script copies it, so the graded file still knows the arm.

    Args:
        sources: a run, or a file of rows.
        arm: which one; None where there is one alone.
        path: a new file.

    Returns:
        How many rows.

    Raises:
        InputError: several runs, an unknown or ambiguous arm, rows that the script can't grade, a file that is there.
    """
    if len(sources) > 1:
        received = f"{len(sources)} runs"
        raise InputError("export_clbench", expected="one run", received=received, hint="export them one by one")
    if path.exists():
        raise InputError("export_clbench", expected="a new file", received=path, hint="name another, or delete it")
    arms = list(dict.fromkeys(row["dgd"]["arm"] for row in rows_of(sources[0].rows)))
    if (arm is None and len(arms) > 1) or (arm is not None and arm not in arms):
        received = "nothing" if arm is None else arm
        raise InputError("arm", expected=f"one of {', '.join(arms)}", received=received, hint="name it with --arm")
    rows = [row for row in rows_of(sources[0].rows) if arm is None or row["dgd"]["arm"] == arm]
    for row in rows:
        if not rubric_texts(row.get("rubrics")) or not isinstance(row.get("metadata"), dict):
            raise InputError(
                "export_clbench",
                expected="rows in CL-bench's format, with rubrics and metadata",
                received=f"{row['idx']} with fields {', '.join(row)}"[:200],
                hint="score it with dgd score",
            )
    with whole_files(path.parent, path.name) as scratch, (scratch / path.name).open("wb") as out:
        for row in rows:
            out.write(jsonl.encoded({name: row[name] for name in (*FIELDS, "dgd") if name in row}))
    return len(rows)
