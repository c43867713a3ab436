"""Tables that fit the console: one that is too wide is turned on its side, so that no cell is cut."""

import io
import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

ENDLESS = 100_000  # columns: what a table is measured by
WIDTH = 120  # columns where stdout is no terminal


def new_table(title: str, left: Sequence[str], right: Iterable[str], caption: str | None = None) -> Table:
    """An empty table: columns of text, then columns of numbers."""
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for column in left:
        table.add_column(column)
    for column in right:
        table.add_column(column, justify="right")
    return table


def plain_console() -> Console:
    """Stdout, for tables with names out of files: no text is taken for markup, and any can be written."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    return Console(width=None if sys.stdout.isatty() else WIDTH, markup=False, emoji=False)


def print_tables(console: Console, parts: Sequence[Table | Text | str]) -> None:
    """Print tables, each in a form that the console has room for, and text between them: a `Text` is wrapped at its
    spaces, a line is left as it is, since a path that is cut can't be opened."""
    for part in parts:
        if isinstance(part, Text | str):
            console.print(part, soft_wrap=isinstance(part, str), highlight=False)
            continue
        for form in fitting(console, part):
            console.print(form, crop=False)


def fitting(console: Console, table: Table) -> list[Table]:
    """The table; or turned, a line per column; or that for every row by itself, whatever room it takes."""
    rows = range(table.row_count)
    turned = _turned(table, list(rows), console.width)
    for form in (table, turned):
        if _width(console, form) <= console.width or not rows:
            return [form]
    alone = [_turned(table, [row], console.width, titled=row == 0) for row in rows]
    for form in alone:
        form.width = max(_width(console, form), form.min_width or 0)
    return alone


def _width(console: Console, table: Table) -> int:
    return console.measure(table, options=console.options.update(max_width=ENDLESS)).maximum


def _turned(table: Table, rows: list[int], width: int, *, titled: bool = True) -> Table:
    """A line per column and a column per row; the first column's cells are the new headers."""
    first, *others = table.columns
    title = table.title if titled else None
    room = min(width, len(str(title))) if title else None
    result = Table(title=title, title_justify=table.title_justify, min_width=room)
    result.add_column(first.header)
    headers = list(first.cells)
    for row in rows:
        result.add_column(headers[row], justify="right")
    for column in others:
        cells = list(column.cells)
        result.add_row(column.header, *(cells[row] for row in rows))
    return result
