r"""Results as people and models write them, as LaTeX that math-verify reads without losing what they say.

math-verify 0.9 takes ``\varnothing`` for a variable, ``\mathrm{e}`` for a unit, 4210_5 and 4210_6 for one number, R for
r, and rounds decimals to six digits. Units, fonts, spaces and thousands separators are left out as in the
normalisations of the MATH data set, of Minerva and of math-verify.
"""

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

from dgd_lightning.scoring.numerals import ascii_signs

SIGNS = {
    "√": r"\sqrt ", "∞": r"\infty ", "∅": r"\emptyset ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "×": r"\times ",
    "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "±": r"\pm ",
    "ℝ": r"\mathbb{R}", "°": r"^\circ ", "º": r"^\circ ", "∛": r"\sqrt[3]", "，": ", ", "⟨": "(", "⟩": ")", "。": ".",
}  # fmt: skip
BASES = dict(zip("two three four five six seven eight nine ten eleven twelve".split(), range(2, 13), strict=True))
FUNCTIONS = set("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp".split())
FONT = r"\\(?:text(?:bf|it|rm|sf|normal)?|math(?:rm|bf|it|sf|normal)|mbox|operatorname\*?|boldsymbol|bm)(?![a-z])"
REWRITTEN = [  # in this order
    (r"(?<=[\w)}])\*\*(?=[\w({-])", "^"),
    (r"(?<!\\)\\[()\[\]]|\\?\$|\*\*", ""),
    (r"(?<=\d)(?:\{,\}|,\\!|\\[,!;: ]|~)\s?(?=\d{3}(?!\d))", ""),  # thousands
    (r"(?:(?<!\\)\\[,!;: ]|\\q?quad(?![a-z])|~|\s)+", " "),
    (r"\\[bB]igg?[lrm]?(?![a-z])|\\(?:displaystyle|limits)(?![a-z])", ""),
    (r"\{\\(?:rm|bf|it|sf) |\\(?:rm|bf|it|sf)\s*\{", r"\\text{"),
    (FONT + r"\s*\{", r"\\text{"),
    (r"\\text\{(\d\w*|[A-F][\dA-F]*)\}\s*(?=_)", r"\1"),
    (r"\\text\{\s*(\w+) (?:in )?base (\w+)\s*\}", r"\1_{\2}"),
    (r"_\s*\{?\s*\\text\{\s*(?:base\s*)?(\w+)\s*\}\s*\}?", r"_{\1}"),
    (r" ?(?:\\text\{)? ?\(?(?:in )?base[ -]?\}? ?(\w+)\)? ?\}?\Z", r"_{\1}"),
    (r"\\l?langle(?![a-z])", "("),
    (r"\\r?rangle(?![a-z])", ")"),
    (r"\\lbrace(?![a-z])", r"\\{"),
    (r"\\rbrace(?![a-z])", r"\\}"),
    (r"\\[dt]binom(?![a-z])", r"\\binom"),
    (r"\\varnothing(?![a-z])|\\(?:left)?\\\{\s*\\?(?:right)?\\\}|\\\{\s*\\\}", r"\\emptyset "),
    (r"(?i)(?:\\text\{\s*)?\b(?:the )?(?:empty|null) set\b\s*\}?", r"\\emptyset "),
    (r"(?<=[\d)}])\s*(?:\{\})?\^?\s*(?:\{\s*)?(?:\\circ|\\degree|\\text\{\s*o\s*\})(?![a-z])\s*\}?(?:\s*[CF]\b)?", ""),
    (r"(?<![\\A-Za-z])(?=sqrt|pi(?![A-Za-z]))", r"\\"),
    (r"\\sqrt\s*(\[\w\])?\s*(?:\(([^()]*)\)|(\d+))", r"\\sqrt\1{\2\3}"),
    (
        r"(?:\\left)?[(\[]\s*\\begin\{array\}\s*\{[lcr| ]*\}(.*?)\\end\{array\}\s*(?:\\right)?[)\]]",
        r"\\begin{pmatrix}\1\\end{pmatrix}",
    ),
    (r"(?<![\d/.])(\d+)\s+(\d+)\s?/\s?(\d+)(?!\d)", r"\1\\frac{\2}{\3}"),
    (r"\A(\s*-?\d*\.?\d+)[eE]([-+]?\d+)\s*\Z", r"\1\\times 10^{\2}"),
    (r"\A\s*[A-Za-z]\w?\s*\\in(?![a-z])", ""),
]
RULES = [(re.compile(pattern), new) for pattern, new in REWRITTEN]
RAISED = re.compile("[⁺⁻⁰¹²³⁴-⁹ⁿⁱ]+|[₀-₉]+")
WORDS = re.compile(r"\\text\{([^{}]*)\}")
UNITS = re.compile(  # "\text{ m}/\text{s}^2"
    r"(?<=[\d})!])(?:(?:\s|\\cdot|/)*(?:\\text\{(?!\s*(?:and|or|if|for|mod)\b)[^{}]*\}(?:\^\{?-?\d+\}?)?"
    r"|\\[dt]?frac\{\\text\{[^{}]*\}\}\{\\text\{[^{}]*\}\}))+[\s.]*\Z|\s*\\?%\s*\Z"
)
ROWS = re.compile(r"\\begin\{(?:aligned|align\*?|gathered|split)\}(.*)\\end\{\w+\*?\}", re.S)
GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s?\{(\d+)\}")
DECIMAL = re.compile(r"(\d*)\.(\d+)")
BASED = re.compile(r"(?<![\w\\}])\(?(\d[\dA-Za-z]*(?:\.\d+)?|[A-F][\dA-F]*)\)?_(?:\{(\w+)\}|(\d))")
NUMBER = re.compile(r"-?(?:\d+(?:\.\d+)?|\.\d+)(?!\d)")
SHORT_UNITS = set("mm cm km ft in mi yd kg mg lb oz ml hr am pm".split())
NO_UNITS = set("sqrt sin cos tan cot sec csc log exp and mod inf infinity".split())
# Behind a choice: a second one, "(A), (C)", "A and C"
SEVERAL = re.compile(r"\W*?(?:[,;/&+]|\b(?:and|or)\b|(?=\())\W*[A-Z](?=\W*(?:\Z|[,;/&+)]|(?:and|or)\b))")
MAX_DIGITS = 300


