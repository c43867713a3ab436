"""`Sandbox`: interpreters for code that nobody has read, with namespaces, limits and a watch over all of it.

What the kernel allows is tried once. With namespaces (Linux, as root or where user namespaces are allowed) a program
sees no network, no process but its own, no /proc, no file but the system's and Python's own (read-only), and one small
folder in memory; everything it started ends with it. Where we are root, it runs as nobody.

Without (macOS, most unprivileged containers) there remain limits of processor time, address space, file size,
processes and open files, an environment without keys, a folder of its own, and the killing of all descendants: a
program that means harm can then read and delete the user's files, kill the user's processes and use the network.
`Sandbox.isolation` says what holds.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
from pathlib import Path
from typing import Any, NamedTuple

from dgd_lightning.jsonl import reply

JAIL = Path(__file__).resolve().parent / "jail"
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache", "/etc/alternatives")
START_SECONDS = 60.0  # for an interpreter to start on a busy machine
END_SECONDS = 10.0


class SandboxError(RuntimeError):
    """The sandbox itself could not be set up; no verdict on any program."""


class Limits(NamedTuple):
    """What a program may use."""

    cpu_seconds: int = 15  # of every process; decides on slow programs, for it counts alike on a busy machine
    wall_seconds: float = 90.0  # of a program and its tests together
    memory_mb: int = 1024  # address space of every process, and what all together may hold
    processes: int = 32  # threads count
    disk_mb: int = 64


class Cell:
    """One running program; `end` it.

    Attributes:
        channel: a socket; the program has the other end as its descriptor 3.
    """

    def __init__(
        self, warden: subprocess.Popen[bytes], channel: socket.socket, folder: tempfile.TemporaryDirectory[str] | None
    ) -> None:
        self.warden, self.channel, self.folder = warden, channel, folder

    def end(self) -> str:
        """Kill everything that is left of it.

        Returns:
            Why it ended: "exit", "exit code N", "signal N", "released" (it still ran), a limit ("cpu time", "wall
            time", "memory", "processes", "disk"), or "unknown" (the warden was killed).
        """
        with self.warden:  # its pipes are closed then, and it is waited for
            assert self.warden.stdin is not None
            with contextlib.suppress(OSError):
                self.warden.stdin.close()
            words = reply(self.warden.stdout, END_SECONDS) or {}
            with contextlib.suppress(OSError):
                if self.warden.poll() is None and "end" not in words:
                    os.killpg(self.warden.pid, 9)
        self.channel.close()
        if self.folder is not None:
            self.folder.cleanup()
        return str(words.get("end", "unknown"))


class Sandbox:
    """Starts interpreters that run `jail/runner.py`; safe to use from several threads.

    Args:
        limits: of each program.
        namespaces: False does without them; None uses them where the kernel allows.
    """

    def __init__(self, limits: Limits, *, namespaces: bool | None = None) -> None:
        self.limits = limits
        self._namespaces = namespaces
        self._reason = "switched off" if namespaces is False else ""
        self._lock = threading.Lock()

    @property
    def isolation(self) -> dict[str, Any]:
        """What is shut off; for people and for the fingerprint."""
        with self._lock:
            if self._namespaces is None:
                try:
                    self._start(namespaces=True).end()
                    self._namespaces = True
                except SandboxError as error:
                    self._namespaces, self._reason = False, str(error)
        words: dict[str, Any] = dict.fromkeys(("network", "processes", "files"), self._namespaces)
        return words if self._namespaces else words | {"reason": self._reason}

    def start(self) -> Cell:
        """Start one; raises SandboxError where that fails."""
        return self._start(namespaces=self.isolation["processes"])

    def _start(self, *, namespaces: bool) -> Cell:
        folder = None
        if not namespaces:
            folder = tempfile.TemporaryDirectory(prefix="dgd-", ignore_cleanup_errors=True)
            os.chmod(folder.name, 0o777)  # nobody's too; the name is secret enough for a folder of scratch files
        prefixes = [str(Path(path).resolve()) for path in (sys.prefix, sys.base_prefix)]
        python = Path(prefixes[0], Path(sys.executable).resolve().parent.name, Path(sys.executable).name)
        packages = str(Path(sysconfig.get_path("purelib")).resolve())
        home = "/sandbox" if folder is None else folder.name
        executable = str(python if python.exists() else sys.executable)
        channel, other = socket.socketpair()
        environment = {
            "HOME": home,
            "TMPDIR": home,
            "PATH": "/usr/bin:/bin",
            "LANG": "C.UTF-8",
            "PYTHONHASHSEED": "0",  # the order of a set is the same in every run
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        order = {
            "channel": other.fileno(),
            "namespaces": namespaces,
            "visible": [*SYSTEM, *prefixes, str(JAIL)],
            "folder": folder and folder.name,
            **self.limits._asdict(),
        }
        with other:
            warden = subprocess.Popen(
                # -P, -S: neither the script's folder nor start-up files of packages
                [executable, "-P", "-S", str(JAIL / "enter.py"), packages],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=[other.fileno()],
                env=environment,
                cwd="/",
                start_new_session=True,
            )
        cell = Cell(warden, channel, folder)
        assert warden.stdin is not None
        with contextlib.suppress(OSError):  # it died: there is no reply
            warden.stdin.write(json.dumps(order).encode() + b"\n")
            warden.stdin.flush()
        words = reply(warden.stdout, START_SECONDS) or {"error": "the sandbox's warden has ended"}
        if "started" not in words:
            cell.end()
            raise SandboxError(words["error"])
        return cell
