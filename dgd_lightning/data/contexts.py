"""CL-bench-format rows, of a file or a `datasets` id: chat messages, rubrics and metadata, graded or not."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dgd_lightning.clbench import with_context
from dgd_lightning.data.messages import read_question
from dgd_lightning.data.rows import carried, field, load_rows, tasks_of
from dgd_lightning.data.tasks import TaskData
from dgd_lightning.row_files import ENDS, Row, end_of, read_rows
from dgd_lightning.types import Task

METADATA = ("task_id", "context_id", "context_category", "sub_category")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def parse_row(row: Row) -> Task:
    """The task of one CL-bench row; raises InputError where a field is missing, or not as it should be."""
    row = row._replace(value=with_context(row.value))
    messages = read_question(row, "messages")
    field(row, "rubrics", list, "a list")
    for key in METADATA:
        field(row, f"metadata.{key}", str, "a string")
    return Task(row.value["metadata"]["task_id"], messages, None, carried(row))


def parse_rows(rows: Iterable[Row]) -> list[Task]:
    """Tasks of CL-bench rows; their task ids must be unique."""
    return tasks_of(rows, parse_row, "metadata.task_id")


class ContextsData(TaskData):
    """Tasks in CL-bench's format.

    Args:
        path: a file of rows (see `row_files`), or a `datasets` id such as ``tencent/CL-bench``.
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
        file = self.path.exists() or end_of(self.path) in ENDS
        self.hub = None if file or not _HUB_ID.fullmatch(path) else path
        self.split, self.revision = split, revision

    def read(self) -> list[Task]:
        """See `TaskData.read`."""
        if self.hub is None:
            return parse_rows(read_rows(self.path))
        rows, self.data_commit = load_rows(self.hub, split=self.split, revision=self.revision)
        return parse_rows(rows)
