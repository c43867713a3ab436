"""CL-bench-format rows, of a JSONL file or a `datasets` id: chat messages, rubrics and metadata, graded or not."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from dgd_lightning.data.hub_rows import load_rows
from dgd_lightning.data.rows import STALE, Row, check_json, check_unique, field, read_jsonl
from dgd_lightning.data.subset import Subset
from dgd_lightning.data.tasks import Names, TaskData
from dgd_lightning.errors import InputError
from dgd_lightning.types import Task

ROLES = ("system", "user", "assistant")
METADATA = ("task_id", "context_id", "context_category", "sub_category")


def parse_row(row: Row) -> Task:
    """The task of one CL-bench row.

    Raises:
        InputError: a field is missing, of a wrong type, or nothing that JSON can hold.
    """
    messages = field(row, "messages", list, "a list of messages")
    if not messages:
        raise InputError(
            row.place, expected="at least one message", received="none", hint="correct the field 'messages'"
        )
    for message in messages:
        if (
            not isinstance(message, dict)
            or not isinstance(message.get("content"), str)
            or message.get("role") not in ROLES
        ):
            raise InputError(
                row.place,
                expected=f"messages with 'role' ({', '.join(ROLES)}) and a text 'content'",
                received=str(message)[:80],
                hint="correct the field 'messages'",
            )
    field(row, "rubrics", list, "a list")
    for key in METADATA:
        field(row, f"metadata.{key}", str, "a string")
    kept = {key: value for key, value in row.value.items() if key not in STALE}
    check_json(Row(row.place, row.number, kept))
    idx = row.value["metadata"]["task_id"]
    return Task(idx, [{"role": m["role"], "content": m["content"]} for m in messages], None, kept)


def parse_rows(rows: Iterable[Row]) -> list[Task]:
    """Tasks of CL-bench rows; their task ids must be unique."""
    tasks, places = [], []
    for row in rows:
        tasks.append(parse_row(row))
        places.append((row.place, tasks[-1].idx))
    check_unique(places, "metadata.task_id")
    return tasks


_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class ContextsData(TaskData):
    """Tasks in CL-bench's format.

    Args:
        path: a file (``.jsonl`` or ``.jsonl.gz``), or a `datasets` id such as ``tencent/CL-bench``.
        split: of a `datasets` id.
        revision: of a `datasets` id: a commit, tag or branch.
        batch_size: tasks decoded together; those of one context stand side by side.
        limit: only the first so many tasks that pass the filter and are in the subset.
        category: keep tasks of these ``metadata.context_category`` values only.
        sub_category: keep tasks of these ``metadata.sub_category`` values only.
        subset: a share of every category's contexts, for development, see `Subset`.
        clbench: whether the rows are CL-bench's, which may be decoded but never adapted to. None: they are, unless all
            of them come from the lab. Set it to false for contexts of your own.
    """

    def __init__(
        self,
        path: str,
        split: str = "train",
        revision: str | None = None,
        batch_size: int = 1,
        limit: int | None = None,
        category: Names = None,
        sub_category: Names = None,
        subset: Subset | None = None,
        clbench: bool | None = None,
    ) -> None:
        chosen = {"category": category, "sub_category": sub_category, "subset": subset}
        super().__init__(batch_size=batch_size, limit=limit, clbench=clbench, **chosen)  # type: ignore[arg-type]
        self.path = Path(path)
        file = self.path.exists() or self.path.suffix in (".jsonl", ".json", ".gz")
        self.hub = None if file or not _HUB_ID.fullmatch(path) else path
        self.split, self.revision = split, revision

    def read(self) -> list[Task]:
        """See `TaskData.read`."""
        if self.hub is None:
            return parse_rows(read_jsonl(self.path, "data.path"))
        rows = load_rows(self.hub, name=None, split=self.split, revision=self.revision, streaming=False, limit=None)
        return parse_rows(rows)
