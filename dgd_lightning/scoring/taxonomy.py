"""Why a failed task failed: one of five classes; of lab answers read by a program, of others named by a judge."""

from __future__ import annotations

import re
from typing import Any

from dgd_lightning.lab.checks import holds, reverted_to_prior

IGNORED, MISUSED, FORMAT = "context_ignored", "context_misused", "format_error"
INCOMPLETE, OTHER = "incomplete_or_refused", "other"
CLASSES = (IGNORED, MISUSED, FORMAT, INCOMPLETE, OTHER)
VERSION = 1  # of the rules below: other rules, another number, and lab answers are graded anew
_FORM = ("sentence", "equals")  # checks of how something is said


def lab_error(row: dict[str, Any], text: str) -> str:
    """The class of a failed answer to a lab row; the first of these rules that fits.

    1. context_ignored: the context contradicts the prior, and the answer gives the prior.
    2. incomplete_or_refused: no text, cut off at the limit (``dgd.stop_reason``), or no full stop at the end where a
       sentence is asked.
    3. format_error: what was asked for is there; only the checks of its form fail.
    4. context_misused: a value that was asked for is there, but not all of them, not in order, or beside a wrong one;
       or a word that is neither the question's nor the right answer's stands in the context.
    5. other.

    Args:
        row: with ``metadata.lab``, as the lab writes it.
        text: an answer that `checks.grade` does not count as solved.
    """
    lab = row["metadata"]["lab"]
    checks = lab["checks"]
    failed = [check for check in checks if not holds(check, text)]
    if lab.get("prior") == "contradict" and reverted_to_prior(row, text):
        return IGNORED
    if _cut_off(row, checks, text):
        return INCOMPLETE
    said = any(check["type"] not in _FORM for check in checks)  # what it says is checked too, so it holds if form fails
    if all(check["type"] in _FORM and (said or check.get("value", "") in text) for check in failed):
        return FORMAT
    return MISUSED if _uses_context(row, checks, text) else OTHER


def _cut_off(row: dict[str, Any], checks: list[dict[str, Any]], text: str) -> bool:
    sentence = any(check["type"] == "sentence" for check in checks)
    stopped = row.get("dgd", {}).get("stop_reason") == "length"
    return stopped or not text.strip() or (sentence and not text.rstrip().endswith("."))


def _uses_context(row: dict[str, Any], checks: list[dict[str, Any]], text: str) -> bool:
    asked = [check["value"] for check in checks if check["type"] == "contains"]
    asked += [value for check in checks if check["type"] == "contains_all" for value in check["value"]]
    if any(holds({"type": "contains", "value": value}, text) for value in asked):
        return True
    messages = row.get("messages") or [{"content": ""}]
    context, _, question = str(messages[-1].get("content", "")).rpartition("\n\n")
    right = row["metadata"]["lab"].get("answer", "")
    return bool((_words(text) - _words(question) - _words(right)) & _words(context))


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))
