"""`Endpoint`: where a judge is asked, whatever stands behind it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Reply(NamedTuple):
    """What a judge wrote."""

    text: str
    flaw: str | None  # why it is no verdict whatever it says: refused, cut off


class NoAnswer(Exception):
    """This question has no answer, whatever was tried; others may have one. The text says why."""


@dataclass
class Effort:
    """What a question took, failures included."""

    requests: int = 0
    faults: Counter[str] = field(default_factory=Counter)  # failed attempts and unreadable replies, by reason
    tokens_in: int | None = 0  # None: an endpoint did not tell
    tokens_out: int | None = 0

    def count_tokens(self, tokens_in: int | None, tokens_out: int | None) -> None:
        """Add a reply's tokens."""
        self.tokens_in = None if tokens_in is None or self.tokens_in is None else self.tokens_in + tokens_in
        self.tokens_out = None if tokens_out is None or self.tokens_out is None else self.tokens_out + tokens_out


class Endpoint(ABC):
    """Where a judge is asked; safe to call from several threads."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What decides a reply beside the prompt; JSON-able, without a key."""

    @abstractmethod
    def ask(self, prompt: str, effort: Effort) -> Reply:
        """One reply, always a fresh one.

        Args:
            prompt: the user's turn.
            effort: what it takes is added here, whatever becomes of it.

        Raises:
            NoAnswer: none could be had for this prompt.
            InputError: a user's mistake, which ends all questions.
        """

    @abstractmethod
    def stop(self) -> None:
        """Give up what is waited for, but for replies that come at once; nothing is asked afterwards."""

    @abstractmethod
    def close(self) -> None:
        """End all waiting; nothing is asked afterwards."""
