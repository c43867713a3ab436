"""Tasks of a data set of the `datasets` library: a Hub id, or a local folder that it can load."""

from __future__ import annotations

from typing import Any, Literal

from dgd_lightning.data.contexts import parse_rows
from dgd_lightning.data.prompts import PromptFormat
from dgd_lightning.data.rows import load_rows
from dgd_lightning.data.tasks import TaskData
from dgd_lightning.types import Task


class HubData(TaskData):
    """Tasks of a `datasets` id.

    Args:
        path: the id (``openai/gsm8k``) or a local folder.
        name: the configuration's name.
        split: the split.
        revision: a commit, tag or branch.
        streaming: read row by row instead of downloading everything.
        format: ``prompts``: one field holds the prompt; ``contexts``: CL-bench rows.
        field: the field that holds the prompt; of a list of turns the first one is taken.
        id_field: the field that holds the id; None numbers the rows.
        template: the user's message; ``{prompt}`` is the prompt, ``{NAME}`` another text of the row, or
            a list of texts, one a line.
        system: a system message.
        chat: render with the tokenizer's chat template; false gives the raw text to the model.
        **options: see `TaskData`.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        split: str = "test",
        revision: str | None = None,
        streaming: bool = False,
        format: Literal["prompts", "contexts"] = "prompts",
        field: str = "prompt",
        id_field: str | None = None,
        template: str = "{prompt}",
        system: str | None = None,
        chat: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.source: dict[str, Any] = {"name": name, "split": split, "revision": revision, "streaming": streaming}
        self.path, self.kind = path, format
        prefix = f"{path.rstrip('/').rpartition('/')[2]}-{split}"
        self.format = PromptFormat(
            field=field, id_field=id_field, prefix=prefix, template=template, system=system, chat=chat
        )

    def read(self) -> list[Task]:
        """See `TaskData.read`."""
        filtered = self.subset is not None or any(names is not None for names in self.filters.values())
        rows = load_rows(self.path, **self.source, limit=None if filtered else self.limit)
        return parse_rows(rows) if self.kind == "contexts" else self.format.tasks(rows)
