"""A judge's reply, read strictly: what cannot be read is asked for again, never guessed."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from dgd_lightning.grader import ERROR_CLASSES

CLASS, REASON = "Error Class", "Reason"
RATIONALE, STATUS, SCORE = "Grading Rationale", "List of Requirement Satisfaction Status", "Overall Score"
# After case folding and stripping. Anything else ("partially", "n/a", "yes, mostly") is no status.
_STATUS = {
    **dict.fromkeys(("yes", "true", "✓", "✔", "✔️", "✅"), "yes"),
    **dict.fromkeys(("no", "false", "✗", "✘", "❌", "×"), "no"),
}
_SCORE = re.compile(r"([01])(?:\.0)?(?: points?)?", re.IGNORECASE)
_THOUGHTS = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)  # some servers leave a model's thoughts in the text


class Verdict(NamedTuple):
    """What a judge says of an answer."""

    score: int  # 1 if every rubric holds, else 0
    status: list[str]  # per rubric "yes" or "no"
    rationale: str


class ErrorVerdict(NamedTuple):
    """Why an answer failed, as a judge sees it."""

    error_class: str  # one of `grader.ERROR_CLASSES`
    rationale: str


class UnreadableReply(Exception):
    """A reply that is no verdict; the text says why."""


def read_verdict(text: str, rubrics: int) -> Verdict:
    """The verdict in a reply: one JSON object with CL-bench's three keys, bare, fenced or amid prose.

    Args:
        text: the reply.
        rubrics: how many statuses there must be.

    Raises:
        UnreadableReply: no such object or several that differ, an unknown status, a wrong number of them, or a score
            that contradicts them.
    """
    return _checked(_only_object(text, (SCORE, STATUS)), rubrics)


def read_error_class(text: str) -> ErrorVerdict:
    """The error class in a reply, read as strictly as a verdict.

    Args:
        text: the reply.

    Raises:
        UnreadableReply: no such object or several that differ, no reason, or a class that is none of the five.
    """
    found = _only_object(text, (CLASS,))
    name, reason = found[CLASS], found.get(REASON)
    if not isinstance(reason, str):
        raise UnreadableReply(f"no text under {REASON!r}")
    if not isinstance(name, str) or name.strip().casefold() not in ERROR_CLASSES:
        raise UnreadableReply(f"an error class of {str(name)[:40]!r}")
    return ErrorVerdict(name.strip().casefold(), reason)


def status_of(value: object) -> str | None:
    """ "yes" or "no" of a rubric's status as judges write it; None where it says neither."""
    text = str(value).lower() if isinstance(value, bool) else value
    return _STATUS.get(text.strip().casefold()) if isinstance(text, str) else None


def _only_object(text: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """The one JSON object in a reply with any of the keys."""
    found, rest = _objects(_THOUGHTS.sub("", text, count=1))
    # a verdict quoted inside a broken one must not pass for the judge's own
    if any(json.dumps(key) in rest for key in keys):
        raise UnreadableReply("broken JSON")
    verdicts = [one for one in found if any(key in one for key in keys)]
    if not verdicts:
        raise UnreadableReply("no JSON object with the keys asked for" if text.strip() else "an empty reply")
    if any(one != verdicts[0] for one in verdicts):
        raise UnreadableReply("several verdicts that differ")
    return verdicts[0]


def _checked(found: dict[str, Any], rubrics: int) -> Verdict:
    for key in (RATIONALE, STATUS, SCORE):
        if key not in found:
            raise UnreadableReply(f"no {key!r}")
    if not isinstance(found[RATIONALE], str):
        raise UnreadableReply(f"{RATIONALE!r} is no text")
    if not isinstance(found[STATUS], list):
        raise UnreadableReply(f"{STATUS!r} is no list")
    status = [_status(value) for value in found[STATUS]]
    if len(status) != rubrics:
        raise UnreadableReply(f"{len(status)} statuses for {rubrics} rubrics")
    score = _score(found[SCORE])
    if score != int(all(one == "yes" for one in status)):
        raise UnreadableReply(f"a score of {score} with {status.count('yes')} of {rubrics} statuses yes")
    return Verdict(score, status, found[RATIONALE])


def _status(value: object) -> str:
    if (status := status_of(value)) is None:
        raise UnreadableReply(f"a status of {str(value)[:40]!r}")
    return status


def _score(value: object) -> int:
    fine = isinstance(value, int | float | str) and not isinstance(value, bool)
    match = _SCORE.fullmatch(str(value).strip()) if fine else None
    if match is None:
        raise UnreadableReply(f"an overall score of {str(value)[:40]!r}")
    return int(match[1])


def _objects(text: str) -> tuple[list[dict[str, Any]], str]:
    """JSON objects in a text that stand in no other one, in order, and the text around them."""
    decoder = json.JSONDecoder(object_pairs_hook=_without_doubles)
    found, rest, done = [], "", 0
    at = text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            end = at + 1  # not one: perhaps a brace of the prose before it
        else:
            found.append(value)
            rest, done = rest + text[done:at], end
        at = text.find("{", end)
    return found, rest + text[done:]


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise UnreadableReply("a JSON object with a key twice")
    return dict(pairs)
