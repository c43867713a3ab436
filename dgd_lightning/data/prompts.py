"""Single prompts of a file (rows of any kind, or lines of text) or of `datasets`: GSM8K, HumanEval …"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from dgd_lightning.data.contexts import parse_rows
from dgd_lightning.data.messages import read_question
from dgd_lightning.data.rows import carried, field, load_rows, tasks_of
from dgd_lightning.data.tasks import TaskData
from dgd_lightning.errors import InputError
from dgd_lightning.row_files import Row, read_rows
from dgd_lightning.types import Task

PLACE = re.compile(r"(?<!\w)\{(\w+)\}")  # not the argument of a LaTeX command: \boxed{answer} stays as it is
GOLD = ("answer", "solution", "code", "canonical_solution", "test")  # fields that hold what is to be found


class PromptsData(TaskData):
    """Tasks of a file of prompts: rows (see `row_files`), or a ``.txt`` of one prompt a line.

    Args:
        path: the file.
        field: the field that holds the prompt: a text, a list of turns, of which the first one is taken, or a list of
            messages, which is the chat as it is. Text files have the one field ``prompt``.
        id_field: the field that holds the id; None numbers the rows by line or row.
        template: the user's message; ``{prompt}`` is the prompt, ``{NAME}`` another text of the row, or
            a list of texts, one a line. Other braces stay as they are.
        system: a system message.
        chat: render with the tokenizer's chat template; false gives the raw text to the model.
        **options: see `TaskData`.
    """

    def __init__(
        self,
        path: str,
        field: str = "prompt",
        id_field: str | None = None,
        template: str = "{prompt}",
        system: str | None = None,
        chat: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if "{prompt}" not in template:
            raise InputError(
                "data.template",
                expected="a text with {prompt} in it",
                received=repr(template[:80]),
                hint="put {prompt} where the prompt belongs",
            )
        if given := [name for name in PLACE.findall(template) if name in GOLD]:
            raise InputError(
                "data.template",
                expected="a text without the answer",
                received=f"{{{given[0]}}}, which data sets use for the gold answer",
                hint="remove it; rename the field if it is none",
            )
        if system is not None and not chat:
            raise InputError(
                "data.system",
                expected="null with chat: false",
                received=repr(system[:80]),
                hint="set data.chat: true, or write it into data.template",
            )
        self.path: Path | str = Path(path)
        self.prefix = self.path.name.split(".")[0]  # of numbered ids
        self.field, self.id_field = field, id_field
        self.template, self.system, self.chat = template, system, chat

    def read(self) -> list[Task]:
        """See `TaskData.read`."""
        return self.parse(read_rows(Path(self.path)))

    def parse(self, rows: Iterable[Row]) -> list[Task]:
        """Tasks of the rows; raises InputError where one is not as it should be."""
        return tasks_of(rows, self._parse_row, f"id in {self.id_field!r}")

    def _parse_row(self, row: Row) -> Task:
        text = field(row, self.field, (str, list), "a text, a list of turns, or a chat")
        idx = f"{self.prefix}-{row.number}"
        if self.id_field is not None:
            idx = str(field(row, self.id_field, (str, int), "a string or an integer"))
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        if isinstance(text, list) and text and isinstance(text[0], dict):
            chat = read_question(row, self.field)
            if self.template != "{prompt}" or not self.chat or (system and chat[0]["role"] == "system"):
                raise InputError(
                    row.place,
                    expected=f"a text in {self.field!r}, where data.template, data.system or data.chat change it",
                    received="a list of messages",
                    hint="remove these settings",
                )
            return Task(idx, system + chat, None, carried(row))
        if isinstance(text, list):
            text = text[0] if text and isinstance(text[0], str) else ""
        if not text.strip():
            wanted = f"a prompt in {self.field!r}"
            raise InputError(row.place, expected=wanted, received="an empty text", hint="remove it")
        prompt = _filled(self.template, {**row.value, "prompt": text})
        if not self.chat:
            return Task(idx, None, prompt, carried(row))
        return Task(idx, [*system, {"role": "user", "content": prompt}], None, carried(row))


class HubData(PromptsData):
    """Tasks of a `datasets` id.

    Args:
        path: the id (``openai/gsm8k``) or a local folder.
        name: the configuration's name.
        split: the split.
        revision: a commit, tag or branch.
        streaming: read row by row instead of downloading everything.
        format: ``prompts``: one field holds the prompt; ``contexts``: CL-bench rows.
        **options: see `PromptsData`.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        split: str = "test",
        revision: str | None = None,
        streaming: bool = False,
        format: Literal["prompts", "contexts"] = "prompts",
        **options: Any,
    ) -> None:
        super().__init__(path, **options)
        self.source: dict[str, Any] = {"name": name, "split": split, "revision": revision, "streaming": streaming}
        self.path, self.format = path, format
        self.prefix = f"{path.rstrip('/').rpartition('/')[2]}-{split}"

    def read(self) -> list[Task]:
        """See `TaskData.read`."""
        filtered = self.subset is not None or any(names is not None for names in self.filters.values())
        rows, self.data_commit = load_rows(str(self.path), **self.source, limit=None if filtered else self.limit)
        return parse_rows(rows) if self.format == "contexts" else self.parse(rows)


def _filled(template: str, values: Mapping[str, Any]) -> str:
    """A template with the row's texts in it; what they hold is not filled in turn."""

    def fill(place: re.Match[str]) -> str:
        value = values.get(place[1])
        if isinstance(value, list) and all(isinstance(line, str) for line in value):
            value = "\n".join(value)
        return value if isinstance(value, str) else place[0]

    return PLACE.sub(fill, template)
