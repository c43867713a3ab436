"""Rows of CL-bench and CL-bench Life: how they are recognised, and Life's fields in CL-bench's form."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TASK = "<|TASK|>"  # in CL-bench Life between the context and the task (its dataset card)
COLUMNS = {"rubrics", "context_category", "sub_category"}  # any of them beside the id of a context or a task
LIFE = "context_subcategory"  # of CL-bench Life alone; it has no ``context_id``


def is_clbench_row(row: dict[str, Any], source: str | Path = "") -> bool:
    """Whether a row may be CL-bench's or CL-bench Life's and does not come from the lab, however much of it is left.

    It may be if it has a context's or a task's id, and rubrics or a category (metadata may be flattened, or JSON in a
    text), if it has Life's own field or mark, or if its source, a file or `datasets` id, is named after CL-bench.
    """
    metadata = row.get("metadata")
    inner = re.findall(r"\w+", metadata) if isinstance(metadata, str) else metadata
    names = {
        re.sub(r"^metadata_", "", str(key).rpartition(".")[2])
        for key in (*row, *(inner if isinstance(inner, list | dict) else ()))
    }
    if "lab" in names:
        return False
    named = "clbench" in re.sub(r"[^a-z]", "", Path(source).name.lower())
    told = not names.isdisjoint(("context_id", "task_id")) and not names.isdisjoint(COLUMNS)
    return named or told or LIFE in names or any(TASK in text for text in _texts(row))


def _texts(value: Any) -> Iterator[str]:
    """All texts in a row, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _texts(one)


def with_context(row: dict[str, Any]) -> dict[str, Any]:
    """A row of CL-bench Life with ``metadata.context_id`` and ``sub_category``; any other row as it is.

    Tasks of one context depend on each other. Life does not say which those are, so the id is a hash of the context's
    text: what stands before ``<|TASK|>``, or, in dialogues without that mark, before the last message.
    """
    metadata, messages = row.get("metadata"), row.get("messages")
    if not isinstance(metadata, dict) or LIFE not in metadata or metadata.get("context_id") is not None:
        return row
    texts = [str(each.get("content")) for each in messages or () if isinstance(each, dict)]
    before, mark, _ = "\n".join(texts).partition(TASK)
    context = before if mark or len(texts) < 2 else "\n".join(texts[:-1])
    name = f"life-{hashlib.sha256(context.strip().encode('utf-8', 'replace')).hexdigest()[:12]}"
    return {**row, "metadata": {**metadata, "context_id": name, "sub_category": metadata[LIFE]}}
