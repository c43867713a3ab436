"""Single prompts from a text file (one a line), JSONL, gzipped JSONL or a JSON array: GSM8K, HumanEval, MATH-500 …"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dgd_lightning.data.rows import STALE, Row, check_json, check_unique, field, read_json_array, read_jsonl, read_lines
from dgd_lightning.data.tasks import TaskData
from dgd_lightning.errors import InputError
from dgd_lightning.types import Task

PLACE = re.compile(r"(?<!\w)\{(\w+)\}")  # not the argument of a LaTeX command: \boxed{answer} stays as it is
GOLD = ("answer", "solution", "code", "canonical_solution", "test")  # fields that hold what is to be found


class PromptFormat:
    """How a row becomes a task.

    Args:
        field: the field that holds the prompt, or turns of which the first is taken.
        id_field: the field that holds the id; None numbers the rows: ``PREFIX-1``, ``PREFIX-2`` …
        prefix: of numbered ids.
        template: the user's message; ``{prompt}`` is the prompt, ``{NAME}`` another text of the row, or
            a list of texts, one a line. Other braces stay as they are.
        system: a system message.
        chat: render with the tokenizer's chat template; otherwise the filled template is the raw prompt.
    """

    def __init__(
        self, *, field: str, id_field: str | None, prefix: str, template: str, system: str | None, chat: bool
    ) -> None:
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
        self.field, self.id_field, self.prefix = field, id_field, prefix
        self.template, self.system, self.chat = template, system, chat

    def tasks(self, rows: Iterable[Row]) -> list[Task]:
        """Tasks of the rows.

        Raises:
            InputError: a field is missing, a prompt is no text or empty, an id comes twice, or JSON can't hold a row.
        """
        tasks, places = [], []
        for row in rows:
            text = field(row, self.field, (str, list), "a text, or a list of turns")
            if isinstance(text, list):
                text = text[0] if text and isinstance(text[0], str) else ""
            if not text.strip():
                raise InputError(
                    row.place, expected=f"a prompt in {self.field!r}", received="an empty text", hint="remove it"
                )
            idx = f"{self.prefix}-{row.number}"
            if self.id_field is not None:
                idx = str(field(row, self.id_field, (str, int), "a string or an integer"))
            prompt = _filled(self.template, {**row.value, "prompt": text})
            messages = None
            if self.chat:
                system = [] if self.system is None else [{"role": "system", "content": self.system}]
                messages = [*system, {"role": "user", "content": prompt}]
            kept = {key: one for key, one in row.value.items() if key not in STALE}
            tasks.append(Task(idx, messages, None if self.chat else prompt, kept))
            check_json(row)
            places.append((row.place, idx))
        check_unique(places, f"id in {self.id_field!r}")
        return tasks


def _filled(template: str, values: Mapping[str, Any]) -> str:
    """A template with the row's texts in it; what they hold is not filled in turn."""

    def fill(place: re.Match[str]) -> str:
        value = values.get(place[1])
        if isinstance(value, list) and all(isinstance(line, str) for line in value):
            value = "\n".join(value)
        return value if isinstance(value, str) else place[0]

    return PLACE.sub(fill, template)


def read_prompt_rows(path: Path, argument: str) -> Iterable[Row]:
    """Rows of a prompts file by the end of its name; a text file gives rows with the one field ``prompt``."""
    suffixes = [suffix for suffix in path.suffixes if suffix != ".gz"]
    kind = suffixes[-1].lower() if suffixes else ""
    if kind == ".jsonl":
        return read_jsonl(path, argument)
    if kind == ".json":
        return read_json_array(path, argument)
    return (Row(f"{argument} line {number}", number, {"prompt": line}) for number, line in read_lines(path, argument))


class PromptsData(TaskData):
    """Tasks of a file of prompts: ``.txt`` (one a line), ``.jsonl``, ``.jsonl.gz``, or ``.json`` (one array).

    Args:
        path: the file.
        field: the field that holds the prompt; of a list of turns the first one is taken. Text files have the one
            field ``prompt``.
        id_field: the field that holds the id; None numbers the rows by line or item.
        template: the user's message; ``{prompt}`` is the prompt, ``{NAME}`` another text of the row, or
            a list of texts, one a line.
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
        self.path = Path(path)
        prefix = self.path.name.split(".")[0]
        self.format = PromptFormat(
            field=field, id_field=id_field, prefix=prefix, template=template, system=system, chat=chat
        )

    def read(self) -> list[Task]:
        """See `TaskData.read`."""
        return self.format.tasks(read_prompt_rows(self.path, "data.path"))
