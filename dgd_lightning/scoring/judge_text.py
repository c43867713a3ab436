"""What a judge is asked and what it replies, as text: prompts with places to fill, replies that are read strictly.

What can't be read in a reply is asked for again, never guessed.
"""

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from dgd_lightning.errors import InputError
from dgd_lightning.grader import ERROR_CLASSES

_PLACE = re.compile(r"\{(\w+)\}")  # JSON's braces around anything but one bare word stay as they are
PLACES = ("rubrics_text", "model_output")  # the names of CL-bench's own script
CLASS, REASON = "Error Class", "Reason"
RATIONALE, STATUS, SCORE = "Grading Rationale", "List of Requirement Satisfaction Status", "Overall Score"
# After case folding and stripping. Anything else ("partially", "n/a", "yes, mostly") is no status.
_STATUS = {
    **dict.fromkeys(("yes", "true", "✓", "✔", "✔️", "✅"), "yes"),
    **dict.fromkeys(("no", "false", "✗", "✘", "❌", "×"), "no"),
}
_SCORE = re.compile(r"([01])(?:\.0)?(?: points?)?", re.IGNORECASE)
_THOUGHTS = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)  # some servers leave a model's thoughts in the text


def read_template(path: str | None) -> str:
    """The prompt file's text, or the package's; InputError where its places are not exactly `PLACES`."""
    if path is None:
        return packaged("rubric_judge.txt")
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        received = f"{path} ({type(error).__name__})"
        wanted = "a readable UTF-8 file"
        raise InputError("judge.prompt", expected=wanted, received=received, hint="check the path") from error
    found = set(_PLACE.findall(text))
    if found != set(PLACES):
        unknown = ", ".join(f"{{{name}}}" for name in sorted(found - set(PLACES)))
        missing = ", ".join(f"{{{name}}}" for name in PLACES if name not in found)
        raise InputError(
            "judge.prompt",
            expected="a text with the places {rubrics_text} and {model_output}, and no other word alone in braces",
            received=f"{path} with {unknown}" if unknown else f"{path} without {missing}",
            hint="rename or add them",
        )
    return text


def packaged(name: str) -> str:
    """A prompt of the package."""
    return files("dgd_lightning").joinpath("scoring", "prompts", name).read_text(encoding="utf-8")


def fill(template: str, rubrics: list[str], answer: str, **others: str) -> str:
    """The prompt for one answer, its rubrics numbered from 1; braces inside rubrics and answers mean nothing."""
    numbered = "\n".join(f"{number}. {rubric}" for number, rubric in enumerate(rubrics, 1))
    values = {**dict(zip(PLACES, (numbered, answer), strict=True)), **others}
    text = _PLACE.sub(lambda place: values[place[1]], template)
    # JSON can escape half a surrogate pair, no request can carry one
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def rubric_texts(rubrics: Any) -> list[str]:
    """The rubrics of a row: texts, or objects with ``rubric_criteria``; blank ones are left out, as CL-bench does.

    What is no list of rubrics gives none.
    """
    if not isinstance(rubrics, list):
        return []
    found = [rubric.get("rubric_criteria") if isinstance(rubric, dict) else rubric for rubric in rubrics]
    texts = [text.strip() for text in found if isinstance(text, str)]
    return [text for text in texts if text] if len(texts) == len(found) else []


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

    Raises:
        UnreadableReply: no such object or several that differ, an unknown status, a wrong number of them, or a score
            that contradicts them.
    """
    found = _only_object(text, (SCORE, STATUS))
    for key in (RATIONALE, STATUS, SCORE):
        if key not in found:
            raise UnreadableReply(f"no {key!r}")
    rationale, values = found[RATIONALE], found[STATUS]
    if not isinstance(rationale, str):
        raise UnreadableReply(f"{RATIONALE!r} is no text")
    if not isinstance(values, list):
        raise UnreadableReply(f"{STATUS!r} is no list")
    status = [one for value in values if (one := status_of(value)) is not None]
    if len(status) < len(values):
        unknown = next(value for value in values if status_of(value) is None)
        raise UnreadableReply(f"a status of {str(unknown)[:40]!r}")
    if len(status) != rubrics:
        raise UnreadableReply(f"{len(status)} statuses for {rubrics} rubrics")
    match = _SCORE.fullmatch(str(found[SCORE]).strip())
    if match is None:
        raise UnreadableReply(f"an overall score of {str(found[SCORE])[:40]!r}")
    if (score := int(match[1])) != int("no" not in status):
        raise UnreadableReply(f"a score of {score} with {status.count('yes')} of {rubrics} statuses yes")
    return Verdict(score, status, rationale)


def read_error_class(text: str) -> ErrorVerdict:
    """The error class in a reply, read as strictly as a verdict."""
    found = _only_object(text, (CLASS,))
    name, reason = str(found[CLASS]), found.get(REASON)
    if not isinstance(reason, str):
        raise UnreadableReply(f"no text under {REASON!r}")
    if name.strip().casefold() not in ERROR_CLASSES:
        raise UnreadableReply(f"an error class of {name[:40]!r}")
    return ErrorVerdict(name.strip().casefold(), reason)


def status_of(value: object) -> str | None:
    """ "yes" or "no" of a rubric's status as judges write it; None where it says neither."""
    text = str(value).lower() if isinstance(value, bool) else value
    return _STATUS.get(text.strip().casefold()) if isinstance(text, str) else None


def _only_object(reply: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """The one JSON object in a reply with any of the keys, among its outermost ones."""
    text = _THOUGHTS.sub("", reply, count=1)
    decoder = json.JSONDecoder(object_pairs_hook=_without_doubles)
    found, prose, done, at = [], "", 0, text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            end = at + 1  # not one: perhaps a brace of the prose before it
        else:
            found += [value] if any(key in value for key in keys) else []
            prose, done = prose + text[done:at], end
        at = text.find("{", end)
    # a verdict quoted inside a broken one must not pass for the judge's own
    if any(json.dumps(key) in prose + text[done:] for key in keys):
        raise UnreadableReply("broken JSON")
    if not found:
        raise UnreadableReply("no JSON object with the keys asked for" if reply.strip() else "an empty reply")
    if any(one != found[0] for one in found):
        raise UnreadableReply("several verdicts that differ")
    return found[0]


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise UnreadableReply("a JSON object with a key twice")
    return dict(pairs)
