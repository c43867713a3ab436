"""The page of `dgd report`: verdict, pictures, tables. It holds no scripts and asks for nothing from elsewhere."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup
from rich.table import Table

from dgd_lightning.report.solve_rates import change, p_value
from dgd_lightning.report.text import rendered
from dgd_lightning.report.words import Words
from dgd_lightning.scoring.summary import Compared

PICTURES = {"by_category": "by category", "by_length": "by prompt length"}
LEGEND = "Hollow: against a null control. Without an interval: too few {}s, or changed ones, or all changed alike."
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#c98a00", "#3f9fd8", "#8a6d3b", "#808080")
WIDTH, LEFT, RIGHT = 960, 270, 240  # pixels: of all, of labels, of numbers
TICKS = 6


class Line(NamedTuple):
    """One estimate in a picture; a line without one is a heading."""

    label: str
    value: float | None = None
    low: float | None = None  # None where there is no interval, as `high` then is
    high: float | None = None
    text: str = ""  # in numbers
    colour: int = 0
    hollow: bool = False


def page(
    title: str,
    sentences: Sequence[str],
    report: dict[str, Any],
    found: Sequence[Compared],
    tables: Sequence[Table],
    *,
    shown: Sequence[str],
    words: Words,
    note: str,
) -> str:
    """The whole page: sentences, pictures of `summary`'s rates and of the comparisons, tables as they are printed.

    ``shown``: arms in the pictures by group; ``note`` goes to every picture's title.
    """
    figures = [figure for figure in _figures(report["arms"], found, shown, words, note) if figure["picture"]]
    return rendered("report.html.j2", heading=f"Report: {title}", sentences=sentences, figures=figures, tables=tables)


def _figures(
    arms: dict[str, Any], found: Sequence[Compared], shown: Sequence[str], words: Words, note: str
) -> Iterator[dict[str, str]]:
    colours = {arm: number for number, arm in enumerate(arms)}
    lines = [_rate(arm, rates, colours[arm]) for arm, rates in arms.items()]
    yield _figure(f"{words.measure}, {words.over}{note}", lines)
    lines = [_difference(one, colours[one.versus.arm]) for one in found]
    yield _figure(f"Differences, percentage points{note}", lines, LEGEND.format(words.unit), unit="", around_zero=True)
    for name, by in PICTURES.items():
        groups = sorted({group for arm in shown for group in arms[arm][name]}, key=_first_number)
        lines = []
        for group in groups if len(groups) > 1 else []:
            members = [(arm, arms[arm][name][group]) for arm in shown if group in arms[arm][name]]
            lines += [Line(group), *(_rate(arm, rates, colours[arm]) for arm, rates in members)]
        yield _figure(f"{words.measure} {by}{note}", lines)


def _first_number(group: str) -> tuple[int, str]:
    digits = group.partition("K")[0]
    return (int(digits) if digits.isdecimal() else 0, group)


def _figure(title: str, lines: Sequence[Line], legend: str = "", **settings: Any) -> dict[str, str]:
    """A title with its picture, which is empty where there are no lines."""
    return {"title": title, "picture": intervals(title, lines, **settings) if lines else "", "legend": legend}


def _rate(label: str, rates: dict[str, Any], colour: int) -> Line:
    official = rates["official"]
    if official["value"] is None:
        return Line(label, 0.0, text="no score", colour=colour, hollow=True)
    value, low, high = (None if end is None else 100 * end for end in official.values())
    text = f"{value:.1f}% ({rates['solved']:g}/{rates['scored']})"
    return Line(label, value, low, high, text=text, colour=colour)


def _difference(one: Compared, colour: int) -> Line:
    value, low, high = (None if end != end else 100 * end for end in one.result.difference)
    label, text = f"{one.versus.arm} − {one.versus.base}", f"{change(one.result)}, Holm {p_value(one.holm)}"
    return Line(label, value, low, high, text, colour, hollow=one.versus.control)


def intervals(name: str, lines: Sequence[Line], *, unit: str = "%", around_zero: bool = False) -> Markup:
    """An SVG picture with a line per estimate, readable in light and in dark; ``name``: for readers who do not see it.

    Differences are drawn ``around_zero``, with a line there; otherwise the axis starts at zero.
    """
    ends = [end for line in lines for end in (line.value, line.low, line.high) if end is not None]
    first, last, step = _axis([0.0, *ends], around_zero)

    def x(value: float) -> str:
        return f"{LEFT + (WIDTH - LEFT - RIGHT) * (value - first) / (last - first):.1f}"

    ticks = []
    for number in range(round((last - first) / step) + 1):
        at = first + number * step
        zero = around_zero and abs(at) < step / 2
        sign = f"{at:+g}" if around_zero and not zero else f"{abs(at):g}"
        ticks.append({"x": x(at), "zero": zero, "text": f"{sign}{unit}"})
    places = {"width": WIDTH, "left": LEFT, "right": RIGHT, "colours": COLOURS, "x": x}
    return Markup(rendered("intervals.svg.j2", name=name, ticks=ticks, lines=lines, **places))


def _axis(values: Sequence[float], around_zero: bool) -> tuple[float, float, float]:
    """First and last tick and the step between them: multiples of 1, 2 or 5 times a power of ten."""
    low, high = min(values), max(values) or float(not any(values))  # all zero: to 1
    if around_zero:  # as much room on both sides, so that nothing looks one-sided
        low, high = -max(-low, high), max(-low, high)
    room = (high - low or 1.0) / TICKS
    power = 10.0 ** math.floor(math.log10(room))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= room * (1 - 1e-9))
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, step
