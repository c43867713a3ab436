"""SIGTERM ends a run as Ctrl-C does, for certain."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = "dgd: interrupted; the same command continues an unfinished predict, score or diagnostic run"
TERMINATED = 128 + signal.SIGTERM
END_SECONDS = 5.0  # from SIGTERM to an end without ceremony


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does. (Lightning notes it, and looks at the note in fits alone.)

    Python drops what a handler raises amid a destructor or a callback of the collector, so a process that is still in
    the block some seconds later is left as it is: rows are on the disk as soon as they are made.
    """
    timers: list[threading.Timer] = []

    def leave() -> None:
        print(INTERRUPTED.replace("interrupted", "terminated"), file=sys.stderr, flush=True)
        os._exit(TERMINATED)

    def end(*_: object) -> None:
        timers.append(threading.Timer(END_SECONDS, leave))
        timers[-1].daemon = True
        timers[-1].start()
        raise SystemExit(TERMINATED)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        for timer in timers:
            timer.cancel()
