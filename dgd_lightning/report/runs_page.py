"""The page of `dgd report`: verdict, pictures, tables. It holds no scripts and asks for nothing from elsewhere."""

from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table

from dgd_lightning.report.pictures import Line, intervals
from dgd_lightning.report.solve_rates import change, p_value
from dgd_lightning.report.text import rendered
from dgd_lightning.scoring.summary import Compared

PICTURES = {"by_category": "Solve rate by category", "by_length": "Solve rate by prompt length"}
LEGEND = "Hollow: against a null control. Without an interval: too few contexts, or all of them changed alike."


def page(
    title: str,
    sentences: Sequence[str],
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
        sentences: the verdict, a sentence each, then remarks.
        report: of `summary`: rates by arm.
        found: the comparisons.
        tables: as they are printed.
        shown: arms in the pictures by group.
        note: to every title.
    """
    return rendered(
        "report.html.j2",
        heading=f"Report: {title}",
        sentences=sentences,
        figures=[figure for figure in _figures(report, found, shown, note) if figure["picture"]],
        tables=[_cells(table) for table in tables],
    )


def _cells(table: Table) -> dict[str, Any]:
    """A table of the console as one of a page."""
    columns = [{"header": str(column.header), "justify": column.justify} for column in table.columns]
    rows = zip(*(map(str, column.cells) for column in table.columns), strict=True)
    return {"title": table.title, "columns": columns, "rows": list(rows), "caption": table.caption}


def _figures(
    report: dict[str, Any], found: Sequence[Compared], shown: Sequence[str], note: str
) -> Iterator[dict[str, str]]:
    arms = report["arms"]
    colours = {arm: number for number, arm in enumerate(arms)}
    lines = [_rate(arm, rates, colours[arm]) for arm, rates in arms.items()]
    yield _figure(f"Solve rate, 95% intervals over contexts{note}", lines)
    lines = [_difference(one, colours[one.versus.arm]) for one in found]
    yield _figure(f"Differences, percentage points{note}", lines, LEGEND, unit="", around_zero=True)
    for name, title in PICTURES.items():
        groups = sorted({group for arm in shown for group in arms[arm][name]}, key=_first_number)
        lines = []
        for group in groups if len(groups) > 1 else []:
            members = [(arm, arms[arm][name][group]) for arm in shown if group in arms[arm][name]]
            lines += [Line(group), *(_rate(arm, rates, colours[arm]) for arm, rates in members)]
        yield _figure(f"{title}{note}", lines)


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
