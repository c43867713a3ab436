"""Tables of a run on narrow consoles: every cell whole, in one form or another."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dgd_lightning.analysis.adaptation import Gain
from dgd_lightning.metrics.clustered import Difference
from dgd_lightning.metrics.paired import TauGain
from dgd_lightning.report.print_tables import fitting, new_table, print_tables
from dgd_lightning.report.run_tables import gain_table


def gains(arms: int) -> Table:
    gain = TauGain(
        contexts=16,
        base=1.04,
        tau=1.2,
        difference=Difference(0.16, -0.01, 0.31),
        ratio=Difference(0.154, -0.012, 0.283),
        median=Difference(0.213, 0.0, 0.281),
        worst=-0.104,
    )
    return gain_table([Gain(f"speculative+ttt {arm}", "speculative", gain, []) for arm in range(arms)])


def printed(table: Table, width: int) -> str:
    out = io.StringIO()
    print_tables(Console(file=out, width=width), [table])
    return out.getvalue()


@pytest.mark.parametrize("arms", [1, 2, 5])
@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_no_cell_is_cut(arms: int, width: int) -> None:
    table, text = gains(arms), printed(gains(arms), width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for column in table.columns:
        for cell in (column.header, *column.cells):
            assert str(cell) in text
    assert text.count("+0.16 [-0.01, +0.31]") == arms


def test_forms_by_width() -> None:
    table = gains(3)
    assert fitting(Console(width=200), table) == [table]
    (turned,) = fitting(Console(width=110), table)
    assert [str(column.header) for column in turned.columns] == ["arm", *table.columns[0].cells]
    assert [form.title is None for form in fitting(Console(width=60), table)] == [False, True, True]
    plain = Console(width=80, file=io.StringIO())
    plain.print(table)
    assert "…" in plain.file.getvalue() or "+0.16 [-0.01, +0.31]" not in plain.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [20, 40, 60])
def test_a_name_longer_than_the_console_stays_whole(width: int) -> None:
    """The terminal goes on in the next line: what is cut or hyphenated can't be searched for."""
    table = new_table("Decoding", ["arm"], ["tasks", "tokens/s"])
    for arm in (name := "noise_control_of_the_guided_arm_with_a_long_name_b03", "short"):
        table.add_row(arm, "3/3", "12.5")
    text = printed(table, width)
    assert name in text
    assert "…" not in text
    assert "tokens/s" in text


def test_texts_are_wrapped_at_spaces_and_lines_are_not() -> None:
    out = io.StringIO()
    words, path = "some words of a sentence " * 3, "a/path with spaces/that must stay/whole"
    print_tables(Console(file=out, width=30), [Text(words), path])
    lines = out.getvalue().splitlines()
    assert lines[-1] == path
    assert " ".join(line.strip() for line in lines[:-1]) == words.strip()
    assert max(map(len, lines[:-1])) <= 30


def test_a_table_without_rows_stays() -> None:
    table = Table("arm", "a name that is far too long for this console")
    assert fitting(Console(width=10), table) == [table]
