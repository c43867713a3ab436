"""JSON Lines on the disk: one object a line, appended under a lock; a line that a kill left torn is no line."""

import contextlib
import fcntl
import hashlib
import json
import os
import select
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from dgd_lightning.errors import InputError

LOOK_BACK = 65536  # bytes


class Line(NamedTuple):
    """One whole line of a file."""

    offset: int
    text: bytes  # with its end


def encoded(record: dict[str, Any]) -> bytes:
    """A record's line; lone surrogates become ``\\udXXX``."""
    return json.dumps(record, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def content_key(*parts: Any) -> str:
    """A hash of JSON-able parts; what JSON can't hold counts as its text."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def lines(path: str | os.PathLike[str], start: int = 0) -> Iterator[Line]:
    """Whole lines of a file from a byte on; a last one without its end may still be being written and is left out."""
    with Path(path).open("rb") as file:
        file.seek(start)
        for text in file:
            if not text.endswith(b"\n"):
                return
            yield Line(start, text)
            start += len(text)


def reply(pipe: IO[bytes] | None, seconds: float) -> dict[str, Any] | None:
    """The next line that another process writes; None where it ends, or has none in time."""
    assert pipe is not None
    deadline, line = time.monotonic() + seconds, b""
    while not line.endswith(b"\n"):
        if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return None
        byte = os.read(pipe.fileno(), 1)  # no more, for what follows the line stays in the pipe
        if not byte:
            return None
        line += byte
    return dict(json.loads(line))


@contextlib.contextmanager
def reported(path: str | os.PathLike[str], argument: str) -> Iterator[None]:
    """The system's errors about a file as the one-line error."""
    try:
        yield
    except OSError as error:
        raise InputError(
            argument,
            expected="a file that can be read and written",
            received=f"{path} ({error.strerror or type(error).__name__})",
            hint="make room, or check the path and its permissions; the same command continues",
        ) from error


def held(path: str | os.PathLike[str]) -> bool:
    """Whether a process has opened the file with `JsonLines` for itself alone."""
    try:
        with Path(path).open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file, or a file system without locks
        return False
    return False


class JsonLines:
    """A file that records are appended to; they are on the disk when `append` returns.

    By default this process has the file for itself until it closes it: opening waits for another one that holds it, and
    a torn last line is cut off. A shared file is locked while it is written, and a torn line in it is closed, so that
    nothing that is there is ever changed. Errors call the file ``argument``, or by its path.
    """

    def __init__(self, path: str | os.PathLike[str], *, argument: str | None = None, shared: bool = False) -> None:
        self.path, self.shared = Path(path), shared
        self._argument = argument or str(path)
        self._file = self.path.open("a+b", buffering=0)
        if not shared:
            self._lock(fcntl.LOCK_EX)
            self._repair()

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Append records in one go; raises InputError where they can't be written: what was written before is whole."""
        new = b"".join(map(encoded, records))
        if not new:
            return
        with reported(self.path, self._argument):
            if self.shared:
                self._lock(fcntl.LOCK_EX)
            try:
                rest = memoryview(self._repair() + new)
                while rest:
                    rest = rest[os.write(self._file.fileno(), rest) :]
                os.fsync(self._file.fileno())
            finally:
                if self.shared:
                    self._lock(fcntl.LOCK_UN)

    def close(self) -> None:
        """Let go of the file and of its lock."""
        self._file.close()

    def _lock(self, operation: int) -> None:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(self._file, operation)

    def _repair(self) -> bytes:
        """Cuts a torn last line off; of a shared file it gives what closes one."""
        number = self._file.fileno()
        end = position = os.fstat(number).st_size
        if end == 0 or os.pread(number, 1, end - 1) == b"\n":
            return b""
        if self.shared:
            return b"\n"
        while position > 0:
            start = max(0, position - LOOK_BACK)
            newline = os.pread(number, position - start, start).rfind(b"\n")
            if newline >= 0:
                position = start + newline + 1
                break
            position = start
        os.ftruncate(number, position)
        return b""
