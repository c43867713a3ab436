"""`OneJudge`: asks one judge one question at a time, keeps what it says, and counts what that took.

`Endpoint`: where a judge is asked: a server, or a model in this process.
`VerdictFile`: verdicts on the disk, found by the hash of what was asked; several processes may share a file.
"""

import contextlib
import json
import os
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

from dgd_lightning.grader import ERROR_CLASSES
from dgd_lightning.jsonl import JsonLines, content_key, lines, reported
from dgd_lightning.scoring.judge_config import JudgeModel
from dgd_lightning.scoring.judge_text import UnreadableReply

START = 200  # characters of a reply that is no verdict, for people


class VerdictFile:
    """Appends records and finds them again; safe for threads, for other processes, and against kills.

    A record is on the disk when `put` returns. A line that a kill left torn is closed by the next write, and read as
    nothing; so its question is asked again and no other one is.

    Raises:
        InputError: ``judge.cache`` can't be opened, read or written.
    """

    argument = "judge.cache"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()  # made if missing
        self._lock = threading.Lock()
        self._found: dict[str, dict[str, Any]] = {}
        self._read_to = 0
        with reported(self.path, self.argument):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = JsonLines(self.path, argument=self.argument, shared=True)

    def get(self, key: str) -> dict[str, Any] | None:
        """The record of a key, those that other processes wrote meanwhile included; None where there is none."""
        with self._lock, reported(self.path, self.argument):
            if key not in self._found:
                self._read_on()
            return self._found.get(key)

    def put(self, key: str, record: dict[str, Any]) -> dict[str, Any]:
        """Store a record, which has ``rationale``, and ``score`` and ``status`` or ``error_class``.

        Returns the one that counts, the first of its key (see `jsonl.content_key`).
        """
        with self._lock, reported(self.path, self.argument):
            self._file.append([{"key": key, **record}])
            self._read_on()
            return self._found[key]

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._file.close()

    def _read_on(self) -> None:
        """Takes in whole lines beyond what was read; a last one without its end may still be being written."""
        for line in lines(self.path, self._read_to):
            self._read_to = line.offset + len(line.text)
            with contextlib.suppress(ValueError):  # torn by a kill
                record = json.loads(line.text)
                if _is_verdict(record):
                    self._found.setdefault(record["key"], record)


def _is_verdict(record: Any) -> bool:
    if not (isinstance(record, dict) and all(isinstance(record.get(name), str) for name in ("key", "rationale"))):
        return False
    graded = isinstance(record.get("status"), list) and record.get("score") in (0, 1)
    return graded or record.get("error_class") in ERROR_CLASSES


class Reply(NamedTuple):
    """What a judge wrote."""

    text: str
    flaw: str | None  # why it is no verdict: refused, cut off


class NoAnswer(Exception):
    """This question has no answer, whatever was tried; others may have one. The text says why."""


@dataclass
class Effort:
    """What questions took, failures included."""

    requests: int = 0
    faults: Counter[str] = field(default_factory=Counter)  # failed attempts and unreadable replies, by reason
    tokens_in: int | None = 0  # None: an endpoint did not report them
    tokens_out: int | None = 0

    def count_tokens(self, tokens_in: int | None, tokens_out: int | None) -> None:
        """Add a reply's tokens."""
        self.tokens_in = None if tokens_in is None or self.tokens_in is None else self.tokens_in + tokens_in
        self.tokens_out = None if tokens_out is None or self.tokens_out is None else self.tokens_out + tokens_out


