"""Starts the command and small programs by forking a server that has imported everything, in a hundredth of the time.

The server is forked from the tests' own process before the first test, so no test has changed anything in it.
:func:`launch` has it fork a child in a process group of its own; ranks that Lightning launches are forked likewise,
into the group of the first.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import json
import logging
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

REAP_SECONDS = 0.01  # how often the server looks for children that have ended, while there are some


class _Server(NamedTuple):
    pid: int
    folder: Path
    lifeline: socket.socket  # the server ends when the other end is closed, however the tests end

    @property
    def address(self) -> str:
        return str(self.folder / "server")


class _Child(NamedTuple):
    client: socket.socket  # its exit code is sent there
    group: int


_server: _Server | None = None


class Launched:
    """A process that the server forked, with what the tests use of :class:`subprocess.Popen`."""

    def __init__(self, request: dict[str, Any], out: IO[bytes] | None, err: IO[bytes] | None) -> None:
        assert _server is not None, "the fork server was not started: see tests/conftest.py"
        self.returncode: int | None = None
        # Files, not pipes: a child never waits for its reader.
        self._out, self._err = (given or tempfile.TemporaryFile() for given in (out, err))  # noqa: SIM115
        self._server = socket.socket(socket.AF_UNIX)
        self._server.connect(_server.address)
        socket.send_fds(self._server, [b"!"], [self._out.fileno(), self._err.fileno()])
        self._server.sendall(json.dumps(request).encode() + b"\n")
        self._replies = self._server.makefile("rb")
        self.pid = self._reply()

    def _reply(self) -> int:
        line = self._replies.readline()
        assert line, "the fork server has ended"
        return int(line)

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._server], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, negative where a signal ended the process.

        Raises:
            subprocess.TimeoutExpired: it has not ended after so many seconds.
        """
        if self.returncode is None:
            if not select.select([self._server], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("launched", timeout or 0)
            self.returncode = self._reply()
            self._replies.close()
            self._server.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits for the end; what was written to stdout and stderr where those were not given."""
        self.wait(timeout)
        out, err = (os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0) for file in (self._out, self._err))
        return out.decode(errors="replace"), err.decode(errors="replace")


def launch(
    *argv: str | Path,
    code: str | None = None,
    env: Mapping[str, str] | None = None,
    stdout: IO[bytes] | None = None,
    stderr: IO[bytes] | None = None,
    room: int | None = None,
) -> Launched:
    """Forks ``dgd ARGV``.

    Args:
        argv: the command's arguments.
        code: a program that is run with these arguments in place of the command.
        env: environment; None takes this process's.
        stdout: a file that is written to; None keeps what is written for ``communicate``.
        stderr: likewise.
        room: bytes that a file may hold at most, as on a full disk.
    """
    request = {
        "argv": [str(argument) for argument in argv],
        "code": code,
        "env": dict(os.environ if env is None else env),
        "folder": os.getcwd(),
        "room": room,
    }
    return Launched(request, stdout, stderr)


def launched(*argv: str | Path, timeout: float = 300, **settings: Any) -> subprocess.CompletedProcess[str]:
    """:func:`launch`, and its end."""
    child = launch(*argv, **settings)
    out, err = child.communicate(timeout)
    return subprocess.CompletedProcess(list(argv), child.wait(), out, err)


def start() -> None:
    """Forks the server. Nothing is imported for it until a test launches something."""
    global _server
    folder = Path(tempfile.mkdtemp(prefix="fork-server-"))
    ours, theirs = socket.socketpair()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "server"))
    listener.listen(64)
    pid = os.fork()
    _server = _Server(pid, folder, ours)
    if pid == 0:
        ours.close()
        try:
            _serve(listener, theirs)
        finally:  # whatever happens, the tests are not run a second time
            os._exit(0)
    listener.close()
    theirs.close()


def stop() -> None:
    """Ends the server and all that it has forked."""
    global _server
    if _server is not None:
        _server.lifeline.close()
        os.waitpid(_server.pid, 0)
        shutil.rmtree(_server.folder, ignore_errors=True)
        _server = None


def _serve(listener: socket.socket, lifeline: socket.socket) -> None:
    children: dict[int, _Child] = {}
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests' process
    while True:
        ready, _, _ = select.select([listener, lifeline], [], [], REAP_SECONDS if children else None)
        if lifeline in ready:
            for child in children.values():
                with suppress(ProcessLookupError):
                    os.killpg(child.group, signal.SIGKILL)
            return
        if listener in ready:
            client, _ = listener.accept()
            _, fds, _, _ = socket.recv_fds(client, 1, 2)
            with client.makefile("rb") as lines:
                request = json.loads(lines.readline())
            _import_everything()
            pid = os.fork()
            if pid == 0:
                for other in (listener, lifeline, client, *(child.client for child in children.values())):
                    other.close()
                _become(request, *fds)
            for fd in fds:
                os.close(fd)
            group = request.get("group", pid)
            with suppress(OSError):  # the child may have been quicker, or ended already
                os.setpgid(pid, group)
            children[pid] = _Child(client, group)
            client.sendall(b"%d\n" % pid)
        while children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            with suppress(OSError), children.pop(pid).client as client:  # a test may have gone without its child
                client.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))


@cache
def _import_everything() -> None:
    gc.disable()
    import torch

    import dgd_lightning.scoring.judge_client  # noqa: F401
    from dgd_lightning.commands.lightning import import_plugins

    torch.set_num_threads(1)  # no pool of threads may be there when a child is forked
    import_plugins()
    gc.freeze()  # a child's collections would look through all that is imported, and so copy it


def _become(request: dict[str, Any], out: int, err: int) -> NoReturn:
    """Turns the forked process into a fresh interpreter, as far as programs can tell, and runs the program."""
    code = 1
    try:
        _set_up(request, out, err)
        code = _main(request)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    with suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    with suppress(BaseException):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _set_up(request: dict[str, Any], out: int, err: int) -> None:
    with suppress(OSError):
        os.setpgid(0, request.get("group", 0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    for fd, standard in ((nothing, 0), (out, 1), (err, 2)):
        os.dup2(fd, standard)
        os.close(fd)
    sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace")
    faulthandler.enable(sys.stderr)
    for number in (signal.SIGTERM, signal.SIGALRM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.path[:0] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in sys.path]
    if request["room"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["room"], resource.RLIM_INFINITY))

    # What pytest has set, and what packages read when they were imported.
    atexit._clear()
    sys.excepthook, sys.unraisablehook = sys.__excepthook__, sys.__unraisablehook__
    threading.excepthook = threading.__excepthook__
    _log_to_stderr()
    from huggingface_hub import constants
    from lightning.fabric.utilities import rank_zero

    rank_zero.rank_zero_only.rank = rank_zero._get_rank() or 0
    constants.HF_HUB_CACHE = os.environ.get("HF_HUB_CACHE", constants.HF_HUB_CACHE)
    _fork_ranks(request)
    gc.enable()


def _log_to_stderr() -> None:
    """Handlers wrote to what pytest captured; Lightning makes its own only where the root logger has none."""
    logging.getLogger().handlers.clear()
    for name in list(logging.root.manager.loggerDict):
        logger = logging.getLogger(name)
        if name in ("lightning.pytorch", "lightning.fabric"):
            logger.handlers = [logging.StreamHandler()]
            logger.propagate = False
        for handler in logger.handlers:
            if type(handler) is logging.StreamHandler:
                handler.setStream(sys.stderr)


def _fork_ranks(request: dict[str, Any]) -> None:
    """Lightning starts rank 0's command again for each further rank: the server forks it."""
    from lightning.pytorch.strategies.launchers import subprocess_script

    group = request.get("group", os.getpid())

    class Ranks:
        @staticmethod
        def Popen(command: Sequence[str], env: Mapping[str, str], cwd: str | None) -> Launched:
            sys.stdout.flush()
            changed = {"env": dict(env), "folder": cwd or os.getcwd(), "group": group}
            return Launched({**request, **changed}, sys.stdout.buffer, sys.stderr.buffer)

    subprocess_script.subprocess = Ranks  # type: ignore[attr-defined]


def _main(request: dict[str, Any]) -> int:
    sys.argv = ["dgd", *request["argv"]]
    if request["code"] is not None:
        exec(compile(request["code"], "<launched>", "exec"), {"__name__": "__main__"})
        return 0
    from dgd_lightning.cli import main

    return main()
