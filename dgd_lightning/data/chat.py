"""From a task to prompt ids: the tokenizer's own chat template, or the raw text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dgd_lightning.errors import InputError
from dgd_lightning.types import Task


def prompt_text(tokenizer: Any, task: Task, *, enable_thinking: bool) -> str:
    """The text that the model reads for a task.

    Args:
        tokenizer: a transformers tokenizer, or None where the target's folder has none.
        task: messages or a raw prompt.
        enable_thinking: passed to the template (Qwen3's know it; others ignore it).

    Raises:
        InputError: no tokenizer; messages and no chat template; or a template that refuses the messages.
    """
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
    """Token ids [S] of a task's prompt; a chat template writes its special tokens itself, a raw prompt gets them here.

    Raises:
        InputError: see `prompt_text`; or the prompt has no tokens.
    """
    text = prompt_text(tokenizer, task, enable_thinking=enable_thinking)
    ids = tokenizer(text, add_special_tokens=task.messages is None, verbose=False)["input_ids"]
    if not ids:
        raise InputError(
            f"task {task.idx}", expected="a prompt of at least one token", received="none", hint="remove it"
        )
    return torch.tensor(ids, dtype=torch.long)
