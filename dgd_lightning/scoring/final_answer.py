r"""The final result in a text that reasons first.

Places are those of the field's graders: boxes, of which several can be one result, as in math-verify's extraction
("$\boxed{1}$ or $\boxed{2}$"); ``####``, as GSM8K's answers have it; what "the answer is" says, as in the patterns of
math-verify and lm-evaluation-harness; formulas, and the last number, as in the latter's ``flexible-extract``.
"""

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

from dgd_lightning.scoring.numerals import LETTERS, numerals, plain_digits

Kind = Literal["number", "formula", "words"]
BOXED = re.compile(r"\\(?:boxed|fbox|framebox)\s{0,3}(?:\{|(?P<bare>[^\s{$]+))")
CUT = re.compile(r"\\boxed\s?\{(?![\s}])([^\n$]{1,200})\$?[.\s]*\Z")  # no brace closes it
INLINE = re.compile(
    r"\$\$(.{1,1000}?)\$\$|(?<!\\)\$(.{1,1000}?)(?<!\\)\$|\\\((.{1,1000}?)\\\)|\\\[(.{1,1000}?)\\\]", re.S
)
SPACE = r"(?:[\s$*]|\\[()\[\],;: ]|\\q?quad\b){0,9}"
ASSIGNED = r"(?:[A-Za-z](?:_\w)?\s?=\s?\$?)"
JOINT = re.compile(  # what stands between the parts of one result: "$ or $x = ", "$, $"
    rf"{SPACE}(?:[,;]|,?\s?(?:\\text\{{\s?)?\b(?:and|or)\b\s?\}}?){SPACE}{ASSIGNED}?"
)
MARKED = re.compile(r"####[ \t*]{0,8}(?P<found>[^\n]+)")
NUMBERED = re.compile(r"(?P<number>\d{1,2})(?:[.):]\s{1,3}\S|\s[A-Z])")  # a heading: "#### 2. Check"
SPACED = (  # "answer" in languages of MGSM and others
    r"answers?|antwort|antwoord|respuesta|réponse|resposta|risposta|odpowiedź|svar(?:et)?|cevap|jawaban\w{0,3}|jibu"
    r"|đáp án|ответ|відповідь"
)
OTHER = r"答案|答え|答|정답|답|الجواب|الإجابة|תשובה|उत्तर|উত্তর|సమాధానం|คำตอบ"
VERBS = r"\b(?:is|are|was|be|equals|ist|lautet|es|est|é|è|adalah|là|ni)\b|[是为為は은는]|هو|هي|হল|হলো|คือ"
SAID = re.compile(
    rf"(?<![{LETTERS}])(?<!</)(?:(?:{SPACED}|{OTHER})"
    rf"(?:[^\n.!?。:：=—→]{{0,60}}?(?:{VERBS}|(?P<mark>[:：=—→]|(?<=<answer)>))"
    rf"|(?P<heading>[*_ \t]{{0,4}}\n))|(?:{OTHER})(?=\s?[-$]?\d))"
    r"(?![\s*]{0,5}not?\b)[\s*:：]{0,12}(?=(?P<found>[^\n]{1,1000}))",  # ahead: the same line may say another later
    re.I,
)
# Languages that part thousands by full stops; a comma before three digits parts them too, as in Mexico.
STOPS = re.compile(r"\b(?:antwort|antwoord|respuesta|resposta|risposta|svaret|cevap|jawaban\w*|đáp án)\b", re.I)
STOPPED = re.compile(r"(?<![\d.,])([1-9]\d{0,2})\.(?=\d{3}(?!\d|\.\d))")
SENTENCE = re.compile(r"(?<!\\)[.!?](?=\s|\*|\Z)|[。！？।؟]|</answer", re.I)
CLAUSE = re.compile(
    r"(?:,\s+(?!and\b|or\b)|;\s+|\s\()(?=[^\W\d_]{2,})|\s(?:because|since|as|which|where|when|by|if|after)\s", re.I
)
ASIDE = re.compile(r"\b(?:where|since|because|given|using|if|with|for (?:all|any|every|each))\s*\Z", re.I)
RESULT = re.compile(  # no mere words
    r"\d|[\\=+*/^<>|∅∞√]|^\W*[^\W\d_]\W*$|\b[a-z]\s?-\s?[a-z]\b|\b(?:pi|infinity|empty set)\b", re.I
)
AT_ONCE = re.compile(  # not so where an answer begins with its work: "Answer: Janet has 16 eggs. …"
    r"\W*(?:(?:about|approximately|exactly|roughly|[a-z]{1,3})\b\W*)?(?:\d|(?<=\\)[a-z])", re.I
)
WORK = re.compile(  # what makes a number part of an operation, or one of two
    r"\s?(?:[-+*/×·÷^x]\s?\(?-?\d|\\[a-zA-Z]{2}|(?:(?:[a-z]+\s)?and|or|to)\s\$?\d)"
)
COMMAND = re.compile(r"\\[a-zA-Z]{2}")
THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|,\\!|\\[,!; ]|~)\s?(?=\d{3}(?!\d))")  # as LaTeX parts them
WRAPPED = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
BOLD = re.compile(r"\*\*[^*\n]+\*\*")
ENDED = re.compile(r"<\|(?:im_|eot|end)|</s>|<end_of_turn>")
NEXT = re.compile(r"\n[ \t]{0,9}(?:Question|Problem|Q)\s?:")
MAX_TEXT = 100_000  # characters of an answer's end that are looked at
MAX_LENGTH = 1000  # characters of a result; longer ones are no result
LAST = 20  # boxes, and sayings, that are tried, from the end


