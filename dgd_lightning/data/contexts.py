"""CL-bench-format rows, of a JSONL file or a `datasets` id: chat messages, rubrics and metadata, graded or not."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dgd_lightning.clbench import with_context
from dgd_lightning.data.rows import Row, carried, field, load_rows, read_jsonl, tasks_of
from dgd_lightning.data.tasks import TaskData
from dgd_lightning.errors import InputError
from dgd_lightning.types import Task

ROLES = ("system", "user", "assistant")
METADATA = ("task_id", "context_id", "context_category", "sub_category")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def parse_row(row: Row) -> Task:
    """The task of one CL-bench row; raises InputError where a field is missing, or not as it should be."""
    row = row._replace(value=with_context(row.value))
    messages = field(row, "messages", list, "a list of messages")
    if not messages:
        raise InputError(
            row.place, expected="at least one message", received="none", hint="correct the field 'messages'"
        )
    for message in messages:
        found = message if isinstance(message, dict) else {}
        if not isinstance(found.get("content"), str) or found.get("role") not in ROLES:
            raise InputError(
                row.place,
                expected=f"messages with 'role' ({', '.join(ROLES)}) and a text 'content'",
                received=str(message)[:80],
                hint="correct the field 'messages'",
            )
    field(row, "rubrics", list, "a list")
    for key in METADATA:
        field(row, f"metadata.{key}", str, "a string")
    idx = row.value["metadata"]["task_id"]
    return Task(idx, [{"role": m["role"], "content": m["content"]} for m in messages], None, carried(row))


def parse_rows(rows: Iterable[Row]) -> list[Task]:
    """Tasks of CL-bench rows; their task ids must be unique."""
    return tasks_of(rows, parse_row, "metadata.task_id")


class ContextsData(TaskData):
    """Tasks in CL-bench's format.

    Args:
        path: a file (``.jsonl`` or ``.jsonl.gz``), or a `datasets` id such as ``tencent/CL-bench``.
        split: of a `datasets` id.
        revision: of a `datasets` id: a commit, tag or branch.
        batch_size: tasks decoded together; those of one context are neighbours.
        **options: see `TaskData`.
    """

    def __init__(
        self, path: str, split: str = "train", revision: str | None = None, batch_size: int = 1, **options: Any
    ) -> None:
        super().__init__(batch_size=batch_size, **options)
        self.path = Path(path)
        file = self.path.exists() or self.path.suffix in (".jsonl", ".json", ".gz")
        self.hub = None if file or not _HUB_ID.fullmatch(path) else path
        self.split, self.revision = split, revision

    def read(self) -> list[Task]:
        """See `TaskData.read`."""
        if self.hub is None:
            return parse_rows(read_jsonl(self.path))
        rows, self.data_commit = load_rows(self.hub, split=self.split, revision=self.revision)
        return parse_rows(rows)
