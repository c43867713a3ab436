"""The final result in a text that reasons first, and its value where it is a plain number."""

import re
from fractions import Fraction
from typing import NamedTuple

WRAPPED = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
BOXED = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(?P<bare>[^\s{$]+))")
MARKED = re.compile(r"^[ \t*]{0,8}####[ \t]{0,8}(?P<found>[^\n]+)", re.M)
SAID = re.compile(r"answer(?:\s+is|\s*:)[\s*:]{0,8}(?P<found>[^\n]+?)(?=\*\*|[.!]?\s{0,3}(?:\n|\Z)|[.!]\s)", re.I)
INLINE = re.compile(
    r"\$\$(.{1,1000}?)\$\$|(?<!\\)\$(.{1,1000}?)(?<!\\)\$|\\\((.{1,1000}?)\\\)|\\\[(.{1,1000}?)\\\]", re.S
)
NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])-?\.\d+")
FORMULA = re.compile(r"\\[a-zA-Z]|\d\s*[/^*+_]")
THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|,\\!|\\,|\\!|,)\s?(?=\d{3}(?!\d))")
SHORT_UNITS = set("mm cm km ft in mi yd kg mg lb oz ml hr am pm".split())
NO_UNITS = set("sqrt sin cos tan cot sec csc log exp and mod inf infinity".split())
MAX_TEXT = 100_000  # characters of an answer's end that are looked at
MAX_LENGTH = 1000  # characters of a result; longer ones are no result
MAX_DIGITS = 300
LAST = 20  # boxes that are tried, from the end


class Found(NamedTuple):
    """A final result, and where it stood."""

    text: str
    place: str  # "boxed", "####", "said", "formula", "number" or "last line"


def final_answer(text: str, *, number: bool) -> Found | None:
    r"""The final result, behind the last ``</think>``: the first of these that is there, each time the last one.

    1. ``\boxed{…}`` (or ``\fbox``), braces balanced; an empty one does not count;
    2. ``#### x``, as GSM8K writes it;
    3. what "answer is" or "answer:" says, up to the end of its sentence;
    4. with ``number`` the last number of the text, else the last formula (``$…$``, ``\(…\)``, ``\[…\]``), else the
       last number, else the last line.

    Args:
        text: the model's answer.
        number: the result is a number (GSM8K): of 1. to 3. the first number behind the last ``=`` is taken, without
            currency, units and thousands separators; a formula such as ``\frac{1}{2}`` stays as it is.
    """
    text = text.rsplit("</think>", 1)[-1][-MAX_TEXT:]
    if (marked := _marked(text)) is not None:
        tail = _plain(marked.text).rsplit("=", 1)[-1]
        numbers = NUMBER.findall(tail) if number and not FORMULA.search(tail) else []
        return marked._replace(text=numbers[0]) if numbers else marked
    formulas = [] if number else INLINE.findall(text)
    if formulas:
        return _found(max(formulas[-1], key=len), "formula")
    if numbers := NUMBER.findall(_plain(text)):
        return Found(numbers[-1], "number")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return _found(lines[-1], "last line") if lines and not number else None


def _marked(text: str) -> Found | None:
    """What the text marks as its result."""
    for box in reversed([*BOXED.finditer(text)][-LAST:]):
        content = box["bare"] or _braced(text, box.end())
        if content.strip():
            return _found(content, "boxed")
    for pattern, place in ((MARKED, "####"), (SAID, "said")):
        if matches := [match["found"] for match in pattern.finditer(text) if match["found"].strip("*$ .")]:
            formulas = INLINE.findall(matches[-1])
            return _found(max(formulas[-1], key=len) if formulas else matches[-1], place)
    return None


def _found(text: str, place: str) -> Found:
    return Found(text.strip("* \t\n")[:MAX_LENGTH], place)


def _braced(text: str, start: int) -> str:
    """Up to the brace that closes the one before ``start``; "" where none does."""
    depth = 1
    for at in range(start, len(text)):
        if text[at] in "{}" and text[at - 1] != "\\":
            depth += 1 if text[at] == "{" else -1
            if depth == 0:
                return text[start:at]
    return ""


def _plain(text: str) -> str:
    """Without LaTeX's wrapping of words, currency and thousands separators."""
    text = WRAPPED.sub(r" \1 ", THOUSANDS.sub("", text)).replace("−", "-")
    return re.sub(r"(-?)\\?[$€£]\s*", r"\1", text).replace("\\%", "%")


def plain_number(text: str) -> Fraction | None:
    r"""The value of a result that is one number, perhaps with currency, percent sign or units: "$1,234.50",
    "18 dollars", "\text{25\%}"; None for anything else, such as "x = 5", "7x" or "1/2".
    """
    text = _plain(text).strip(" .")
    found = NUMBER.match(text)
    if found is None or len(found[0]) > MAX_DIGITS:
        return None
    rest = text[found.end() :]
    if rest.strip() not in ("", "%"):
        words = rest.split()
        units = all(word.isalpha() and (len(word) > 2 or word in SHORT_UNITS) for word in words)
        if not rest[0].isspace() or not units or NO_UNITS.intersection(map(str.lower, words)):
            return None
    return Fraction(found[0].replace(",", ""))


def words_alone(text: str) -> str | None:
    r"""A result that LaTeX calls words (``\text{(C)}``, ``\text{June } 20``), ready to be compared; None for others."""
    if WRAPPED.match(text.strip("$ (")) is None:
        return None
    inner = re.sub(r"[$\s().,]+", " ", WRAPPED.sub(r" \1 ", text)).strip().casefold()
    return inner if re.fullmatch(r"[^\W\d_]+(?:[ '-]\w+)*", inner) else None
