"""The page of `dgd report`: verdict, pictures, tables. It holds no scripts and asks for nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table

from dgd_lightning.report.pictures import Line, intervals
from dgd_lightning.report.solve_rates import change, p_value
from dgd_lightning.report.style import CSS
from dgd_lightning.report.text import escaped
from dgd_lightning.scoring.summary import Compared

PICTURES = {"by_category": "Solve rate by category", "by_length": "Solve rate by prompt length"}
OWN = (
    ".verdict{font-size:1.1rem;border-left:4px solid var(--line);padding:.25rem 1rem;background:var(--box)}"
    "svg{max-width:100%;height:auto;font:13px system-ui,sans-serif}svg text{fill:currentColor}"
    "td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}td.n{white-space:nowrap}table{margin:.5rem 0}"
    "h2{margin-top:1.5rem;border-top-width:1px;font-size:1.25rem}.verdict p,figure{margin:.5rem 0}"
)


def page(
    title: str,
    told: Sequence[str],
    report: dict[str, Any],
    found: Sequence[Compared],
    tables: Sequence[Table],
    *,
    shown: Sequence[str],
    note: str,
) -> str:
    """The whole page.

    Args:
        title: names the runs.
        told: the verdict, a sentence each, then remarks.
        report: of `summary`: rates by arm.
        found: the comparisons.
        tables: as they are printed.
        shown: arms in the pictures by group.
        note: to every title.
    """
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>Report: {escaped(title)}</title>\n<style>{CSS}{OWN}</style>\n</head>\n<body>\n<main>",
            f"<h1>Report: {escaped(title)}</h1>",
            '<div class="verdict">',
            *(f"<p>{escaped(sentence)}</p>" for sentence in told),
            "</div>",
            *_pictures(report, found, shown, note),
            *map(html_table, tables),
            "</main>\n</body>\n</html>\n",
        ]
    )


def html_table(table: Table) -> str:
    """A table of the console as one of a page."""
    kinds = [' class="n"' if column.justify == "right" else "" for column in table.columns]
    heads = "".join(f"<th{kind}>{_lines(str(c.header), ' ')}" for c, kind in zip(table.columns, kinds, strict=True))
    lines = [f'<h2>{escaped(table.title or "")}</h2>\n<div class="wide"><table>\n<tr>{heads}</tr>']
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        first, *others = zip(cells, kinds, strict=True)
        row = f"<th{first[1]}>{_lines(str(first[0]), '<br>')}"
        row += "".join(f"<td{kind}>{_lines(str(cell), '<br>')}" for cell, kind in others)
        lines.append(f"<tr>{row}</tr>")
    caption = f'<p class="faint">{escaped(table.caption)}</p>' if table.caption else ""
    return "\n".join([*lines, f"</table></div>{caption}"])


def _lines(text: str, joint: str) -> str:
    return joint.join(escaped(line) for line in text.split("\n"))


def _pictures(report: dict[str, Any], found: Sequence[Compared], shown: Sequence[str], note: str) -> Iterator[str]:
    arms = report["arms"]
    colours = {arm: number for number, arm in enumerate(arms)}
    lines = [_rate(arm, rates, colours[arm]) for arm, rates in arms.items()]
    yield from _figure(f"Solve rate, 95% intervals over contexts{note}", lines)
    if found:
        lines = [_difference(one, colours[one.versus.arm]) for one in found]
        yield from _figure(f"Differences, percentage points{note}", lines, unit="", around_zero=True)
        legend = "Hollow: against a null control. Without an interval: too few contexts, or all of them changed alike."
        yield f'<p class="faint">{legend}</p>'
    for name, title in PICTURES.items():
        groups = sorted({group for arm in shown for group in arms[arm][name]}, key=_first_number)
        lines = []
        for group in groups if len(groups) > 1 else []:
            members = [(arm, arms[arm][name][group]) for arm in shown if group in arms[arm][name]]
            lines += [Line(group), *(_rate(arm, rates, colours[arm]) for arm, rates in members)]
        yield from _figure(f"{title}{note}", lines)


def _first_number(group: str) -> tuple[int, str]:
    digits = group.partition("K")[0]
    return (int(digits) if digits.isdecimal() else 0, group)


def _figure(title: str, lines: Sequence[Line], **settings: Any) -> Iterator[str]:
    if lines:
        yield f"<h2>{escaped(title)}</h2>\n<figure>{intervals(title, lines, **settings)}</figure>"


def _rate(label: str, rates: dict[str, Any], colour: int) -> Line:
    official = rates["official"]
    if official["value"] is None:
        return Line(label, 0.0, text="no score", colour=colour, hollow=True)
    low, high = (None if official[end] is None else 100 * official[end] for end in ("low", "high"))
    text = f"{100 * official['value']:.1f}% ({rates['solved']:g}/{rates['scored']})"
    return Line(label, 100 * official["value"], low, high, text=text, colour=colour)


def _difference(one: Compared, colour: int) -> Line:
    found = one.result.difference
    known = found.low == found.low
    return Line(
        f"{one.versus.arm} − {one.versus.base}",
        100 * found.value,
        100 * found.low if known else None,
        100 * found.high if known else None,
        text=f"{change(one.result)}, Holm {p_value(one.holm)}",
        colour=colour,
        hollow=one.versus.control,
    )
