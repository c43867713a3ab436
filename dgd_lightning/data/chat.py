"""From a task to token ids: its prompt, by the tokenizer's own chat template or raw, and its gold answer."""

from typing import Any

import torch
from torch import Tensor

from dgd_lightning.errors import InputError
from dgd_lightning.types import Task

# Looked for in this order: the lab's rows, MATH-500 (whose ``answer`` is the bare result), HumanEval, GSM8K.
GOLD_FIELDS = ("metadata.lab.answer", "solution", "canonical_solution", "answer")


def prompt_text(tokenizer: Any, task: Task, *, enable_thinking: bool) -> str:
    """The text that the model reads for a task; the template gets ``enable_thinking`` (Qwen3's know it)."""
    if tokenizer is None:
        raise InputError(
            "target",
            expected="a folder or Hub id with a tokenizer",
            received=f"none, for task {task.idx!r}",
            hint="add the tokenizer's files to the target's folder",
        )
    if task.messages is None:
        assert task.prompt is not None
        return require_unicode(task, task.prompt)
    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError(
            "target",
            expected="a tokenizer with a chat template",
            received=f"none, for the chat of {task.idx!r}",
            hint="use an instruct model, or raw prompts (data.chat: false)",
        )
    try:
        text = tokenizer.apply_chat_template(
            task.messages, tokenize=False, add_generation_prompt=True, enable_thinking=enable_thinking
        )
    except Exception as error:  # templates raise what they like: jinja's errors, TypeError, KeyError
        raise InputError(
            f"task {task.idx}",
            expected="messages that the tokenizer's chat template accepts",
            received=f"{type(error).__name__}: {error}",
            hint="change the messages or the target",
        ) from error
    return require_unicode(task, text)


def require_unicode(task: Task, text: str) -> str:
    """The text; raises InputError for half characters, which JSON can escape and no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"task {task.idx}",
            expected="Unicode text",
            received=f"a lone surrogate at character {error.start}",
            hint="remove it from the data",
        ) from error
    return text


def prompt_ids(tokenizer: Any, task: Task, *, enable_thinking: bool) -> Tensor:
    """Token ids [S] of a task's prompt; a chat template writes special tokens itself, a raw prompt gets them here.

    A raw prompt that begins with the token of beginning, as one that was rendered elsewhere does, gets no second one.
    """
    text = prompt_text(tokenizer, task, enable_thinking=enable_thinking)
    ids = tokenizer(text, add_special_tokens=task.messages is None, verbose=False)["input_ids"]
    begin = getattr(tokenizer, "bos_token_id", None)
    if task.messages is None and begin is not None and ids[:2] == [begin, begin]:
        ids = ids[1:]
    if not ids:
        raise InputError(
            f"task {task.idx}", expected="a prompt of at least one token", received="none", hint="remove it"
        )
    return torch.tensor(ids, dtype=torch.long)


def gold_answer(task: Task, field: str | None = None) -> str:
    """The text of a task's gold answer, in a field of its row (dotted path); None looks for one of ``GOLD_FIELDS``."""
    names = GOLD_FIELDS if field is None else (field,)
    found = next((value for name in names if (value := _value(task.row, name)) is not None), None)
    if not isinstance(found, str) or not found.strip():
        keys = ", ".join(map(str, task.row)) or "none"
        rubrics = " (CL-bench's rows have rubrics, and no gold answer)" if "rubrics" in task.row else ""
        raise InputError(
            f"task {task.idx}",
            expected=f"a gold answer, a text in the field {' or '.join(map(repr, names))}",
            received=f"{'none' if found is None else repr(found)[:60]}, in a row with fields {keys}{rubrics}",
            hint="name the field that holds it in model.answer_field, or take data that has one",
        )
    return require_unicode(task, found)


def gold_ids(tokenizer: Any, task: Task, field: str | None = None) -> Tensor:
    """Token ids [T] of the gold answer as it is: nothing is added, not even a stop token."""
    ids = tokenizer(gold_answer(task, field), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def _value(row: dict[str, Any], path: str) -> Any:
    value: Any = row
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value
