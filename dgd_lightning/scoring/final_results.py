"""Rules that read the final result of an answer, for `Majority`: texts are equal where results are."""

from dgd_lightning.scoring.final_answer import Kind, final_answer
from dgd_lightning.scoring.latex import normalised


def number(text: str) -> str | None:
    """The final number, as GSM8K's grader finds it."""
    return _found(text, "number")


def formula(text: str) -> str | None:
    """The final formula or number, as MATH's grader finds it."""
    return _found(text, "formula")


def last_line(text: str) -> str | None:
    """The last line that has something, in lower case, without its last full stop."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[-1].lower().rstrip(".").split()) if lines else None


def _found(text: str, kind: Kind) -> str | None:
    found = final_answer(text, kind)
    return None if found is None else normalised(found.text)
