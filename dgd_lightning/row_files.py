"""Files that people bring, read by what they are: rows of JSONL, JSON, CSV, TSV or Parquet, and lines of text.

What a file begins with says what it is; where that leaves a choice, the end of its name does. What neither tells is
refused, so that no row, with the answer in it, is ever taken for a prompt.
"""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from dgd_lightning.errors import InputError

SOURCE = "data.path"  # what users call most of these files
JSONS, TABLES, TEXT = (".jsonl", ".ndjson", ".json"), {".csv": ",", ".tsv": "\t"}, ".txt"
ENDS = (*JSONS, *TABLES, ".parquet", TEXT)  # of names; all but Parquet's may have .gz behind them
GZIP, PARQUET, UTF16 = b"\x1f\x8b", b"PAR1", (b"\xff\xfe", b"\xfe\xff")  # what files begin with
KINDS = "name a file of prompts .txt (one a line), and one of rows .jsonl, .ndjson, .json, .csv, .tsv or .parquet"
LONGEST_CELL = 2**31 - 1  # characters of a CSV file's cell
BATCH = 64  # rows of a Parquet file that are in memory at once


class Row(NamedTuple):
    """A row and its place, for messages: ``data.path line 3``."""

    place: str
    number: int  # of its line; in CSV, TSV, Parquet and arrays of the row, from 1
    value: dict[str, Any]


def end_of(path: Path) -> str:
    """What the file's name ends in, ``.gz`` aside, in small letters: ``.jsonl``; empty where it has no end."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def stem(path: Path) -> str:
    """The file's name without an end that says what is in it; other dots stay."""
    name = path.name.removesuffix(".gz")
    return name[: -len(end_of(path))] if end_of(path) in ENDS else name


def require_file(path: Path, source: str = SOURCE) -> None:
    """Raises InputError where there is no such file."""
    if path.is_dir():
        raise InputError(source, expected="a file", received=f"the folder {path}", hint="name a file in it")
    if not path.is_file():
        raise InputError(source, expected="an existing file", received=path, hint="check the path")


