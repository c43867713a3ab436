"""Files that appear whole, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from dgd_lightning.files import whole_files


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_files_are_replaced_at_the_end(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    with whole_files(folder, "a") as scratch:
        (scratch / "a").write_text("old")
        assert not (folder / "a").exists()
    with whole_files(folder, "b", "a") as scratch:
        for name in ("a", "b", "left behind"):
            (scratch / name).write_text("new")
        assert (folder / "a").read_text() == "old"
    assert contents(folder) == {"a": "new", "b": "new"}


def fail(folder: Path) -> None:
    with whole_files(folder, "a") as scratch:
        (scratch / "a").write_text("half")
        raise RuntimeError


def test_nothing_moves_where_the_writing_fails(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(RuntimeError):
        fail(tmp_path)
    assert contents(tmp_path) == {"a": "old"}
