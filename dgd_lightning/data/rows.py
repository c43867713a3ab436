"""Rows of `datasets`; a row's fields, what predictions carry on of it, and tasks made of rows."""

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

from dgd_lightning.errors import InputError
from dgd_lightning.row_files import SOURCE, Row, row_of, shown
from dgd_lightning.types import Task

# What an earlier run or its scores wrote into a row: a new answer must not carry it on.
STALE = ("model_output", "score", "requirement_status", "grading_rationale", "dgd")


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
                yield row_of(SOURCE, "row", number, dict(row))

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


def field(row: Row, path: str, kind: type | tuple[type, ...], what: str) -> Any:
    """The value at a dotted path of a row, which must be of this kind; ``what`` says it in words."""
    value: Any = row.value
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            keys = ", ".join(map(str, value)) if isinstance(value, dict) else shown(value)
            raise InputError(
                row.place,
                expected=f"the field {path!r}",
                received=f"fields {keys}"[:200],
                hint="add the field, or name another one",
            )
        value = value[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        inside = value.items() if isinstance(value, dict) else ()
        fitting = [f"{path}.{key}" for key, one in inside if isinstance(one, kind) and not isinstance(one, bool)]
        hint = "correct the field" + f", or name one inside it: {', '.join(fitting)[:200]}" * bool(fitting)
        raise InputError(row.place, expected=f"{path!r} to be {what}", received=shown(value), hint=hint)
    return value


def carried(row: Row) -> dict[str, Any]:
    """What predictions carry on of a row: all but what an earlier run wrote; JSON in UTF-8 must be able to hold it."""
    kept = {key: value for key, value in row.value.items() if key not in STALE}
    for key, value in kept.items():
        try:
            json.dumps({key: value}, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(
                row.place,
                expected=f"a value that JSON can hold in {key!r}, as UTF-8",
                received=f"{shown(value)} ({error})",
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
