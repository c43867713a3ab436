"""`Grader`: what all graders have in common, which one a row goes to, and how those of the package are found.

A grader is one file that is named ``…grader.py``, in whichever room; no other file names it.
"""

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from dgd_lightning.errors import InputError
from dgd_lightning.types import Score

IGNORED, MISUSED, FORMAT = "context_ignored", "context_misused", "format_error"
INCOMPLETE, OTHER = "incomplete_or_refused", "other"
ERROR_CLASSES = (IGNORED, MISUSED, FORMAT, INCOMPLETE, OTHER)  # why a task failed

READ, CHECK, RUN, ASK = range(4)  # cost: reads a score, checks text, runs processes, asks somebody


class Grader(ABC):
    """Grades answers to the rows that carry what it needs; safe to call from several threads."""

    name: str  # into graded rows: ``dgd.grader``
    workers: int = 1  # rows it may be asked to grade at once, from threads
    cost: int = RUN  # of the graders that take a row the cheapest grades it

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self | None:
        """The grader for a command, or None where it is not wanted.

        Args:
            options: of ``dgd score``, by name; ``leave``: rows that nobody grades are left rather than an error.
        """
        return cls()

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

    def remarks(self, row: dict[str, Any], answer: str, score: Score) -> dict[str, Any]:
        """What a row that this grader takes says of an answer, whoever scored it; see `remarked`.

        Returns:
            ``lm_eval``: other verdicts, see `scoring.harness_rules`; or nothing. Never a class of errors: that is
            part of a verdict.
        """
        return {}

    def totals(self) -> dict[str, Any] | None:
        """What this process asked of others and what that cost, for scores.json; None where nobody is asked."""
        return None

    def stop(self) -> None:  # noqa: B027  (most graders wait for nobody)
        """End what `grade` waits for in other threads, soon; these calls may raise. Nothing is graded afterwards."""

    def close(self) -> None:  # noqa: B027  (most graders hold nothing)
        """Let go of processes and connections; the grader is not used afterwards."""


def grader_for(row: dict[str, Any], graders: Sequence[Grader]) -> Grader:
    """The first of the graders that takes a row.

    Raises:
        InputError: none does.
    """
    for grader in graders:
        if grader.takes(row):
            return grader
    fields = [name if isinstance(value, str | list | dict) else f"{name} ({value})" for name, value in row.items()]
    raise InputError(
        "row",
        expected=f"what one of the graders needs ({', '.join(grader.name for grader in graders) or 'there are none'})",
        received=f"a row with fields {', '.join(fields) or 'none'}"[:300],
        hint="see docs/scoring.md for the fields that each grader reads",
    )


def remarked(row: dict[str, Any], answer: str, score: Score, graders: Sequence[Grader]) -> Score:
    """The score with the remarks of all graders that take the row among its details."""
    remarks: dict[str, Any] = {}
    for grader in graders:
        if grader.takes(row):
            remarks |= grader.remarks(row, answer, score)
    return score._replace(details=(score.details or {}) | remarks) if remarks else score


def checked(row: dict[str, Any], answer: str, graders: Sequence[Grader]) -> Score | None:
    """The score of an answer by the first of the graders that takes its row; None where none does or it can't say."""
    score = next((grader.grade(row, answer) for grader in graders if grader.takes(row)), None)
    return None if score is None or score.value is None else score


def package_graders(options: Mapping[str, Any], *, costs: Sequence[int] = (READ, CHECK, RUN, ASK)) -> list[Grader]:
    """The package's graders of these costs for a command, the cheapest first; for options see `Grader.from_options`."""
    kinds: list[type[Grader]] = []
    root = Path(__file__).parent
    for path in root.glob("*/*grader.py"):
        module = importlib.import_module(f"{root.name}.{path.parent.name}.{path.stem}")
        classes = [kind for _, kind in inspect.getmembers(module, inspect.isclass) if issubclass(kind, Grader)]
        kinds += [kind for kind in classes if kind.__module__ == module.__name__ and kind.cost in costs]
    found = [kind.from_options(options) for kind in sorted(kinds, key=lambda kind: (kind.cost, kind.name))]
    return [grader for grader in found if grader is not None]
