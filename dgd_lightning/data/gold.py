"""The gold answer of a task: where data sets keep it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dgd_lightning.data.chat import require_unicode
from dgd_lightning.errors import InputError
from dgd_lightning.types import Task

# Looked for in this order: the lab's rows, MATH-500 (whose ``answer`` is the bare result), HumanEval, GSM8K.
GOLD_FIELDS = ("metadata.lab.answer", "solution", "canonical_solution", "answer")


def gold_answer(task: Task, field: str | None = None) -> str:
    """The text of a task's gold answer.

    Args:
        task: with its row.
        field: dotted path of the field in the row; None looks for one of ``GOLD_FIELDS``.

    Raises:
        InputError: there is none (CL-bench's rows have rubrics, and no answer), or it is no text.
    """
    names = GOLD_FIELDS if field is None else (field,)
    found = next((value for value in (_value(task.row, name) for name in names) if value is not None), None)
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
    """Token ids [T] of the gold answer as it is: nothing is added, not even a stop token.

    Raises:
        InputError: see :func:`gold_answer`.
    """
    ids = tokenizer(gold_answer(task, field), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def _value(row: dict[str, Any], path: str) -> Any:
    value: Any = row
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value
