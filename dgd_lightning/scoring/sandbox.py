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
    """One running command; `end` it."""

    def __init__(self, warden: subprocess.Popen[bytes], folder: tempfile.TemporaryDirectory[str] | None) -> None:
        self.warden, self.folder = warden, folder

    def started(self) -> None:
        """Wait until the command runs, or raise SandboxError."""
        words = reply(self.warden.stdout, START_SECONDS) or {}
        if "started" not in words:
            raise SandboxError(words.get("error", "the sandbox's warden has ended"))

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
        if self.folder is not None:
            self.folder.cleanup()
        return str(words.get("end", "unknown"))


class Sandbox:
    """Starts programs of the folder `jail/`; safe to use from several threads. For arguments see `CodeGrader`."""

    def __init__(self, limits: Limits, *, namespaces: bool | None = None) -> None:
        self.limits = limits
        self._namespaces = namespaces
        self._reason = "switched off" if namespaces is False else ""
        self._lock = threading.Lock()

    @property
    def isolation(self) -> dict[str, Any]:
        """What is shut off; for people and for the fingerprint."""
        on = self._allowed()
        words: dict[str, Any] = dict.fromkeys(("network", "processes", "files"), on)
        return words if on else words | {"reason": self._reason}

    def start(self, script: str, sockets: list[socket.socket], *, namespaces: bool | None = None) -> Cell:
        """Start a script of `jail/`; its descriptors 3, 4 … are the sockets. Call `Cell.started` next."""
        namespaces = self._allowed() if namespaces is None else namespaces
        folder = None
        if not namespaces:
            folder = tempfile.TemporaryDirectory(prefix="dgd-", ignore_cleanup_errors=True)
            os.chmod(folder.name, 0o777)  # nobody's too; the name is secret enough for a folder of scratch files
        prefixes = [str(Path(path).resolve()) for path in (sys.prefix, sys.base_prefix)]
        python = Path(prefixes[0], Path(sys.executable).resolve().parent.name, Path(sys.executable).name)
        packages = str(Path(sysconfig.get_path("purelib")).resolve())
        home = "/sandbox" if folder is None else folder.name
        numbers = [each.fileno() for each in sockets]
        executable = str(python if python.exists() else sys.executable)
        order = {
            # -P, -S: neither the script's folder nor start-up files of packages
            "argv": [executable, "-P", "-S", "-B", str(JAIL / script), packages],
            "env": {
                "HOME": home,
                "TMPDIR": home,
                "PATH": "/usr/bin:/bin",
                "LANG": "C.UTF-8",
                "PYTHONHASHSEED": "0",  # the order of a set is the same in every run
                "OMP_NUM_THREADS": "1",
                "OPENBLAS_NUM_THREADS": "1",
            },
            "fds": numbers,
            "namespaces": namespaces,
            "visible": [*SYSTEM, *prefixes, str(JAIL)],
            "folder": folder and folder.name,
            **self.limits._asdict(),
        }
        warden = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(JAIL / "enter.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=numbers,
            env={"PATH": "/usr/bin:/bin"},
            cwd="/",
            start_new_session=True,
        )
        assert warden.stdin is not None
        with contextlib.suppress(OSError):  # it died: `started` says so
            warden.stdin.write(json.dumps(order).encode() + b"\n")
            warden.stdin.flush()
        return Cell(warden, folder)

    def _allowed(self) -> bool:
        with self._lock:
            if self._namespaces is None:
                mine, other = socket.socketpair()
                with mine, other:
                    cell = self.start("candidate.py", [other], namespaces=True)
                    try:
                        cell.started()
                        self._namespaces = True
                    except SandboxError as error:
                        self._namespaces, self._reason = False, str(error)
                    finally:
                        cell.end()
            return self._namespaces