@contextmanager
def _readable(path: Path, source: str) -> Iterator[None]:
    """What goes wrong with reading a file as one-line errors."""
    require_file(path, source)
    try:
        yield
    except UnicodeError as error:
        raise InputError(
            source,
            expected="UTF-8 text, or UTF-16 with its byte order mark",
            received=f"{path} ({error})",
            hint="convert it to UTF-8; .gz is the one packed form that is read",
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(source, expected="a readable file", received=f"{path} ({error})", hint="check it") from error


@contextmanager
def opened(path: Path, source: str = SOURCE, *, newline: str | None = None) -> Iterator[IO[str]]:
    """A text file: gunzipped where it is gzipped, UTF-8, or UTF-16 with its byte order mark, which is no text.

    Raises:
        InputError: it can't be read, or is no such text.
    """
    with _readable(path, source):
        unpacked: Any = gzip.open if _begins_with(path, GZIP) else open
        with unpacked(path, "rb") as file:
            encoding = "utf-16" if file.read(2) in UTF16 else "utf-8-sig"
        with unpacked(path, "rt", encoding=encoding, newline=newline) as file:
            yield file


def _begins_with(path: Path, mark: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(mark)) == mark


def kind_of(path: Path, source: str = SOURCE) -> str:
    """``objects`` (a line each), ``array``, ``table``, ``parquet``, ``prompts`` (a line each), or else ``text``.

    Raises:
        InputError: the file can't be read, or is not what its name says.
    """
    end, first = end_of(path), ""
    with _readable(path, source):
        if _begins_with(path, PARQUET):
            return "parquet"
    if end != ".parquet":
        with opened(path, source) as file:
            first = next((line for line in file if not line.isspace()), "").lstrip()
            if "\0" in first:
                raise UnicodeError("it has NUL characters, as UTF-16 without that mark")
    if end == ".parquet" or (end == TEXT and _is_object(first)):
        received = f"{path} with {'JSON objects' if end == TEXT else 'no Parquet'} in it"
        raise InputError(source, expected="what the file's name says", received=received, hint=KINDS)
    if first.startswith("[") and (end in JSONS or (end not in ENDS and re.match(r"\[\s*(\{|$)", first))):
        return "array"
    if end in JSONS or _is_object(first):
        return "objects"
    return "table" if end in TABLES else "prompts" if end == TEXT else "text"


def _is_object(line: str) -> bool:
    if not line.startswith("{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def read_rows(path: Path, source: str = SOURCE) -> Iterator[Row]:
    """Rows of a file, one at a time; of prompts, each is a row with the one field ``prompt``.

    Raises:
        InputError: the file, which messages call ``source``, can't be read, holds neither rows nor prompts, or none;
            or a row is no object.
    """
    kind, found = kind_of(path, source), False
    if kind == "text":
        raise InputError(source, expected="rows, or prompts", received=f"{path}, which may be any text", hint=KINDS)
    for unit, number, value in (_parquet if kind == "parquet" else _text)(path, source, kind):
        found = True
        yield row_of(source, unit, number, value)
    if not found:
        raise InputError(source, expected="at least one row", received=f"the empty file {path}", hint="check the file")


Place = tuple[str, int, Any]  # of a row: unit, number, value


def _text(path: Path, source: str, kind: str) -> Iterator[Place]:
    with opened(path, source, newline="") as file:  # a table's cells may hold line breaks
        if kind == "table":
            yield from _table(file, TABLES[end_of(path)], source)
        elif kind == "array":
            yield from (("item", number, item) for number, item in enumerate(_parsed(file.read(), source), 1))
        else:
            for number, line in enumerate(file, 1):
                if line.strip():
                    prompt = {"prompt": line.rstrip("\r\n")}
                    yield "line", number, prompt if kind == "prompts" else _parsed(line, f"{source} line {number}")


def _table(file: IO[str], delimiter: str, source: str) -> Iterator[Place]:
    """Rows of cells under the names in the first line; all cells are texts."""
    csv.field_size_limit(LONGEST_CELL)  # of the process; contexts are longer than what it is otherwise
    cells, number = csv.reader(file, delimiter=delimiter, strict=True), 0
    try:
        names = next(filter(None, cells), [])
        if doubled := {name for name in names if names.count(name) > 1}:
            raise InputError(
                f"{source} line 1", expected="columns of different names", received=min(doubled), hint="rename one"
            )
        for number, row in enumerate(filter(None, cells), 1):
            if len(row) != len(names):
                raise InputError(
                    f"{source} row {number}",
                    expected=f"{len(names)} cells, as there are names in the first line",
                    received=len(row),
                    hint="put cells with a delimiter or a line break in them into quotes",
                )
            yield "row", number, dict(zip(names, row, strict=True))
    except csv.Error as error:
        received, hint = f"{error} after row {number}", "put cells into quotes, and double quotes within them"
        raise InputError(source, expected="a well-formed table", received=received, hint=hint) from error


def _parquet(path: Path, source: str, kind: str) -> Iterator[Place]:
    import pyarrow.parquet  # a third of a second, which other files need not wait for

    with _readable(path, source):
        try:
            batches = pyarrow.parquet.ParquetFile(path).iter_batches(BATCH)
            values = (value for batch in batches for value in batch.to_pylist())
            yield from (("row", number, value) for number, value in enumerate(values, 1))
        except (pyarrow.ArrowException, ValueError) as error:
            received = f"{path} ({error})"
            raise InputError(source, expected="readable Parquet", received=received, hint="write it again") from error


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise InputError(
            place,
            expected="valid JSON",
            received=f"{error.msg} at {line}column {error.colno}: {text[:60]!r}",
            hint="correct it: one object a line, or one array of objects",
        ) from error
    except (ValueError, RecursionError) as error:  # Python's own limits: digits of an integer, depth of nesting
        raise InputError(
            place,
            expected="JSON that Python reads: integers of at most 4300 digits, nested a few hundred levels deep",
            received=f"{error}: {text[:60]!r}",
            hint="write long numbers as text, and nest less",
        ) from error


def row_of(source: str, unit: str, number: int, value: Any) -> Row:
    """A row; raises InputError where it is no object."""
    place = f"{source} {unit} {number}"
    if not isinstance(value, dict):
        raise InputError(place, expected="a JSON object", received=shown(value), hint="write one object a row")
    return Row(place, number, value)


def shown(value: Any) -> str:
    """A value's type and how it begins, for messages."""
    return "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
