"""`Grader`: what every way of grading has in common, and which one a row goes to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from dgd_lightning.errors import InputError
from dgd_lightning.types import Score


class Grader(ABC):
    """Grades answers to the rows that carry what it needs; safe to call from several threads."""

    name: str  # into graded rows: ``dgd.grader``
    workers: int = 1  # rows it may be asked to grade at once, from threads

    @abstractmethod
    def takes(self, row: dict[str, Any]) -> bool:
        """Whether a row carries what this grader needs: a look at its keys, cheap, for any row at all."""

    @abstractmethod
    def grade(self, row: dict[str, Any], answer: str) -> Score:
        """Grade an answer; blocks until it is done, and never raises for a bad answer.

        Args:
            row: one that the grader takes.
            answer: what the model wrote.

        Raises:
            InputError: a user's mistake: a key, a package or a permission is missing.
        """

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """Everything that can change a score (model, prompt hash, time limit …), JSON-able; never a key."""

    def totals(self) -> dict[str, Any] | None:
        """What this process asked of others and what that cost, for scores.json; None where nobody is asked."""
        return None

    def stop(self) -> None:  # noqa: B027  (most graders wait for nobody)
        """End what `grade` waits for in other threads, soon; these calls may raise. Nothing is graded afterwards."""

    def close(self) -> None:  # noqa: B027  (most graders hold nothing)
        """Let go of processes and connections; the grader is not used afterwards."""


def grader_for(row: dict[str, Any], graders: Sequence[Grader]) -> Grader:
    """The first of the graders that takes a row: a program's check stands before a judge in the list.

    Raises:
        InputError: none does.
    """
    for grader in graders:
        if grader.takes(row):
            return grader
    raise InputError(
        "row",
        expected=f"what one of the graders needs ({', '.join(grader.name for grader in graders) or 'there are none'})",
        received=f"a row with fields {', '.join(map(str, row)) or 'none'}",
        hint="see docs/scoring.md for the fields that each grader reads",
    )
