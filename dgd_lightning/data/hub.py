"""Tasks of a data set of the `datasets` library: a Hub id, or a local folder that it can load."""

from __future__ import annotations

from typing import Literal

from dgd_lightning.data.contexts import parse_rows
from dgd_lightning.data.hub_rows import load_rows
from dgd_lightning.data.prompts import PromptFormat
from dgd_lightning.data.subset import Subset
from dgd_lightning.data.tasks import Names, TaskData
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
        template: the user's message; ``{prompt}`` stands for the prompt, ``{NAME}`` for another text of the row, or for
            a list of texts, one a line.
        system: a system message.
        chat: render with the tokenizer's chat template; false gives the raw text to the model.
        batch_size: tasks decoded together.
        limit: only the first so many tasks that pass the filter and are in the subset.
        category: keep tasks of these ``metadata.context_category`` values only.
        sub_category: keep tasks of these ``metadata.sub_category`` values only.
        subset: a share of every category's contexts, for development, see `Subset`.
        clbench: whether the rows are CL-bench's, which may be decoded but never adapted to. None: they are, if any
            looks like one and is not the lab's, or the data set is named so.
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
        batch_size: int = 8,
        limit: int | None = None,
        category: Names = None,
        sub_category: Names = None,
        subset: Subset | None = None,
        clbench: bool | None = None,
    ) -> None:
        chosen = {"category": category, "sub_category": sub_category, "subset": subset}
        super().__init__(batch_size=batch_size, limit=limit, clbench=clbench, **chosen)  # type: ignore[arg-type]
        self.source = {"name": name, "split": split, "revision": revision, "streaming": streaming}
        self.path, self.kind = path, format
        prefix = f"{path.rstrip('/').rpartition('/')[2]}-{split}"
        self.format = PromptFormat(
            field=field, id_field=id_field, prefix=prefix, template=template, system=system, chat=chat
        )

    def read(self) -> list[Task]:
        """See `TaskData.read`."""
        filtered = self.subset is not None or any(names is not None for names in self.filters.values())
        rows = load_rows(self.path, **self.source, limit=None if filtered else self.limit)  # type: ignore[arg-type]
        if self.kind == "contexts":
            return parse_rows(rows)
        return self.format.tasks(rows)
