"""`MathPool`: worker processes that compare results; one that takes too long ends, and another takes its place."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("math_worker.py")
PATIENCE = 20
START_SECONDS = 120.0  # to import sympy on a busy machine
LIVES = 3  # workers that are tried for one comparison while somebody kills them
CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL}  # what an input may do to it


class WorkerError(RuntimeError):
    """A worker can't be started or kept alive; no verdict on any answer."""


class MathPool:
    """At most ``size`` workers; safe to use from several threads.

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
                reply = self._ask(json.dumps({"gold": gold, "answer": answer}).encode() + b"\n")
                if reply is not None:
                    return reply
        raise WorkerError(f"{LIVES} workers with math-verify were killed from outside, one after the other")

    def _ask(self, question: bytes) -> dict[str, Any] | None:
        """A worker's reply; None where it was killed from outside."""
        worker = self._idle.pop() if self._idle else self._start()
        reply, late = None, False
        try:
            assert worker.stdin is not None
            worker.stdin.write(question)
            worker.stdin.flush()
            reply = _line(worker, PATIENCE * self.seconds)
            late = reply is None and not _ended(worker)
        except BrokenPipeError:  # it died while it was idle
            _kill(worker)
            return None
        except BaseException:
            _kill(worker)
            raise
        if reply is not None:
            self._idle.append(worker)
            return reply
        _kill(worker)  # it may be dead already; then its first reason counts
        if late or worker.returncode == -signal.SIGPROF:
            return {"equal": False, "error": f"no result in {self.seconds:g} s"}
        own = worker.returncode > 0 or -worker.returncode in CRASHES
        return {"equal": False, "error": "the worker ended"} if own else None

    def close(self) -> None:
        """End the idle workers."""
        while self._idle:
            _kill(self._idle.pop())

    def _start(self) -> subprocess.Popen[bytes]:
        worker = subprocess.Popen(
            [
                sys.executable,
                "-P",
                str(WORKER),
                str(self.memory_mb),
                str(self.seconds),
            ],  # -P: hides `code.py` beside it
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )
        if _line(worker, START_SECONDS) is None:
            _kill(worker)
            raise WorkerError("a worker with math-verify does not start: try `python -c 'import math_verify'`")
        return worker


def _line(worker: subprocess.Popen[bytes], seconds: float) -> dict[str, Any] | None:
    """The worker's next line, or None where it ends or takes too long."""
    assert worker.stdout is not None
    number, deadline, line = worker.stdout.fileno(), time.monotonic() + seconds, b""
    while not line.endswith(b"\n"):
        if not select.select([number], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return None
        piece = os.read(number, 1 << 16)
        if not piece:
            return None
        line += piece
    return dict(json.loads(line))


def _ended(worker: subprocess.Popen[bytes]) -> bool:
    """Whether it ends by itself; the end of its pipe is seen a moment before its own."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        worker.wait(1.0)
    return worker.returncode is not None


def _kill(worker: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        worker.kill()
    worker.wait()
    for pipe in (worker.stdin, worker.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
