"""Prompts that the target writes itself, as training data of a draft (Magpie, Xu et al. 2024, arXiv 2406.08464).

An instruct model that reads its chat template up to the user's words goes on with what such a user would ask. `dgd
predict` over `OwnPrompts` writes prompts so; `WrittenPrompts` are those of them that are worth an answer.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from dgd_lightning.checks import check_integer, check_number
from dgd_lightning.data.rows import field
from dgd_lightning.data.tasks import TaskData
from dgd_lightning.errors import InputError
from dgd_lightning.pair import load_tokenizer, user_turn
from dgd_lightning.row_files import Row, read_rows
from dgd_lightning.target.folder import bundled, resolve_commit
from dgd_lightning.types import Task

FIRST_WORDS = (  # without them a model writes of what it was tuned on most
    "Write a Python function that",
    "Explain why",
    "How do I",
    "Summarize the following text:",
    "Solve this problem step by step:",
    "Translate",
    "Give me a list of",
    "What is the difference between",
    "Write a short",
    "Rewrite this sentence",
)
LOOP = re.compile(r"(\b\w.{2,80}?)(?:\W{0,3}\1){3}", re.S)  # four times in a row
FEWEST_WORDS = 3
HELD_OUT = 0.05  # of the prompts
LONGEST = 8000  # characters that are searched for loops


class OwnPrompts(TaskData):
    """User turns without words, or with the first ones, for the target to fill.

    Args:
        target: Hub id or folder whose chat template opens the turns, or ``lab``; the same as ``model.target``.
        count: turns.
        first_words: beginnings, given in turn to a share of the turns.
        started: this share, 0 … 1.
        revision: of ``target`` on the Hub: branch, tag or commit.
        **options: see `TaskData`.
    """

    def __init__(
        self,
        target: str,
        count: int = 1000,
        first_words: Sequence[str] = FIRST_WORDS,
        started: float = 0.5,
        revision: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.target, self.revision = target, revision
        self.count = check_integer("data.count", count)
        self.started = check_number("data.started", started, least=0, most=1)
        self.first_words = list(first_words)
        if started and not self.first_words:
            expected = "at least one text, or data.started 0"
            raise InputError("data.first_words", expected=expected, received="none", hint="set data.started to 0")

    @cached_property
    def commit(self) -> str | None:
        """The commit of ``revision``, looked up once, since a branch may move; None for a folder."""
        return resolve_commit("data.target", bundled(self.target, "target"), self.revision, "data.revision")

    def read(self) -> list[Task]:
        """See `TaskData.read`."""
        turn = user_turn(load_tokenizer(bundled(self.target, "target"), revision=self.commit))
        if turn is None:
            raise InputError(
                "data.target",
                expected="a tokenizer whose chat template writes a user's words as they are",
                received="none, or another template",
                hint="use an instruct model, or prompts of your own with PromptsData",
            )
        tasks = []
        for number in range(self.count):
            before, after = (int(self.started * one) for one in (number, number + 1))  # turns that are started
            words = self.first_words[before % len(self.first_words)] if after > before else ""
            tasks.append(Task(f"prompt-{number}", None, turn[0] + words, {"first_words": words}))
        return tasks


class WrittenPrompts(TaskData):
    """The prompts of a run over `OwnPrompts` that are worth an answer.

    Left out, and counted in one line: what the target did not end itself, what has fewer than three words, what came
    before (but for case and punctuation), and loops: a few words four times in a row.

    Args:
        path: the run's predictions.
        held_out: take those that are held out for evaluation, one in twenty by their words, instead of all others.
        **options: see `TaskData`.
    """

    def __init__(self, path: str, held_out: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.path, self.held_out = Path(path), held_out

    def read(self) -> list[Task]:
        """See `TaskData.read`."""
        tasks: list[Task] = []
        seen: set[str] = set()
        found: Counter[str] = Counter()
        for row in read_rows(self.path):
            text = _words(row)
            words = " ".join(re.findall(r"\w+", text.casefold()))
            fault = _fault(row, text, words, seen)
            seen.add(words)
            apart = int.from_bytes(hashlib.sha256(words.encode()).digest()[:8]) < HELD_OUT * 2**64
            found[fault or ("held out" if apart else "kept")] += 1
            if not fault and apart == self.held_out:
                chat = [{"role": "user", "content": text}]
                tasks.append(Task(str(row.value.get("idx", row.number)), chat, None, {"messages": chat}))
        said = ", ".join(f"{number:,} {what}" for what, number in found.most_common())
        rank_zero_only(print)(f"prompts of {self.path}: {said}")
        if not tasks:
            raise InputError(
                "data.path",
                expected=f"prompts that are {'held out' if self.held_out else 'worth an answer'}",
                received=said or "no rows",
                hint="write more prompts, or raise model.max_new_tokens of the run that writes them",
            )
        return tasks


def _words(row: Row) -> str:
    """The prompt that was written."""
    begun = row.value.get("first_words")
    return (begun if isinstance(begun, str) else "") + field(row, "model_output", str, "a text")


def _fault(row: Row, text: str, words: str, seen: set[str]) -> str | None:
    """Why a prompt is worth no answer, in words for the count."""
    if field(row, "dgd", dict, "an object, as `dgd predict` writes it").get("stop_reason") != "stop":
        return "not ended"
    if words.count(" ") + 1 < FEWEST_WORDS:
        return "shorter than three words"
    if words in seen:
        return "written before"
    return "in a loop" if LOOP.search(text[:LONGEST]) else None
