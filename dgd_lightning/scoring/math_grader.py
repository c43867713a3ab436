"""`MathGrader`: GSM8K and MATH-500: is the final result of an answer equal to the gold one, as mathematics?"""

import contextlib
import importlib.metadata
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from dgd_lightning.errors import InputError
from dgd_lightning.grader import Grader
from dgd_lightning.jsonl import content_key, reply
from dgd_lightning.scoring.final_answer import final_answer
from dgd_lightning.scoring.harness_rules import harness_verdicts
from dgd_lightning.scoring.latex import (
    Pair,
    in_brackets,
    normalised,
    paired,
    plain_number,
    same_words,
    words_alone,
)
from dgd_lightning.types import Score

WORKER = Path(__file__).with_name("math_worker.py")
RULES = [Path(__file__), WORKER, *map(Path(__file__).with_name, ("final_answer.py", "latex.py", "numerals.py"))]
PATIENCE = 20
START_SECONDS = 120.0  # to import sympy on a busy machine
LIVES = 3  # workers that are tried for one comparison while somebody kills them
CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL}  # what an input may do to it


class WorkerError(RuntimeError):
    """A worker can't be started or kept alive; no verdict on any answer."""


class MathPool:
    """Processes that compare results, at most ``size``; one that takes too long ends, and another takes its place.

    Safe to use from several threads.

    Args:
        size: workers, started when they are first needed.
        seconds: of processor time for one comparison, so that a busy machine changes no score; a worker that hangs
            without using any is killed after ``PATIENCE`` times as long.
        memory_mb: address space of a worker.
    """

    def __init__(self, size: int, seconds: float, memory_mb: int) -> None:
        self.seconds, self.memory_mb = seconds, memory_mb
        self._room = threading.Semaphore(size)
        self._idle: list[subprocess.Popen[bytes]] = []

    def compare(self, gold: str, answer: str) -> dict[str, Any]:
        """The worker's reply: ``equal``, and how it read both; ``error`` where there was no result in time.

        Raises:
            WorkerError: no worker starts, or they are killed from outside, as where memory lacks: no fault of a result.
        """
        with self._room:
            for _ in range(LIVES):
                found = self._ask(json.dumps({"gold": gold, "answer": answer}).encode() + b"\n")
                if found is not None:
                    return found
        raise WorkerError(f"{LIVES} workers with math-verify were killed from outside, one after the other")

    def _ask(self, question: bytes) -> dict[str, Any] | None:
        """A worker's reply; None where it was killed from outside."""
        try:
            worker = self._idle.pop()
        except IndexError:
            worker = self._start()
        found = None
        try:
            assert worker.stdin is not None
            worker.stdin.write(question)
            worker.stdin.flush()
            found = reply(worker.stdout, PATIENCE * self.seconds)
            if found is None:
                with contextlib.suppress(subprocess.TimeoutExpired):  # its pipe may end a moment before it does
                    worker.wait(1.0)
            late = worker.returncode is None
        except BrokenPipeError:  # it died while it was idle
            return None
        finally:
            if found is None:
                _kill(worker)  # it may be dead already; then its first reason counts
            else:
                self._idle.append(worker)
        if found is not None:
            return found
        if late or worker.returncode == -signal.SIGPROF:
            return {"equal": False, "error": f"no result in {self.seconds:g} s"}
        own = worker.returncode > 0 or -worker.returncode in CRASHES
        return {"equal": False, "error": "the worker ended"} if own else None

    def close(self) -> None:
        """End the idle workers."""
        while self._idle:
            _kill(self._idle.pop())

    def _start(self) -> subprocess.Popen[bytes]:
        worker = subprocess.Popen(  # -P: hides `statistics.py` beside it
            [sys.executable, "-P", str(WORKER), str(self.memory_mb), str(self.seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )
        if reply(worker.stdout, START_SECONDS) is None:
            _kill(worker)
            raise WorkerError("a worker with math-verify does not start: try `python -c 'import math_verify'`")
        return worker


def _kill(worker: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError), worker:  # which closes its pipes and waits for it
        worker.kill()


class MathGrader(Grader):
    """Numbers are compared exactly, words as words, everything else by math-verify in a process of its own.

    Rows: GSM8K (``question``, ``answer`` with ``#### x``); MATH-500 (``problem, answer``, or ``prompt, answer`` with a
    ``source`` that begins with "math").

    Args:
        seconds: of processor time for one comparison; an answer that takes longer is not the gold one.
        memory_mb: address space of a comparing process.
        workers: rows graded at once, and comparing processes.
    """

    name = "math"

    def __init__(self, *, seconds: float = 10.0, memory_mb: int = 2048, workers: int = 2) -> None:
        self.workers = workers
        self.pool = MathPool(workers, seconds, memory_mb)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        return cls(workers=options["math_workers"])

    def takes(self, row: dict[str, Any]) -> bool:
        gold = row.get("answer")
        known = isinstance(gold, str | int | float) and not isinstance(gold, bool) and gold == gold  # NaN: no answer
        return known and (_is_gsm8k(row) or _is_math(row))

    def grade(self, row: dict[str, Any], answer: str) -> Score:
        """See `Grader.grade`; ``details`` says what was found where, and how both were read."""
        number = _is_gsm8k(row)
        gold = str(row["answer"]).rsplit("####", 1)[-1].strip() if number else str(row["answer"]).strip()
        word = None if number else words_alone(gold)
        found = final_answer(answer, "number" if number else "formula" if word is None else "words")
        details: dict[str, Any] = {"gold": gold}
        if number and not any(map(str.isdigit, gold)):
            return Score(None, [], f"math_error: GSM8K's results are numbers, the gold one is {gold!r}", details)
        if found is None:
            return Score(0.0, [], "no result in the answer", details)
        details |= {"found": found.text, "place": found.place}
        pair = Pair(normalised(gold), normalised(found.text))
        equal = _same(*pair) if word is None else same_words(word, found.text)
        if equal is None:
            try:
                read = self.pool.compare(*paired(*pair))
            except WorkerError as error:
                if _version() is None:
                    missing = {"expected": "the package math-verify", "received": "no such package"}
                    raise InputError("grader math", **missing, hint="pip install 'dgd-lightning[math]'") from error
                return Score(None, [], f"math_error: {error}", details)
            equal = bool(read["equal"])
            details["compared"] = {key: value for key, value in read.items() if key != "equal"}
            if read.get("gold") == "":
                return Score(None, [], f"math_error: math-verify can't read the gold result {gold}", details)
            if "error" in read:
                return Score(0.0, [], f"not comparable with {gold}: {read['error']}", details)
        return Score(float(equal), [], f"{found.text} is {'' if equal else 'not '}{gold}", details)

    def remarks(self, row: dict[str, Any], answer: str, score: Score) -> dict[str, Any]:
        """See `Grader.remarks`; ``lm_eval``: of GSM8K, what lm-evaluation-harness says of the answer."""
        return {"lm_eval": harness_verdicts(answer, row["answer"])} if _is_gsm8k(row) else {}

    def fingerprint(self) -> dict[str, Any]:
        rules = content_key(*(path.read_text("utf-8") for path in RULES))
        return {"grader": self.name, "rules": rules, "math_verify": _version(), "seconds": self.pool.seconds}

    def close(self) -> None:
        self.pool.close()


def _version() -> str | None:
    try:
        return importlib.metadata.version("math-verify")
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_gsm8k(row: dict[str, Any]) -> bool:
    return isinstance(row.get("question"), str) and "####" in str(row["answer"])


def _is_math(row: dict[str, Any]) -> bool:
    source = str(row.get("source") or "").lower()
    return isinstance(row.get("problem"), str) or (row.get("prompt") is not None and source.startswith("math"))


def _same(gold: str, found: str) -> bool | None:
    """The verdict on normalised results where it takes no mathematics; None where it does."""
    if "".join(gold.split()) == "".join(found.split()):
        return True
    number, other = plain_number(gold), plain_number(found)
    if number is not None and other is not None:
        return number == other
    if {in_brackets(gold), in_brackets(found)} in ({"(", ","}, {"(", "\\{"}):
        return False
    return None
