"""Rows of JSON, JSONL (plain or gzipped) and text files, and of `datasets`, each with its place for one-line errors."""

import contextlib
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from dgd_lightning.errors import InputError
from dgd_lightning.types import Task

# What an earlier run or its scores wrote into a row: a new answer must not carry it on.
STALE = ("model_output", "score", "requirement_status", "grading_rationale", "dgd")
SOURCE = "data.path"  # what users call it


class Row(NamedTuple):
    """A row and its place, for messages: ``data.path line 3``."""

    place: str
    number: int  # line or item number, from 1
    value: dict[str, Any]


def require_file(path: Path) -> None:
    """Raises InputError where there is no such file."""
    if path.is_dir():
        raise InputError(SOURCE, expected="a file", received=f"the folder {path}", hint="name a file in it")
    if not path.is_file():
        raise InputError(SOURCE, expected="an existing file", received=path, hint="check the path")


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of a text file, gunzipped where its name ends in ``.gz``, numbered from 1; blank ones left out."""
    require_file(path)
    found, opened = False, gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig") as file:  # the byte order mark of Windows' editors is no text
            for number, line in enumerate(file, 1):
                if line.strip():
                    found = True
                    yield number, line.rstrip("\n")
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(SOURCE, expected="a readable file", received=f"{path} ({error})", hint="check it") from error
    except UnicodeDecodeError as error:
        raise InputError(
            SOURCE,
            expected="UTF-8 text",
            received=f"{path} ({error.reason} at byte {error.start})",
            hint="convert the file to UTF-8",
        ) from error
    if not found:
        raise InputError(SOURCE, expected="at least one row", received=f"the empty file {path}", hint="check the file")


def read_jsonl(path: Path) -> Iterator[Row]:
    """Objects of a JSONL file, one a line."""
    for number, line in read_lines(path):
        yield _row("line", number, _parse(line, f"{SOURCE} line {number}"))


def read_prompt_rows(path: Path) -> Iterable[Row]:
    """Rows of a prompts file by the end of its name; a text file gives rows with the one field ``prompt``."""
    kind = Path(path.name.removesuffix(".gz")).suffix.lower()
    if kind == ".jsonl":
        return read_jsonl(path)
    if kind == ".json":
        items = _parse("\n".join(line for _, line in read_lines(path)), SOURCE)
        if not isinstance(items, list) or not items:
            wanted, received = "a JSON array of objects", f"{_kind(items)} in {path}"
            raise InputError(SOURCE, expected=wanted, received=received, hint="use one array, or JSONL")
        return (_row("item", number, item) for number, item in enumerate(items, 1))
    return (_row("line", number, {"prompt": line}) for number, line in read_lines(path))


class HubRows(NamedTuple):
    """Rows of a `datasets` id or folder."""

    rows: Iterator[Row]
    commit: str | None  # that the id's revision stands for; None for a folder


def load_rows(
    path: str,
    *,
    split: str,
    revision: str | None,
    name: str | None = None,
    streaming: bool = False,
    limit: int | None = None,
) -> HubRows:
    """Rows of ``datasets.load_dataset(path, name, split=…)``, and the commit that they are of.

    Code of a data set is never run. Offline, `datasets` takes whichever commit is cached last, whatever the revision:
    one that was asked for and is not that commit is refused.
    """
    import datasets

    asked = f"{path!r}, name {name!r}, split {split!r}"
    with _loading(asked):
        builder = datasets.load_dataset_builder(path, name, revision=revision)
    commit = builder.hash if re.fullmatch("[0-9a-f]{40}", str(builder.hash)) else None  # else a hash of local files
    if revision not in (None, commit) and type(builder).__name__ == "Cache":
        raise InputError(
            "data.revision",
            expected=f"the cached commit {commit}, as the Hub can't be reached to look up another",
            received=revision,
            hint="go online, or set data.revision to that commit",
        )

    def rows() -> Iterator[Row]:
        with _loading(asked):
            if streaming:
                data = builder.as_streaming_dataset(split=split)
            else:
                builder.download_and_prepare()
                data = builder.as_dataset(split=split)
            for number, row in enumerate(islice(data, limit), 1):
                yield _row("row", number, dict(row))

    return HubRows(rows(), commit)


@contextlib.contextmanager
def _loading(asked: str) -> Iterator[None]:
    """Brings what can go wrong, of dozens of kinds (the library's own, the file system's, the net's), into one."""
    try:
        yield
    except Exception as error:
        raise InputError(
            SOURCE,
            expected="a `datasets` id or folder with this name, split and revision",
            received=f"{asked}: {type(error).__name__}: {str(error)[:200]}",
            hint="check the id and the split, log in for gated data, or download it and give a file or a folder",
        ) from error


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            place,
            expected="valid JSON",
            received=f"{error.msg} at column {error.colno}: {text[:60]!r}",
            hint="correct the line",
        ) from error
    except (ValueError, RecursionError) as error:  # Python's own limits: digits of an integer, depth of nesting
        raise InputError(
            place,
            expected="JSON that Python reads: integers of at most 4300 digits, nested a few hundred levels deep",
            received=f"{error}: {text[:60]!r}",
            hint="write long numbers as text, and nest less",
        ) from error


def _row(unit: str, number: int, value: Any) -> Row:
    place = f"{SOURCE} {unit} {number}"
    if not isinstance(value, dict):
        raise InputError(place, expected="a JSON object", received=_kind(value), hint="write one object a row")
    return Row(place, number, value)


def _kind(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


def field(row: Row, path: str, kind: type | tuple[type, ...], what: str) -> Any:
    """The value at a dotted path of a row, which must be of this kind; ``what`` says it in words."""
    value: Any = row.value
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            keys = ", ".join(map(str, value)) if isinstance(value, dict) else _kind(value)
            raise InputError(
                row.place,
                expected=f"the field {path!r}",
                received=f"fields {keys}"[:200],
                hint="add the field, or name another one",
            )
        value = value[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InputError(row.place, expected=f"{path!r} to be {what}", received=_kind(value), hint="correct the field")
    return value


def carried(row: Row) -> dict[str, Any]:
    """What predictions carry on of a row: all but what an earlier run wrote; JSON must be able to hold it."""
    kept = {key: value for key, value in row.value.items() if key not in STALE}
    for key, value in kept.items():
        try:
            json.dumps({key: value})
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(
                row.place,
                expected=f"a value that JSON can hold in {key!r}",
                received=f"{_kind(value)} ({error})",
                hint="save the rows as JSONL without that field, or with it as text, and give that file",
            ) from error
    return kept


def tasks_of(rows: Iterable[Row], parse: Callable[[Row], Task], what: str) -> list[Task]:
    """The rows' tasks; raises InputError where an id, which ``what`` describes, comes twice."""
    tasks: list[Task] = []
    seen: dict[str, str] = {}
    for row in rows:
        tasks.append(parse(row))
        idx = tasks[-1].idx
        if idx in seen:
            raise InputError(
                row.place,
                expected=f"a {what} of its own",
                received=f"{idx!r}, already at {seen[idx]}",
                hint="make the ids unique",
            )
        seen[idx] = row.place
    return tasks
