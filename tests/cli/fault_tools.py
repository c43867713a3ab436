"""Runs of the command in processes that are killed, or whose disk is full, at random moments."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import TimeoutExpired
from typing import NamedTuple

from fork_server import Launched, launch

LEAST_ROOM = 6_000  # bytes of a file that a full disk still takes: what is printed must fit

Files = Callable[[], list[Path]]  # that a killed machine may leave torn


class Command(NamedTuple):
    """A command that is run until it succeeds."""

    argv: list[str]
    said: Path  # stdout and stderr go there
    torn: Files
    room: int  # a full disk's files end before that many bytes


@dataclass
class Weather:
    """Random faults, counted."""

    rng: random.Random
    faults: Counter[str] = field(default_factory=Counter)
    unclear: list[str] = field(default_factory=list)  # what a full disk made of a run that did not say so in one line

    def run(self, command: Command, seconds: float) -> None:
        """Runs a command again and again, with less and less faults, until it succeeds.

        Args:
            command: the command.
            seconds: that it takes without faults.
        """
        for attempt in range(100):
            kind = self.rng.choices(["kill", "disk", "none"], [6, 2, 1 + attempt // 3])[0]
            room = self.rng.randint(LEAST_ROOM, command.room) if kind == "disk" else None
            process = start(command, room)
            if kind == "kill":
                try:
                    process.wait(self.rng.uniform(0.02, 1.1) * seconds)
                except TimeoutExpired:
                    with suppress(ProcessLookupError):  # it ended meanwhile
                        os.killpg(process.pid, signal.SIGKILL)
            code = process.wait(120)
            if code == 0:
                return
            said = command.said.read_text(errors="replace")
            if code == -signal.SIGKILL:
                self.faults["kill"] += 1
            else:
                assert kind == "disk", said
                self.faults["disk"] += 1
                if code != 2 or "Traceback" in said or "File too large" not in said:
                    self.unclear.append(said)
            if self.rng.random() < 0.5:
                self.tear(command.torn())
        raise AssertionError("a hundred runs, and none came to its end")

    def tear(self, files: Sequence[Path]) -> None:
        """Takes some of a file's last bytes, as a machine that fails may: of its last line, or of the next one."""
        full = [path for path in files if path.exists() and path.stat().st_size]
        if not full:
            return
        path = self.rng.choice(full)
        data = path.read_bytes()
        last = data[data[:-1].rfind(b"\n") + 1 :]
        if self.rng.random() < 0.5:
            path.write_bytes(data[: len(data) - self.rng.randint(1, len(last))])
        elif data.endswith(b"\n"):  # a line that was being written
            path.write_bytes(data + last[: self.rng.randint(1, len(last) - 1)])
        self.faults["torn line"] += 1


def start(command: Command, room: int | None = None) -> Launched:
    """The command in a process of its own group."""
    with command.said.open("wb") as said:
        return launch(*command.argv, stdout=said, stderr=said, room=room)


def timed(command: Command) -> float:
    """Seconds of the command without faults."""
    started = time.monotonic()
    assert start(command).wait(300) == 0, command.said.read_text()
    return time.monotonic() - started