class Pair(NamedTuple):
    """Two results, ready to be compared."""

    gold: str
    found: str


def normalised(text: str) -> str:
    """One result in LaTeX: fonts, spaces, units, currency and separators left out, other scripts' signs written out."""
    text = RAISED.sub(_raised, "".join(map(_latex, ascii_signs(text))))
    if rows := ROWS.search(text):
        lines = [line.replace("&", "").strip() for line in rows[1].split(r"\\")]
        text = re.sub(r",\s*(?==)", " ", ", ".join(filter(None, lines)))
    for pattern, new in RULES:
        text = pattern.sub(new, text)
    text = WORDS.sub(_word, text.strip().rstrip(".,;: "))
    text = UNITS.sub("", text).strip()
    if alone := WORDS.fullmatch(text):
        numbers = NUMBER.findall(GROUPED.sub(_joined, alone[1]))
        text = numbers[0] if len(numbers) == 1 else text
    else:
        text = re.sub(r"\A\\text\{[^{}]*\}[\s:=]*(?=[^\s(][^\n]*\d|\d|\\[a-z])", "", text)  # "\text{Area} = "
    if re.search(r"[(\[]|\\\{|\\begin", text):
        return re.sub(r",(?=\S)", ", ", text)  # (1,200) is a point
    return re.sub(r"(?<=\d), (?=0\d\d(?!\d))", "", GROUPED.sub(_joined, text))


def _latex(sign: str) -> str:
    if sign.isascii() or sign in SIGNS:
        return SIGNS.get(sign, sign)
    kind, _, name = unicodedata.name(sign, "").rpartition(" LETTER ")
    if kind in ("GREEK SMALL", "GREEK CAPITAL") and name.isalpha():
        return f"\\{name.lower() if kind == 'GREEK SMALL' else name.capitalize()} "
    return sign


def _raised(match: re.Match[str]) -> str:
    text = unicodedata.normalize("NFKC", match[0]).replace("−", "-")
    return ("_{" if unicodedata.decomposition(match[0][0]).startswith("<sub>") else "^{") + text + "}"


def _word(match: re.Match[str]) -> str:
    r"""``\text{…}``, or what is no text: a number, e, i, a function, a command."""
    inner = match[1].strip()
    if inner in FUNCTIONS:
        return f"\\{inner} "
    if inner in ("e", "i") or re.fullmatch(r"-?[\d.,]+\.?|\\[a-z]+", inner):
        return inner.rstrip(".")
    return match[0]