class Found(NamedTuple):
    """A final result, and where it stood."""

    text: str
    place: str  # "boxed", "####", "said", "formula", "number", "bold" or "last line"


class Part(NamedTuple):
    """A box or a formula."""

    start: int
    end: int
    text: str


def final_answer(text: str, kind: Kind) -> Found | None:
    r"""The final result, behind the last ``</think>``: the first of these that is there, each time the last one.

    1. ``\boxed{…}`` (or ``\fbox``), braces balanced; an empty one does not count, one that is cut off by the
       text's end only where there is no other. Several are one result where no more than a comma, "and", "or" and
       perhaps ``x =`` stands between them;
    2. ``####`` before a number or a formula; before words, or a heading's number, it is a heading of Markdown;
    3. what "the answer is", in one of some twenty languages, or ``<answer>`` says in its sentence, where that is a
       result;
    4. "words": the last bold text; "words" and "formula": the last formula (``$…$``, ``\(…\)``, ``\[…\]``), those
       joined to it as boxes are;
    5. "number" and "formula": the last number, or the last bold one of its line; "words" and "formula": the last line.

    What follows an end-of-turn token, or another "Question:" behind a stated result, is left out.

    Args:
        text: the model's answer.
        kind: what the gold result is. Of "number" (GSM8K), 1. to 3. give the first number behind the last ``=`` that
            is no operation; a formula alone, such as ``\frac{1}{2}``, stays as it is.
    """
    text = text.rsplit("</think>", 1)[-1][-MAX_TEXT:]
    if (end := ENDED.search(text)) and text[: end.start()].strip():
        text = text[: end.start()]
    if kind == "number" and STOPS.search(text):
        text = STOPPED.sub(r"\1", text)
    if (following := NEXT.search(text)) and (found := _stated(text[: following.start()], kind)):
        return found
    return _stated(text, kind) or _unmarked(text, kind)


def _stated(text: str, kind: Kind) -> Found | None:
    """What the text marks as its result."""
    boxes = [_box(text, box) for box in [*BOXED.finditer(text)][-LAST:]]
    boxes = [box for box in boxes if box.text.strip()]
    if boxes := boxes or [Part(*cut.span(), cut[1]) for cut in CUT.finditer(text)]:
        if kind == "number":
            return _found(_number(boxes[-1].text) or boxes[-1].text, "boxed")
        return _found(_joined(text, boxes, last=True), "boxed")
    headings = 0
    marked = None
    for match in MARKED.finditer(text):
        content = match["found"].strip("* \t")
        numbered = NUMBERED.match(content)
        if numbered and int(numbered["number"]) == headings + 1:
            headings += 1
        elif re.match(r"\W{0,5}\d+(?!\d|st|nd|rd|th|-[a-z])|[\\$]", content):
            marked = (_number(content) if kind == "number" else _formula(content) or content) or marked
    if marked is not None:
        return _found(marked, "####")
    for match in [*SAID.finditer(text)][: -LAST - 1 : -1]:
        if content := _said(text, match, kind):
            return _found(content, "said")
    return None


