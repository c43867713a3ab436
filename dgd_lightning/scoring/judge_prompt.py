"""The judge's prompt: a text with places for the rubrics and the response."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from dgd_lightning.errors import InputError

_PLACE = re.compile(r"\{(\w+)\}")  # JSON's braces around anything but one bare word stay as they are
PLACES = ("rubrics_text", "model_output")  # the names of CL-bench's own script


def read_template(path: str | None) -> str:
    """The prompt file's text, or the package's.

    Args:
        path: a file, or None.

    Raises:
        InputError: no readable file, or one whose places are not exactly ``{rubrics_text}`` and ``{model_output}``.
    """
    if path is None:
        return packaged("rubric_judge.txt")
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            "judge.prompt",
            expected="a readable UTF-8 file",
            received=f"{path} ({type(error).__name__})",
            hint="check the path",
        ) from error
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
    """The prompt for one answer; braces inside rubrics and answers mean nothing.

    Args:
        template: what `read_template` or `packaged` gave.
        rubrics: texts, numbered from 1 in the prompt.
        answer: what is graded.
        others: what stands in further places.
    """
    numbered = "\n".join(f"{number}. {rubric}" for number, rubric in enumerate(rubrics, 1))
    values = {**dict(zip(PLACES, (numbered, answer), strict=True)), **others}
    text = _PLACE.sub(lambda place: values[place[1]], template)
    # JSON can escape half a surrogate pair, no request can carry one
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def rubric_texts(rubrics: Any) -> list[str]:
    """The rubrics of a row: texts, or objects with ``rubric_criteria``; blank ones are left out, as CL-bench does.

    Args:
        rubrics: anything that a row may have there; what is no list of rubrics gives none.
    """
    if not isinstance(rubrics, list):
        return []
    found = [rubric.get("rubric_criteria") if isinstance(rubric, dict) else rubric for rubric in rubrics]
    texts = [text.strip() for text in found if isinstance(text, str)]
    return [text for text in texts if text] if len(texts) == len(found) else []
