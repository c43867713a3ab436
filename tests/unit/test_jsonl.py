"""JSON Lines on the disk: whole lines or none, whatever happens to a process or to the disk."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from dgd_lightning.errors import InputError
from dgd_lightning.jsonl import JsonLines, encoded, held, lines


def numbers(path: Path) -> list[bytes]:
    return [line.text for line in lines(path)]


@pytest.mark.parametrize("shared", [False, True])
def test_a_line_that_a_full_disk_left_torn_is_repaired_by_the_next_one(
    shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, whole = tmp_path / "rows.jsonl", os.write

    def full(number: int, text: Any) -> int:
        whole(number, text[:5])
        raise OSError(28, "No space left on device")

    with closing(JsonLines(path, argument="rows", shared=shared)) as file:
        file.append([{"row": 1}, {"row": 2}])
        with monkeypatch.context() as patch:
            patch.setattr("dgd_lightning.jsonl.os.write", full)
            with pytest.raises(InputError, match=r"rows: .*No space left"):
                file.append([{"row": 3}])
        assert numbers(path) == [encoded({"row": number}) for number in (1, 2)]
        file.append([{"row": 4}])
    torn = [b'{"row\n'] if shared else []
    assert numbers(path) == [*(encoded({"row": number}) for number in (1, 2)), *torn, encoded({"row": 4})]


def test_short_writes_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.write
    monkeypatch.setattr("dgd_lightning.jsonl.os.write", lambda number, text: whole(number, text[:3]))
    with closing(JsonLines(tmp_path / "rows.jsonl")) as file:
        file.append([{"text": "é\ud800"}])
    assert numbers(tmp_path / "rows.jsonl") == ['{"text": "é\\ud800"}\n'.encode()]


def test_lines_are_found_again_by_their_offsets(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with closing(JsonLines(path)) as file:
        file.append({"text": "é" * number} for number in range(4))
    found = list(lines(path))
    for number, line in enumerate(found):
        assert list(lines(path, line.offset)) == found[number:]


def test_an_open_file_is_held_against_other_processes_until_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    code = (
        "import sys; from contextlib import closing; from dgd_lightning.jsonl import JsonLines\n"
        "with closing(JsonLines(sys.argv[1])) as file: file.append([{'row': 2}])"
    )
    assert not held(path)
    with closing(JsonLines(path)) as file:
        assert held(path)
        with subprocess.Popen([sys.executable, "-c", code, str(path)]) as other:
            with pytest.raises(subprocess.TimeoutExpired):
                other.wait(1)
            file.append([{"row": 1}])
            file.close()
            assert other.wait(60) == 0
    assert not held(path)
    assert numbers(path) == [encoded({"row": number}) for number in (1, 2)]
