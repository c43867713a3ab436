"""The file of verdicts: torn lines, other writers, foreign lines; nothing stored is lost."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fork_server import launch

from dgd_lightning.jsonl import content_key
from dgd_lightning.scoring.one_judge import VerdictFile


def record(number: int) -> dict[str, Any]:
    return {"score": 0, "status": ["no"], "rationale": f"naïve ☃ {number} \u2028 \r \ud800"}


def test_what_is_put_is_found_again_by_this_and_the_next_process(tmp_path: Path) -> None:
    file = VerdictFile(tmp_path / "new" / "v.jsonl")
    assert file.get("a") is None
    assert file.put("a", record(1)) == {"key": "a", **record(1)}
    assert file.get("a") == {"key": "a", **record(1)}
    file.close()
    file.close()
    again = VerdictFile(tmp_path / "new" / "v.jsonl")
    assert again.get("a") == {"key": "a", **record(1)}
    again.close()


def test_the_first_of_a_key_stands(tmp_path: Path) -> None:
    one, other = (VerdictFile(tmp_path / "v.jsonl") for _ in range(2))
    assert one.get("a") is None
    assert other.get("a") is None
    one.put("a", record(1))
    assert other.get("a") == one.get("a")  # seen while both are open
    assert other.put("a", record(2)) == {"key": "a", **record(1)}
    assert one.get("a") == {"key": "a", **record(1)}


@pytest.mark.parametrize("kept", range(0, 200, 7))
def test_a_line_torn_anywhere_costs_that_line_alone(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    file = VerdictFile(path)
    for number in range(3):
        file.put(str(number), record(number))
    file.close()
    whole = path.read_bytes()
    torn = whole[: min(len(whole), kept)]
    path.write_bytes(torn)
    there = torn.count(b"\n")
    again = VerdictFile(path)
    assert [again.get(str(number)) is not None for number in range(3)] == [number < there for number in range(3)]
    again.put("new", record(9))
    for number in range(3):
        again.put(str(number), record(number))
    again.close()
    assert path.read_bytes().startswith(torn)  # append-only, even then
    last = VerdictFile(path)
    assert all(last.get(key) is not None for key in ("0", "1", "2", "new"))
    last.close()


def test_lines_that_are_no_verdicts_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    lines = ["\0\0\0", "[1]", "{}", '{"key": "a"}', json.dumps({"key": "b", **record(0), "score": None}), ""]
    path.write_text("\n".join([*lines, json.dumps({"key": "c", **record(0)})]) + "\n")
    file = VerdictFile(path)
    assert [file.get(key) is not None for key in "abc"] == [False, False, True]
    file.close()


def test_threads_and_processes_write_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    code = (
        "import sys; from dgd_lightning.scoring.one_judge import VerdictFile\n"
        "file = VerdictFile(sys.argv[1])\n"
        "for n in range(60): file.put(f'{sys.argv[2]}{n}', "
        "{'score': 1, 'status': ['yes'] * 50, 'rationale': 'x' * 20000})"
    )
    children = [launch(path, name, code=code) for name in ("p", "q")]
    file = VerdictFile(path)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: file.put(f"t{number}", record(number)), range(100)))
    assert [child.wait(60) for child in children] == [0, 0]
    assert all(file.get(f"{name}{n}") is not None for name in "pq" for n in range(60))
    file.close()
    keys = [json.loads(line)["key"] for line in path.read_bytes().splitlines()]  # every line is whole
    assert len(keys) == len(set(keys)) == 220


def test_keys_depend_on_every_part_and_on_its_place() -> None:
    keys = [
        content_key(*parts) for parts in (("a", "b"), ("b", "a"), ("ab",), ("a", ["b"]), (["a", "b"],), ("a", "\ud800"))
    ]
    assert len(set(keys)) == len(keys)
    assert content_key({"x": 1, "y": 2}) == content_key({"y": 2, "x": 1})
