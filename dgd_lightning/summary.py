"""`Summary`: what a run says when it ends. Callbacks fill it in; `DecodeMetrics` writes and prints it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Summary:
    """The table, the sentences and the pointers that a run prints, and the details that it keeps in `summary.txt`.

    A module holds one as ``summary``. Whoever has something to add does so before the last ``on_predict_end``.
    """

    cells: dict[str, dict[str, str]] = field(default_factory=dict)  # [arm][column]: the one table that is printed
    sentences: list[str] = field(default_factory=list)  # the result in plain words, printed
    pointers: list[str] = field(default_factory=list)  # where something is, or what is left to do, a line each, printed
    details: list[Any] = field(default_factory=list)  # tables (rich) and lines, printed with --verbose only

    def add_cell(self, arm: str, column: str, text: str) -> None:
        """Sets a cell; columns appear in the order in which they are first set."""
        self.cells.setdefault(arm, {})[column] = text