class Endpoint(ABC):
    """Where a judge is asked; safe to call from several threads."""

    identity: dict[str, Any]  # what decides a reply beside the prompt; JSON-able, without a key

    @abstractmethod
    def ask(self, prompt: str, effort: Effort) -> Reply:
        """One reply, always a fresh one; what it takes is added to the effort, whatever becomes of it.

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


class Question(NamedTuple):
    """What a judge is asked."""

    prompt: str
    content: str  # hash of the prompt file and of all that is put into it
    read: Callable[[str], Any]  # what a reply says, a NamedTuple with ``rationale``; raises UnreadableReply


class Answer(NamedTuple):
    """What came of a question."""

    record: dict[str, Any] | None  # fields of what was read; None: the judge failed
    failure: str  # "judge_error: …", where it did
    details: dict[str, Any]  # requests, tokens, cost; whether it was stored before


class OneJudge:
    """One judge, its stored verdicts and what it took; ``asks`` replies at most until one can be read."""

    def __init__(self, settings: JudgeModel, endpoint: Endpoint, asks: int, verdicts: VerdictFile) -> None:
        self._settings, self.endpoint, self._verdicts = settings, endpoint, verdicts
        self._asks = 1 if settings.local else asks  # greedy: another reply would be the same
        self._lock = threading.Lock()
        self._turns: dict[str, threading.Lock] = {}  # by question: equal answers, as of lossless arms, are judged once
        self._counts: Counter[str] = Counter()
        self._spent = Effort()

    def apart(self) -> Self:
        """The same judge, limits and stored verdicts, for questions whose cost is counted apart."""
        return type(self)(self._settings, self.endpoint, self._asks, self._verdicts)

    def answer(self, question: Question) -> Answer:
        """The stored verdict, or a new one.

        Raises:
            InputError: a user's mistake, which ends all grading.
        """
        key = content_key(question.content, self.endpoint.identity)
        with self._lock:
            turn = self._turns.setdefault(key, threading.Lock())
        with turn:
            effort, begun, failure = Effort(), time.monotonic(), ""
            record = self._verdicts.get(key)
            outcome = "judged" if record is None else "cached"
            if record is None:
                try:
                    found = self._ask(question, effort)._asdict()
                    record = self._verdicts.put(key, {**found, **self._taken(effort, begun)})
                except NoAnswer as error:
                    outcome, failure = "failed", f"judge_error: {error}"
                finally:  # whatever ends it: this was paid for
                    with self._lock:
                        self._spent.requests += effort.requests
                        self._spent.faults.update(effort.faults)
                        self._spent.count_tokens(effort.tokens_in, effort.tokens_out)
            with self._lock:
                self._counts[outcome] += 1
            details = self._details(record or self._taken(effort, begun))
            return Answer(record, failure, {**details, "cached": outcome == "cached"})

    def totals(self) -> dict[str, Any]:
        """What this process asked so far."""
        with self._lock:
            spent = self._spent
            return {
                "model": self._settings.model,
                **{name: self._counts[name] for name in ("judged", "cached", "failed")},
                "requests": spent.requests,
                "faults": dict(sorted(spent.faults.items())),
                "tokens_in": spent.tokens_in,
                "tokens_out": spent.tokens_out,
                **self._cost(spent.tokens_in, spent.tokens_out),
            }

    def _ask(self, question: Question, effort: Effort) -> Any:
        flaw = start = ""
        for _ in range(self._asks):
            reply = self.endpoint.ask(question.prompt, effort)
            flaw = reply.flaw or ""
            if not flaw:
                try:
                    return question.read(reply.text)
                except UnreadableReply as error:
                    flaw = str(error)
            effort.faults[flaw] += 1
            start = " ".join(reply.text.split())[:START]
        shown = f" ({start!r} …)" if start else ""
        raise NoAnswer(f"{self._asks} replies without a verdict, the last: {flaw}{shown}")

    def _taken(self, effort: Effort, begun: float) -> dict[str, Any]:
        seconds = round(time.monotonic() - begun, 3)
        return {"model": self._settings.model, **vars(effort), "faults": dict(effort.faults), "seconds": seconds}

    def _details(self, record: dict[str, Any]) -> dict[str, Any]:
        """Of a row: what its verdict took when it was asked for."""
        names = ("model", "requests", "faults", "tokens_in", "tokens_out", "seconds")
        return {name: record.get(name) for name in names} | self._cost(
            record.get("tokens_in"), record.get("tokens_out")
        )

    def _cost(self, tokens_in: int | None, tokens_out: int | None) -> dict[str, float | None]:
        prices = self._settings.price_in, self._settings.price_out
        if prices[0] is None or prices[1] is None:
            return {}
        if tokens_in is None or tokens_out is None:
            return {"cost": None}  # unknown is not free
        return {"cost": (tokens_in * prices[0] + tokens_out * prices[1]) / 1e6}
