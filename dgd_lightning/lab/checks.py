"""Program checks of the lab's rubrics: all rubrics must hold for an answer to be solved, as in CL-bench."""

from __future__ import annotations

import re
from typing import Any

from dgd_lightning.types import Score


def _found(text: str, value: str) -> int:
    """Where ``value`` is in ``text`` as whole words, or −1."""
    match = re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text)
    return match.start() if match else -1


def _ordered(text: str, items: list[str]) -> bool:
    start = 0
    for item in items:
        at = _found(text[start:], item)
        if at < 0:
            return False
        start += at + len(item)
    return True


def holds(check: dict[str, Any], text: str) -> bool:
    """Whether one check (``type`` and ``value`` as `world` writes them) holds for an answer."""
    text = text.strip()
    value: Any = check.get("value")
    match check["type"]:
        case "contains":
            return _found(text, value) >= 0
        case "absent":
            return _found(text, value) < 0
        case "contains_all":
            return all(_found(text, item) >= 0 for item in value)
        case "ordered":
            return _ordered(text, value)
        case "equals":
            return text == value
        case "sentence":
            return text.endswith(".") and text.count(".") == 1
    raise ValueError(f"check type: expected one that the lab writes, received {check['type']!r}")


def has_checks(row: dict[str, Any]) -> bool:
    """Whether a row carries the lab's program checks; other rows may have anything in their metadata."""
    metadata = row.get("metadata")
    return isinstance(metadata, dict) and isinstance(metadata.get("lab"), dict) and "checks" in metadata["lab"]


def grade(row: dict[str, Any], text: str) -> Score:
    """Grade an answer to a lab row: value 1.0 only if every rubric holds.

    Args:
        row: a row with ``metadata.lab.checks``, one per rubric.
        text: the model's answer.
    """
    status = ["yes" if holds(check, text) else "no" for check in row["metadata"]["lab"]["checks"]]
    failed = [rubric for rubric, verdict in zip(row["rubrics"], status, strict=True) if verdict == "no"]
    return Score(float(not failed), status, "; ".join(failed) or "every rubric holds")


def reverted_to_prior(row: dict[str, Any], text: str) -> bool:
    """Whether the answer gives the prior that the context contradicts, and not the context's value."""
    lab = row["metadata"]["lab"]
    if lab["prior_answer"] is None:
        return False
    return _found(text, lab["prior_answer"]) >= 0 and _found(text, lab["checks"][0]["value"]) < 0
