"""Rows of a data set of the `datasets` library: a Hub id, or a local folder that it can load."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from dgd_lightning.data.rows import Row
from dgd_lightning.errors import InputError


def load_rows(
    path: str, *, name: str | None, split: str, revision: str | None, streaming: bool, limit: int | None
) -> Iterator[Row]:
    """Rows of ``datasets.load_dataset(path, name, split=…)``; code of a data set is never run.

    Raises:
        InputError: the library can't load it; its own reason is told.
    """
    import datasets

    try:
        data = datasets.load_dataset(path, name, split=split, revision=revision, streaming=streaming)
        for number, row in enumerate(islice(data, limit), 1):
            yield Row(f"data.path row {number}", number, dict(row))
    except (
        Exception
    ) as error:  # the library raises dozens of kinds, from its own to those of the file system and the net
        raise InputError(
            "data.path",
            expected="a `datasets` id or folder with this name, split and revision",
            received=f"{path!r}, name {name!r}, split {split!r}: {type(error).__name__}: {str(error)[:200]}",
            hint="check the id and the split, log in for gated data, or download it and give a file or a folder",
        ) from error
