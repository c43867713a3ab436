"""Runs of the command in processes that are killed, or whose disk is full, at random moments.

A fork server has imported everything, so that a run takes a second or two and not ten.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch

import dgd_lightning.commands.lightning
import dgd_lightning.scoring.judge_client  # noqa: F401
from dgd_lightning.cli import main

torch.set_num_threads(1)
gc.freeze()  # a child's collections would look through all that the server has imported, and so copy it
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
                process.join(self.rng.uniform(0.02, 1.1) * seconds)
                if process.is_alive():
                    assert process.pid is not None
                    with suppress(ProcessLookupError):  # it ended meanwhile
                        os.killpg(process.pid, signal.SIGKILL)
            process.join(120)
            code = process.exitcode
            assert code is not None, "the command hangs"
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


def start(command: Command, room: int | None = None) -> BaseProcess:
    """The command in a process of its own group."""
    command.said.unlink(missing_ok=True)
    process = _server().Process(target=_child, args=(command.argv, str(command.said), room, dict(os.environ)))
    process.start()
    while not command.said.exists() and process.is_alive():
        time.sleep(0.002)
    return process


def timed(command: Command) -> float:
    """Seconds of the command without faults."""
    stored = time.monotonic()
    process = start(command)
    process.join(300)
    assert process.exitcode == 0, command.said.read_text()
    return time.monotonic() - stored


def _child(argv: list[str], said: str, room: int | None, environment: dict[str, str]) -> None:
    os.setsid()
    os.environ.update(environment)  # the server has that of the first test
    out = os.open(said, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    if room is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    code = main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@cache
def _server() -> Any:
    """The fork server; it imports this module, and the path to it comes from the environment alone."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), before]))
    try:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["fault_tools"])
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return context