def _said(text: str, match: re.Match[str], kind: Kind) -> str | None:
    """The result in the sentence behind "the answer is"; None where there is none."""
    displayed = INLINE.match(text, match.start("found"))  # perhaps over several lines
    sentence = displayed[0] if displayed and "\n" in displayed[0] else SENTENCE.split(match["found"], maxsplit=1)[0]
    if kind == "number":
        working = (match["mark"] or match["heading"]) and not AT_ONCE.match(sentence)
        return None if working else _number(sentence)
    clause = CLAUSE.split(sentence, maxsplit=1)[0].strip()
    found = _formula(clause) or _formula(sentence) if kind == "formula" else None
    found = found or clause
    return found if found and (kind == "words" or RESULT.search(found)) else None


def _unmarked(text: str, kind: Kind) -> Found | None:
    formulas = [] if kind == "number" else [*_formulas(text)]
    main = [one for one in formulas if not ASIDE.search(text, max(0, one.start - 20), one.start)]
    if kind == "words" and (strong := BOLD.findall(text)):
        return _found(strong[-1], "bold")
    if formulas:
        return _found(_joined(text, main or formulas, last=True), "formula")
    text = plain_digits(THOUSANDS.sub("", text))
    if kind != "words" and (numbers := numerals(text)):
        starts = {one.start: one for one in numbers}
        line = text.rfind("\n", 0, numbers[-1].start) + 1
        bold = [place for one in BOLD.finditer(text, line) for place in range(*one.span()) if place in starts]
        return Found(starts[bold[-1]].text if bold else numbers[-1].text, "number")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return _found(lines[-1], "last line") if lines and kind != "number" else None


def _number(text: str) -> str | None:
    """The first number behind the last "=" that is not the number of an operation; else an operation or formula."""
    plain = plain_digits(THOUSANDS.sub("", WRAPPED.sub(r" \1 ", text).replace("__", " ")))
    parts = [(part, numerals(part)) for part in reversed(plain.split("="))]
    for part, numbers in parts:
        if numbers and not COMMAND.search(part[: numbers[0].end]) and not WORK.match(part, numbers[0].end):
            return numbers[0].text
    if any(numbers for _, numbers in parts):
        return CLAUSE.split(_formula(text) or plain, maxsplit=1)[0].strip()
    return None


def _formula(text: str) -> str:
    """The first formula, those joined to it included; empty where there is none."""
    return _joined(text, [*_formulas(text)], last=False)


def _formulas(text: str) -> Iterator[Part]:
    for one in INLINE.finditer(text):
        yield Part(one.start(), one.end(), max(filter(None, one.groups()), key=len))


def _joined(text: str, parts: list[Part], *, last: bool) -> str:
    """The last (or first) part, with its neighbours as far as `JOINT` joins them."""
    groups: list[list[Part]] = []
    for part in parts:
        joined = groups and JOINT.fullmatch(text, groups[-1][-1].end, part.start)
        groups[-1].append(part) if joined else groups.append([part])
    chosen = groups[-1 if last else 0] if groups else []
    texts = [part.text.strip("* \t\n") for part in chosen]
    if len(chosen) > 1:
        names = [re.search(ASSIGNED + r"\Z", text[max(0, part.start - 8) : part.start]) for part in chosen]
        texts = [(name[0].strip("$") if name else "") + one for name, one in zip(names, texts, strict=True)]
    return ", ".join(dict.fromkeys(texts))[:MAX_LENGTH]


def _box(text: str, box: re.Match[str]) -> Part:
    content = box["bare"] or _braced(text, box.end())
    return Part(box.start(), box.end() + (0 if box["bare"] else len(content) + 1), content)


def _found(text: str, place: str) -> Found:
    return Found(text.strip("*# \t\n")[:MAX_LENGTH], place)


def _braced(text: str, start: int) -> str:
    """Up to the brace that closes the one before ``start``; "" where none does."""
    depth = 1
    for at in range(start, len(text)):
        if text[at] in "{}" and text[at - 1] != "\\":
            depth += 1 if text[at] == "{" else -1
            if depth == 0:
                return text[start:at]
    return ""
