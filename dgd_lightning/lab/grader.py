"""`LabGrader`: the lab's rubrics, checked by a program, and why a lab answer failed, read by rules."""

import re
from typing import Any

from dgd_lightning.grader import CHECK, FORMAT, IGNORED, INCOMPLETE, MISUSED, OTHER, Grader
from dgd_lightning.types import Score

VERSION = 2  # of the rules below: other rules, another number, and lab answers are graded anew
_FORM = ("sentence", "equals")  # checks of how something is said
_FOREIGN = (ValueError, LookupError, TypeError, AttributeError)  # what checks raise that nobody here wrote


class LabGrader(Grader):
    """Rows of the lab's worlds: solved where every rubric's check holds."""

    name, cost = "lab", CHECK

    def takes(self, row: dict[str, Any]) -> bool:
        metadata = row.get("metadata")  # of other rows, anything
        return isinstance(metadata, dict) and isinstance(metadata.get("lab"), dict) and "checks" in metadata["lab"]

    def grade(self, row: dict[str, Any], answer: str) -> Score:
        """See `Grader.grade`; ``status`` has an entry per rubric.

        ``details``: the error class of a failed answer, and whether it gives a prior that the context contradicts.
        """
        try:
            score = grade(row, answer)
            details: dict[str, Any] = {} if score.value == 1.0 else {"error_class": lab_error(row, answer)}
            if row["metadata"]["lab"].get("prior") == "contradict":
                details["reverted_to_prior"] = reverted_to_prior(row, answer)
            return score._replace(details=details or None)
        except _FOREIGN as error:
            return Score(None, [], f"lab_error: {type(error).__name__}: {error}")

    def fingerprint(self) -> dict[str, Any]:
        return {"grader": self.name, "taxonomy": VERSION}


def grade(row: dict[str, Any], text: str) -> Score:
    """The score of an answer to a lab row: 1.0 only if all rubrics (``metadata.lab.checks``) hold, as in CL-bench."""
    status = ["yes" if holds(check, text) else "no" for check in row["metadata"]["lab"]["checks"]]
    failed = [rubric for rubric, verdict in zip(row["rubrics"], status, strict=True) if verdict == "no"]
    return Score(float(not failed), status, "; ".join(failed) or "every rubric holds")


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


def _found(text: str, value: str) -> int:
    """Where ``value`` is in ``text`` as whole words, or −1."""
    match = re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text)
    return match.start() if match else -1


def _ordered(text: str, items: list[str]) -> bool:
    for item in items:
        if (at := _found(text, item)) < 0:
            return False
        text = text[at + len(item) :]
    return True


def reverted_to_prior(row: dict[str, Any], text: str) -> bool:
    """Whether the answer gives the prior that the context contradicts, and not the context's value."""
    prior, checks = row["metadata"]["lab"]["prior_answer"], row["metadata"]["lab"]["checks"]
    return prior is not None and _found(text, prior) >= 0 and _found(text, checks[0]["value"]) < 0


def lab_error(row: dict[str, Any], text: str) -> str:
    """The class of an answer to a lab row that is not solved; the first of these rules that fits.

    1. context_ignored: the context contradicts the prior, and the answer gives the prior.
    2. incomplete_or_refused: no text, cut off at the limit (``dgd.stop_reason``), or no full stop at the end where a
       sentence is asked.
    3. format_error: what was asked for is there; only the checks of its form fail.
    4. context_misused: a value that was asked for is there, but not all of them, not in order, or beside a wrong one;
       or a word of it, neither the question's nor the right answer's, is in the context.
    5. other.
    """
    lab = row["metadata"]["lab"]
    checks = lab["checks"]
    kinds = [check["type"] for check in checks]
    failed = [check for check in checks if not holds(check, text)]
    if lab.get("prior") == "contradict" and reverted_to_prior(row, text):
        return IGNORED
    stopped = row.get("dgd", {}).get("stop_reason") == "length"
    if stopped or not text.strip() or ("sentence" in kinds and not text.rstrip().endswith(".")):
        return INCOMPLETE
    said = any(kind not in _FORM for kind in kinds)  # what it says is checked too, so it holds if form fails
    if all(check["type"] in _FORM and (said or check.get("value", "") in text) for check in failed):
        return FORMAT
    return MISUSED if _uses_context(row, checks, text) else OTHER


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
