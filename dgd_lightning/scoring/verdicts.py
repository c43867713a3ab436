"""Verdicts on the disk: one JSON line each, found by the hash of what was asked; several processes may share a file."""

import contextlib
import json
import os
import threading
from pathlib import Path
from typing import Any

from dgd_lightning.grader import ERROR_CLASSES
from dgd_lightning.jsonl import JsonLines, lines, reported


class VerdictFile:
    """Appends records and finds them again; safe for threads, for other processes, and against kills.

    A record is on the disk when `put` returns. A line that a kill left torn is closed by the next write, and read as
    nothing; so its question is asked again and no other one is.

    Args:
        path: made if missing.
        argument: what errors call it.

    Raises:
        InputError: the file can't be opened for writing.
    """

    def __init__(self, path: str | os.PathLike[str], argument: str) -> None:
        self.path, self.argument = Path(path).expanduser(), argument
        self._lock = threading.Lock()
        self._found: dict[str, dict[str, Any]] = {}
        self._read_to = 0
        with reported(self.path, self.argument):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = JsonLines(self.path, argument=argument, shared=True)

    def get(self, key: str) -> dict[str, Any] | None:
        """The record of a key, those that other processes wrote meanwhile included; None where there is none."""
        with self._lock, reported(self.path, self.argument):
            if key not in self._found:
                self._read_on()
            return self._found.get(key)

    def put(self, key: str, record: dict[str, Any]) -> dict[str, Any]:
        """Store a record; returns the one that counts, the first of its key.

        Args:
            key: of `jsonl.content_key`.
            record: JSON-able, with ``rationale``, and with ``score`` and ``status`` or with ``error_class``.

        Raises:
            InputError: it can't be written.
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
