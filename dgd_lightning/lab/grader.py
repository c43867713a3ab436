"""`LabGrader`: the lab's rubrics, checked by a program, and why a lab answer failed, read by rules."""

from __future__ import annotations

import re
from typing import Any

from dgd_lightning.grader import CHECK, FORMAT, IGNORED, INCOMPLETE, MISUSED, OTHER, Grader
from dgd_lightning.lab.checks import grade, has_checks, holds, reverted_to_prior
from dgd_lightning.types import Score

VERSION = 1  # of the rules below: other rules, another number, and lab answers are graded anew
_FORM = ("sentence", "equals")  # checks of how something is said
_FOREIGN = (ValueError, LookupError, TypeError, AttributeError)  # what checks raise that nobody here wrote


class LabGrader(Grader):
    """Rows of the lab's worlds: solved where every rubric's check holds."""

    name, cost = "lab", CHECK

    def takes(self, row: dict[str, Any]) -> bool:
        return has_checks(row)

    def grade(self, row: dict[str, Any], answer: str) -> Score:
        """See `Grader.grade`; ``status`` has an entry per rubric, ``details`` the error class of a failed answer."""
        try:
            score = grade(row, answer)
            return score if score.value == 1.0 else score._replace(details={"error_class": lab_error(row, answer)})
        except _FOREIGN as error:
            return Score(None, [], f"lab_error: {type(error).__name__}: {error}")

    def remarks(self, row: dict[str, Any], answer: str, score: Score) -> dict[str, Any]:
        try:
            failed = score.value is not None and score.value < 1.0
            found: dict[str, Any] = {"error_class": lab_error(row, answer)} if failed else {}
            if row["metadata"]["lab"].get("prior") == "contradict":
                found["reverted_to_prior"] = reverted_to_prior(row, answer)
            return found
        except _FOREIGN:
            return {}

    def fingerprint(self) -> dict[str, Any]:
        return {"grader": self.name, "taxonomy": VERSION}


def lab_error(row: dict[str, Any], text: str) -> str:
    """The class of a failed answer to a lab row; the first of these rules that fits.

    1. context_ignored: the context contradicts the prior, and the answer gives the prior.
    2. incomplete_or_refused: no text, cut off at the limit (``dgd.stop_reason``), or no full stop at the end where a
       sentence is asked.
    3. format_error: what was asked for is there; only the checks of its form fail.
    4. context_misused: a value that was asked for is there, but not all of them, not in order, or beside a wrong one;
       or a word of it, neither the question's nor the right answer's, is in the context.
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