def _joined(match: re.Match[str]) -> str:
    return match[0].replace(",", "")


def paired(gold: str, found: str) -> Pair:
    """Two normalised results without rounding: decimals as fractions, numbers with a base as names.

    A base belongs to its number. Where one of the two has none it is the gold's base, or ten.
    """
    in_base = [BASED.search(text) is not None for text in (gold, found)]
    gold = BASED.sub(_named if in_base[1] else r"\1", gold)
    found = BASED.sub(lambda one: one[1] if not in_base[0] and _base(one) == 10 else _named(one), found)
    return Pair(*(DECIMAL.sub(_fraction, REPEATING.sub(_repeating, text)) for text in (gold, found)))


def _base(match: re.Match[str]) -> int:
    named = match[2] or match[3]
    return BASES.get(named.lower(), int(named) if named.isdecimal() else 0)


def _named(match: re.Match[str]) -> str:
    """A number with a base as a name of its own, which no arithmetic changes; what is no such number as it is."""
    digits, base = match[1].upper(), _base(match)
    if not base or (base <= 10 and not digits.replace(".", "").isdecimal()):
        return match[0]
    return f"n_{{{base}base{digits.lstrip('0').replace('.', 'p') or '0'}}}"


def _fraction(match: re.Match[str]) -> str:
    return rf"\frac{{{int(match[1] + match[2])}}}{{{10 ** len(match[2])}}}"


def _repeating(match: re.Match[str]) -> str:
    whole, fixed, again = match.groups()
    below = 10 ** len(fixed) * (10 ** len(again) - 1)
    return rf"\frac{{{int(whole + fixed + again) - int(whole + fixed or 0)}}}{{{below}}}"


def in_brackets(text: str) -> str:
    r"""How the parts of a result are held together: "(" in order, ``\{`` a set, "," neither; empty: it has no parts."""
    text = re.sub(r"\\left(?![a-z])|\\right(?![a-z])", "", text).strip()
    if "," not in text or re.search(r"\\cup|\\cap|=|<|>|\\le|\\ge|\\in|\\text|\\begin|infty", text):
        return ""
    ends = text[:1] + text[-1:]
    if text.startswith(r"\{"):
        return r"\{"
    return "(" if ends in ("()", "[]", "(]", "[)") and text.count(ends[0]) == 1 else ","


def plain_number(text: str) -> Fraction | None:
    r"""The value of a normalised result that is one number, perhaps with units: "1234.50", "18 dollars"; None for
    anything else, such as "x = 5", "7x" or "1/2".
    """
    found = NUMBER.match(text)
    if found is None or len(found[0]) > MAX_DIGITS:
        return None
    rest = text[found.end() :]
    if rest.strip():
        words = rest.split()
        units = all(word.isalpha() and (len(word) > 2 or word in SHORT_UNITS) for word in words)
        if not rest[0].isspace() or not units or NO_UNITS.intersection(map(str.lower, words)):
            return None
    return Fraction(found[0])


def words_alone(text: str) -> str | None:
    r"""A gold result that LaTeX calls words (``\text{(C)}``, ``\text{June } 20``), ready to be compared; else None."""
    if re.match(FONT + r"\s*\{", text.strip("$ (")) is None:
        return None
    inner = plain_words(text)
    return inner if re.fullmatch(r"[^\W\d_]+(?:[ '-]\w+)*", inner) else None


def plain_words(text: str) -> str:
    """Without fonts, marks, articles and case."""
    text = re.sub(FONT + r"\s*\{([^{}]*)\}", r" \1 ", text)
    return re.sub(r"\A(?:an?|the) ", "", re.sub(r"\\?[()]|[$\s.,:*]+", " ", text).strip().casefold())


def same_words(gold: str, found: str) -> bool:
    """Whether a result is the gold's words, as `words_alone` gives them; of a choice (a letter) what it stands for may
    follow it, but no second choice.
    """
    if len(gold) == 1:
        choice = re.match(r"\W*([A-Za-z])(?![A-Za-z'])", plain := re.sub(FONT + r"\s*\{([^{}]*)\}", r" \1 ", found))
        return choice is not None and choice[1].casefold() == gold and not SEVERAL.match(plain, choice.end())
    return gold == plain_words(found)
