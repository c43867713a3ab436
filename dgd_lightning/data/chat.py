"""From a task to token ids: its prompt, by the tokenizer's own chat template or raw, and its gold answer."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dgd_lightning.checks import check_unicode
from dgd_lightning.data.messages import Message
from dgd_lightning.errors import InputError
from dgd_lightning.row_files import shown
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
        return check_unicode(f"task {task.idx}", task.prompt)
    template, tools = getattr(tokenizer, "chat_template", None), _tools(task)
    _require_template(template, task, tools)

    def render(messages: list[Message], tools: list[Any] | None) -> str:
        options = {"tools": tools} if tools else {}
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=enable_thinking, **options
        )

    try:
        text = render(task.messages, tools)
    except Exception as error:  # templates raise what they like: jinja's errors, TypeError, KeyError
        raise InputError(
            f"task {task.idx}",
            expected="messages that the tokenizer's chat template accepts",
            received=f"{type(error).__name__}: {error}",
            hint="change the messages or the target",
        ) from error
    for part, messages, left in _changed(task.messages, tools):
        try:
            unread = render(messages, left) == text
        except Exception:  # what a template can't do without, it reads
            unread = False
        by_design = part == "reasoning_content" and part in str(template)  # that of earlier turns
        if unread and not by_design:
            raise InputError(
                f"task {task.idx}",
                expected="a chat of which the tokenizer's chat template reads everything",
                received=f"{part}, which it leaves out",
                hint="take it out of the rows, write it into a message's content, or use another target",
            )
    return check_unicode(f"task {task.idx}", text)


def _require_template(template: Any, task: Task, tools: list[Any] | None) -> None:
    """Raises InputError where a tokenizer's chat template is none, or several by name and none that would be taken."""
    received, hint = "none", "use an instruct model, or read raw prompts with PromptsData and data.chat: false"
    if isinstance(template, dict):
        if {"default", "tool_use" if tools else "default"} & template.keys():
            return
        received = f"several ({', '.join(sorted(template))}), and none is the default"
        hint = "save the one that you want as chat_template.jinja in the target's folder"
    elif template:
        return
    received = f"{received}, for the chat of {task.idx!r}"
    raise InputError("target", expected="a tokenizer with a chat template", received=received, hint=hint)


def _tools(task: Task) -> list[Any] | None:
    """The row's ``tools``, functions that may be called, for the chat template; a text is one field among others."""
    tools = task.row.get("tools") or None
    if tools is None or (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        return tools
    if task.row.keys().isdisjoint(("messages", "conversations")):
        return None
    hint = "write each as an object (JSON, or Parquet), or remove the field"
    raise InputError(f"task {task.idx}", expected="'tools' to be a list of objects", received=shown(tools), hint=hint)


def _changed(messages: list[Message], tools: list[Any] | None) -> Iterator[tuple[str, list[Message], list[Any] | None]]:
    """Parts of a chat that a template may leave out, each with the chat and the tools that differ in it alone."""
    for role in sorted({one["role"] for one in messages} - {"user", "assistant"}):
        longer = [{**one, "content": f"{one['content']}…"} if one["role"] == role else one for one in messages]
        yield f"messages of the role {role!r}", longer, tools
    for key in sorted({key for one in messages for key in one} - {"role", "content", "tool_call_id"}):
        yield key, [{name: value for name, value in one.items() if name != key} for one in messages], tools
    if tools:
        yield "tools", messages, None


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
    if isinstance(found, int | float) and not isinstance(found, bool):
        found = str(found)
    if not isinstance(found, str) or not found.strip():
        keys = ", ".join(map(str, task.row)) or "none"
        rubrics = " (CL-bench's rows have rubrics, and no gold answer)" if "rubrics" in task.row else ""
        raise InputError(
            f"task {task.idx}",
            expected=f"a gold answer, a text or a number in the field {' or '.join(map(repr, names))}",
            received=f"{'none' if found is None else repr(found)[:60]}, in a row with fields {keys}{rubrics}",
            hint="name the field that holds it in model.answer_field, or take data that has one",
        )
    return check_unicode(f"task {task.idx}", found)


def gold_ids(tokenizer: Any, task: Task, field: str | None = None) -> Tensor:
    """Token ids [T] of the gold answer as it is: nothing is added, not even a stop token."""
    ids = tokenizer(gold_answer(task, field), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def _value(row: dict[str, Any], path: str) -> Any:
    value: Any = row
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value
