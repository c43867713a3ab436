"""Numbers as sentences write them: digits of any script, currency, thousands separators, decimal comma, fractions."""

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

LETTERS = "A-Za-zÀ-ɏͰ-ӿ_"  # of scripts that put spaces between words: x2 and H2O hold no number, 共12個 does
SPACES = "\u00a0\u2009\u202f "
NUMERAL = re.compile(
    rf"(?<![{LETTERS}\d])(?<!\d[.,:])(?P<sign>-?)"
    rf"(?:(?P<ones>\d+) (?=\d+/\d))?"
    rf"(?P<body>\d{{1,3}}(?:(?P<mark>[,.'’{SPACES}])\d{{3}}(?:(?P=mark)\d{{3}})*)(?!\d)(?:[.,]\d+)?"
    r"|\d{1,2}(?:,\d\d)+,\d{3}(?:\.\d+)?|\d+(?:[.,]\d+)?|\.\d+)"
    r"(?:\s?/\s?(?P<below>0*[1-9]\d*)|e(?P<power>[-+]?\d{1,3})(?!\w))?(?!\d|[.,/:]\d|(?:st|nd|rd|th)\b)"
    r"(?:\s?(?P<times>thousand|million|billion|lakh|crore|k|[万萬만亿億억])(?![A-Za-z]))?",
    re.I,
)
TIMES = {"thousand": 3, "million": 6, "billion": 9, "lakh": 5, "crore": 7, "k": 3}
TIMES |= dict.fromkeys("万萬만", 4) | dict.fromkeys("亿億억", 8)  # powers of ten
LABEL = re.compile(r"(?:\b(?:step|part|question|problem|equation|option|case|method|no\.)|[#№第])\s?$", re.I)
SIGNS = {"−": "-", "–": "-", "－": "-", "٫": ".", "٬": ",", "．": ".", "⁄": "/"}
MAX_DIGITS = 300


class Numeral(NamedTuple):
    """One number of a text."""

    start: int  # in the text that `plain_digits` gives
    end: int
    text: str  # sign, ASCII digits, a decimal point, or a fraction such as 3/4


def ascii_signs(text: str) -> str:
    """With ASCII digits, minus signs and separators, every currency sign as $, ½ as 1/2."""
    made = []
    for sign in text:
        if sign.isascii():
            made.append(sign)
        elif unicodedata.category(sign) == "Nd":
            made.append(str(unicodedata.digit(sign)))
        elif unicodedata.decomposition(sign).startswith("<fraction>"):
            made.append(" " + unicodedata.normalize("NFKC", sign).replace("⁄", "/"))
        else:
            made.append("$" if unicodedata.category(sign) == "Sc" else SIGNS.get(sign, sign))
    return re.sub(r"(?<=\d)，(?=\d{3})", ",", "".join(made))


def plain_digits(text: str) -> str:
    """That, without currency and full hours' minutes, and minus as a sign."""
    text = re.sub(r"(?<=\d):00(?![\d:])", "", text)
    text = re.sub(r"(?:(?<![A-Za-z])[A-Z]{1,3})?\\?\$\s?(?=[-\d.])|\\?\$", "", ascii_signs(text))
    text = re.sub(r"(?<![A-Za-z])(?:[A-Z]{2,3}|Rs\.?) ?(?=\d)", "", text)  # USD12, Rs. 12
    return re.sub(r"\b(?:minus|negative) (?=\d)", "-", text, flags=re.I)


def numerals(text: str) -> list[Numeral]:
    """The numbers of a text that `plain_digits` gave, in order; those that label something ("step 3") only where there
    are no others.

    A single comma before three digits parts thousands, before others it is a decimal comma; a single full stop is a
    decimal point. Of two kinds of marks the last is the decimal one.
    """
    found = [one for one in NUMERAL.finditer(text) if one.end() - one.start() <= MAX_DIGITS]
    free = [one for one in found if not LABEL.search(text, max(0, one.start() - 20), one.start())]
    return [Numeral(one.start(), one.end(), _canonical(one)) for one in free or found]


def _canonical(one: re.Match[str]) -> str:
    body = one["body"]
    marks = [sign for sign in body if not sign.isdigit()]
    whole, last, part = body.rpartition(marks[-1]) if marks else (body, "", "")
    thousands = last == "," and len(part) == 3 and len({*marks}) == 1 and whole[0] != "0"
    if last not in (".", ",") or marks.count(last) > 1 or thousands:
        whole, part = body, ""
    text = one["sign"] + ("".join(filter(str.isdigit, whole)) or "0") + "." * bool(part) + part
    power = TIMES.get((one["times"] or "").lower(), 0) + int(one["power"] or 0)
    if power or one["ones"]:
        signed = int(one["sign"] + "1")
        return str(((Fraction(text) / int(one["below"] or 1)) + signed * int(one["ones"] or 0)) * Fraction(10) ** power)
    return text + (f"/{one['below']}" if one["below"] else "")
