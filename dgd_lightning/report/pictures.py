"""Estimates with their intervals as SVG for the pages: no scripts, readable in light and in dark, all text escaped."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from dgd_lightning.report.text import escaped

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


def intervals(name: str, lines: Sequence[Line], *, unit: str = "%", around_zero: bool = False) -> str:
    """A picture with a line per estimate.

    Args:
        name: for readers who do not see it.
        lines: from top to bottom.
        unit: of the axis.
        around_zero: differences: the zero line is drawn; otherwise the axis starts at zero.
    """
    ends = [end for line in lines for end in (line.value, line.low, line.high) if end is not None]
    first, last, step = _axis([0.0, *ends], around_zero)
    height = TOP + ROW * len(lines) + BOTTOM

    def x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - first) / (last - first)

    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    parts = [f'<svg {size} role="img" aria-label="{escaped(name)}">']
    foot = height - BOTTOM
    for number in range(round((last - first) / step) + 1):
        at = first + number * step
        zero = around_zero and abs(at) < step / 2
        look = 'stroke-opacity="0.8" stroke-width="1.5"' if zero else 'stroke-opacity="0.15"'
        parts.append(f'<path d="M{x(at):.1f} {TOP}V{foot}" stroke="currentColor" {look}/>')
        sign = f"{at:+g}" if around_zero and not zero else f"{abs(at):g}"
        parts.append(_text(x(at), foot + 18, f"{sign}{unit}", "middle"))
    for number, line in enumerate(lines):
        parts += _drawn(line, TOP + ROW * (number + 0.5), x)
    return "\n".join([*parts, "</svg>"])


def _drawn(line: Line, y: float, x: Callable[[float], float]) -> list[str]:
    label = line.label if len(line.label) <= LABEL else line.label[: LABEL - 1] + "…"
    if line.value is None:
        return [f'<g font-weight="bold">{_text(4, y + 4, label, "start", line.label)}</g>']
    colour = COLOURS[line.colour % len(COLOURS)]
    parts = [_text(LEFT - 12, y + 4, label, "end", line.label)]
    if line.low is not None and line.high is not None:
        ends = f"M{x(line.low):.1f} {y}H{x(line.high):.1f}"
        ends += "".join(f"M{x(end):.1f} {y - 5}v10" for end in (line.low, line.high))
        parts.append(f'<path d="{ends}" stroke="{colour}" stroke-width="2" fill="none"/>')
    inside = "Canvas" if line.hollow else colour
    ring = f'stroke="{colour}" stroke-width="2" fill="{inside}"'
    parts.append(f'<circle cx="{x(line.value):.1f}" cy="{y}" r="5" {ring}/>')
    return [*parts, _text(WIDTH - RIGHT + 14, y + 4, line.text, "start")]


def _text(x: float, y: float, text: str, anchor: str, whole: str = "") -> str:
    title = f"<title>{escaped(whole)}</title>" if whole not in ("", text) else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{title}{escaped(text)}</text>'


def _axis(values: Sequence[float], around_zero: bool) -> tuple[float, float, float]:
    """First and last tick and the step between them: multiples of 1, 2 or 5 times a power of ten."""
    low, high = min(values), max(values) or float(not any(values))  # all zero: to 1
    if around_zero:  # as much room on both sides, so that nothing looks one-sided
        low, high = -max(-low, high), max(-low, high)
    room = (high - low or 1.0) / TICKS
    power = 10.0 ** math.floor(math.log10(room))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= room * (1 - 1e-9))
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, step
