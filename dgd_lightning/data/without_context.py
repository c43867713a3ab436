"""A task without its context, for context-aware decoding: what the tasks of a context have in common is left out.

A context is what its tasks share (`data.tasks.context_of`), so their texts show where it ends:

- The chat that is left is the task's last user message, answered through the same chat template. Earlier turns and
  the system message go with the context; only a system message that other tasks of the context do not have stays.
- A chat with earlier user messages (CL-bench's dialogues, whose first one holds the context) keeps its last one whole.
- An only user message (the lab's, or the first turn of CL-bench's dialogues) loses the beginning that it shares with
  the first user messages of the context's other tasks, in whole lines, or whole sentences where it is one line. Where
  theirs are the same word for word, or there is no other task, its last paragraph stays.
- What CL-bench Life marks as the task (``<|TASK|>``) is all that stays of a message with that mark.
- A raw prompt is treated as such a message.
"""

import re
from collections.abc import Sequence

from dgd_lightning.clbench import TASK
from dgd_lightning.errors import InputError
from dgd_lightning.types import Task

_SENTENCE_END = re.compile(r"[.!?]\s+")


def without_context(task: Task, others: Sequence[Task]) -> Task:
    """The task with nothing of its context; ``others``: the other tasks of its context that the run has."""
    first = own_part(_first_text(task), [_first_text(other) for other in others])
    if task.messages is None:
        left, bare = first, task._replace(prompt=first)
    else:
        asked = [message for message in task.messages if message["role"] == "user"]
        left = first if len(asked) == 1 else _marked(asked[-1]["content"]) if asked else ""
        shared = all(_systems(other) == _systems(task) for other in others)
        bare = task._replace(messages=[*([] if shared else _systems(task)), {"role": "user", "content": left}])
    if not left.strip():
        raise InputError(
            f"task {task.idx}",
            expected="a question of its own, for a readout without the context",
            received="nothing but the context",
            hint="leave the task out, or use another readout",
        )
    if bare == task:
        raise InputError(
            f"task {task.idx}",
            expected="a context, for a readout without it: messages, or paragraphs, before the question",
            received="a question alone",
            hint="use data with contexts, or another readout",
        )
    return bare


def own_part(text: str, others: Sequence[str]) -> str:
    """The end of a text that is not shared with other texts; empty where they all go on after it."""
    if TASK in text:
        return _marked(text)
    if all(other == text for other in others):
        return re.split(r"\n\s*\n", text.rstrip())[-1]
    first, last = min(text, *others), max(text, *others)  # what these two share, all do
    same = next((at for at, (one, two) in enumerate(zip(first, last, strict=False)) if one != two), len(first))
    shared = text[:same]
    if shared == text:
        return ""
    ends = [shared.rfind("\n") + 1] if "\n" in shared else [match.end() for match in _SENTENCE_END.finditer(shared)]
    return text[max(ends, default=0) :]


def _marked(text: str) -> str:
    """What follows the mark, if there is one."""
    return text.rpartition(TASK)[2].lstrip() if TASK in text else text


def _first_text(task: Task) -> str:
    if task.messages is None:
        return task.prompt or ""
    return next((message["content"] for message in task.messages if message["role"] == "user"), "")


def _systems(task: Task) -> list[dict[str, str]]:
    return [message for message in task.messages or () if message["role"] == "system"]
