"""Estimates with their intervals as SVG for the pages: no scripts, readable in light and in dark."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup

from dgd_lightning.report.text import rendered

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#c98a00", "#3f9fd8", "#8a6d3b", "#808080")
WIDTH, LEFT, RIGHT = 960, 270, 240  # pixels: of all, of labels, of numbers
ROW, TOP, BOTTOM = 24, 8, 30
LABEL = 38  # characters of a label
TICKS = 6


class Line(NamedTuple):
    """One estimate; a line without one is a heading."""

    label: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    text: str = ""  # in numbers
    colour: int = 0
    hollow: bool = False


def intervals(name: str, lines: Sequence[Line], *, unit: str = "%", around_zero: bool = False) -> Markup:
    """A picture with a line per estimate.

    Args:
        name: for readers who do not see it.
        lines: from top to bottom.
        unit: of the axis.
        around_zero: differences: the zero line is drawn; otherwise the axis starts at zero.
    """
    ends = [end for line in lines for end in (line.value, line.low, line.high) if end is not None]
    first, last, step = _axis([0.0, *ends], around_zero)
    foot = TOP + ROW * len(lines)

    def x(value: float | None) -> str | None:
        return None if value is None else f"{LEFT + (WIDTH - LEFT - RIGHT) * (value - first) / (last - first):.1f}"

    ticks = []
    for number in range(round((last - first) / step) + 1):
        at = first + number * step
        zero = around_zero and abs(at) < step / 2
        sign = f"{at:+g}" if around_zero and not zero else f"{abs(at):g}"
        ticks.append({"x": x(at), "zero": zero, "text": f"{sign}{unit}"})
    drawn = []
    for number, line in enumerate(lines):
        colour, known = COLOURS[line.colour % len(COLOURS)], line.low is not None and line.high is not None
        drawn.append(
            {
                "y": TOP + ROW * (number + 0.5),
                "label": line.label if len(line.label) <= LABEL else line.label[: LABEL - 1] + "…",
                "whole": line.label,
                "x": x(line.value),
                "low": x(line.low) if known else None,
                "high": x(line.high) if known else None,
                "text": line.text,
                "colour": colour,
                "fill": "Canvas" if line.hollow else colour,
            }
        )
    places = {"width": WIDTH, "height": foot + BOTTOM, "left": LEFT, "right": RIGHT, "top": TOP, "foot": foot}
    return Markup(rendered("intervals.svg.j2", name=name, ticks=ticks, lines=drawn, **places))


def _axis(values: Sequence[float], around_zero: bool) -> tuple[float, float, float]:
    """First and last tick and the step between them: multiples of 1, 2 or 5 times a power of ten."""
    low, high = min(values), max(values) or float(not any(values))  # all zero: to 1
    if around_zero:  # as much room on both sides, so that nothing looks one-sided
        low, high = -max(-low, high), max(-low, high)
    room = (high - low or 1.0) / TICKS
    power = 10.0 ** math.floor(math.log10(room))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= room * (1 - 1e-9))
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, step
