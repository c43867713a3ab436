"""Files are read by what they are: the same rows come of every kind, and what is none is refused in one line."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from dgd_lightning.commands.main import main
from dgd_lightning.commands.score import read_excluded
from dgd_lightning.data.contexts import ContextsData
from dgd_lightning.data.one_context import FileContext
from dgd_lightning.data.prompts import PromptsData
from dgd_lightning.errors import InputError
from dgd_lightning.report.runs import read_runs
from dgd_lightning.row_files import read_rows, stem
from dgd_lightning.scoring.score_run import rows_of, source

ROWS = [
    {"question": "What is 2 + 2, in words?", "answer": 'It is "four".\n#### 4'},
    {"question": "{héllo}; [x]\ttab\u2028line", "answer": " 7 "},
    {"question": "long", "answer": "a" * 200_000},  # Python's csv stops at 131,072 characters if it is not told
]


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def table(delimiter: str, end: str = "\r\n") -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(ROWS[0]), delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


UTF8: Callable[[str], bytes] = str.encode
FILES: dict[str, bytes] = {
    "a.jsonl": UTF8(lines(ROWS)),
    "b.ndjson": UTF8(lines(ROWS).replace("\n", "\r\n")),
    "c.jsonl.gz": gzip.compress(UTF8(lines(ROWS))),
    "gzipped.jsonl": gzip.compress(UTF8(lines(ROWS))),
    "unpacked.jsonl.gz": UTF8(lines(ROWS)),
    "d": UTF8("\n" + lines(ROWS)),
    "answers.gpt-5.1": UTF8(lines(ROWS)),
    "lines.json": UTF8(lines(ROWS)),
    "misnamed.csv": UTF8(lines(ROWS)),
    "e.json": json.dumps(ROWS, indent=1).encode("utf-8-sig"),
    "array.jsonl": json.dumps(ROWS).encode(),
    "array": json.dumps(ROWS).encode(),
    "f.jsonl": lines(ROWS).encode("utf-16"),
    "g.csv": table(",").encode("utf-8-sig"),
    "h.CSV": UTF8("\n" + table(",", "\n")),
    "i.csv.gz": gzip.compress(table(",").encode("utf-16")),
    "j.tsv": UTF8(table("\t")),
    "k.parquet": parquet(ROWS),
    "misnamed.jsonl": parquet(ROWS),
}


@pytest.mark.parametrize("name", FILES)
def test_all_kinds_of_files_give_the_same_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(FILES[name])
    found = list(read_rows(path))
    assert [row.value for row in found] == ROWS
    assert len({row.place for row in found}) == 3
    tasks = PromptsData(str(path), field="question").tasks
    asked = [(task.messages or [{}])[0]["content"] for task in tasks]
    assert asked == [row["question"] for row in ROWS]  # and no answer in them
    assert [task.row for task in tasks] == ROWS
    scored = list(rows_of(written(tmp_path / "s", name, [{**row, "model_output": "x"} for row in ROWS])))
    assert [(row["question"], row["model_output"]) for row in scored] == [(row["question"], "x") for row in ROWS]


def written(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    """The rows in a file of the kind of this name."""
    folder.mkdir()
    if "csv" in name or "tsv" in name:
        name = "x.csv"
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        (folder / name).write_text(text.getvalue(), newline="")
    else:
        (folder / name).write_bytes(parquet(rows) if "parquet" in name else UTF8(lines(rows)))
    return folder / name


CELLS = "question,answer\n"
REFUSED: dict[str, tuple[str, bytes, str]] = {
    "a text without an end": ("prompts", b"Why?\n", "name a file of prompts .txt"),
    "a table without an end": ("data", UTF8(CELLS + "Why?,because\n"), "name a file of prompts .txt"),
    "a text of another end": ("a.md", b"# Why?\n", "name a file of prompts .txt"),
    "rows named as prompts": ("rows.txt", UTF8(lines(ROWS)), "received .*rows.txt with JSON objects in it"),
    "no Parquet": ("x.parquet", UTF8(CELLS), "with no Parquet in it"),
    "damaged Parquet": ("x.parquet", parquet(ROWS)[:-100], "expected readable Parquet"),
    "UTF-16 without a mark": ("x.jsonl", lines(ROWS[:1]).encode("utf-16-le"), "NUL characters"),
    "half of UTF-16": ("x.jsonl", lines(ROWS).encode("utf-16")[:-1], "expected UTF-8 text, or UTF-16"),
    "another encoding": ("x.csv", table(",").encode("cp1252", "replace"), "expected UTF-8 text"),
    "another packing": ("x.jsonl.zst", b"\x28\xb5\x2f\xfd\x04\x00\xff\xfe", "gz is the one packed form"),
    "a damaged pack": ("x.jsonl.gz", gzip.compress(UTF8(lines(ROWS)))[:-20], "expected a readable file"),
    "too few cells": ("x.csv", UTF8(CELLS + "a,b\nc\n"), "data.path row 2: expected 2 cells.* received 1"),
    "too many cells": ("x.csv", UTF8(CELLS + "a, b, and c\n"), "data.path row 1: expected 2 cells.* received 3"),
    "an open quote": ("x.csv", UTF8(CELLS + 'a,b\n"c,d\n'), "after row 1"),
    "columns of one name": ("x.csv", b"a,b,a\n1,2,3\n", "data.path line 1: expected columns of different names"),
    "names alone": ("x.csv", UTF8(CELLS), "the empty file"),
    "an array of texts": ("x.json", b'["Why?"]', "data.path item 1: expected a JSON object"),
    "an object over lines": ("x.json", b'{\n"question": "Why?"\n}\n', "one object a line, or one array of objects"),
    "a broken array": ("x.json", b'[{"a": 1},\n{"b": }]', "at line 2, column 7"),
    "a table named as rows": ("x.jsonl", UTF8(CELLS), "data.path line 1: expected valid JSON"),
    "cells for another delimiter": ("x.csv", b"question;answer\na;b\n", "received fields question;answer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_file_of_rows_is_refused(tmp_path: Path, case: str) -> None:
    name, content, words = REFUSED[case]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=words):
        _ = PromptsData(str(path), field="question").tasks
    with pytest.raises(InputError):
        list(rows_of(path))


def test_lines_of_prompts_are_those_of_text_files_alone(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("[INST] a, b\r\n\r\n  c \n{d}\n".encode("utf-16"))
    tasks = PromptsData(str(tmp_path / "p.txt"), chat=False).tasks
    assert [(task.idx, task.prompt) for task in tasks] == [("p-1", "[INST] a, b"), ("p-3", "  c "), ("p-4", "{d}")]


def context_row(task: str) -> dict[str, Any]:
    metadata = {"task_id": task, "context_id": "c", "context_category": "A", "sub_category": "s"}
    return {"messages": [{"role": "user", "content": f"q {task}"}], "rubrics": ["r"], "metadata": metadata}


class Bytes:
    """A tokenizer of UTF-8 bytes."""

    chat_template = "x"

    def apply_chat_template(self, messages: Any, **_: Any) -> str:
        return "|".join(message["content"] for message in messages)

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def encode(self, text: str, **_: Any) -> list[int]:
        return list(text.encode())


@pytest.mark.parametrize("name", ["x.jsonl", "x.ndjson", "x", "x.json", "x.parquet"])
def test_contexts_of_all_kinds(tmp_path: Path, name: str) -> None:
    rows = [context_row("1"), context_row("2")]
    content = parquet(rows) if name == "x.parquet" else UTF8(json.dumps(rows) if name[2:] == "json" else lines(rows))
    (tmp_path / name).write_bytes(content)
    path = str(tmp_path / name)
    assert [task.messages for task in ContextsData(path).tasks] == [row["messages"] for row in rows]
    fitted = FileContext(path)
    assert fitted.is_clbench  # rows, not a text: the licence is looked at
    assert [bytes(ids.tolist()) for ids in fitted.prompts(Bytes())[1]] == [b"q 1", b"q 2"]


def test_a_context_of_plain_text_is_read_as_it_is(tmp_path: Path) -> None:
    text = "[x] one\r\n\r\n two\u2028\x0c \n"
    for name, encoding in (("x.md", "utf-8"), ("x.txt", "utf-16"), ("x", "utf-8-sig")):
        (tmp_path / name).write_bytes(text.encode(encoding))
        _, (ids,) = FileContext(str(tmp_path / name)).prompts(Bytes())
        assert bytes(ids.tolist()).decode() == "[x] one\n\n two\u2028\x0c "
    (tmp_path / "rows.txt").write_text(lines([context_row("1")]))
    with pytest.raises(InputError, match=r"^data\.path: .* JSON objects.* \.jsonl"):
        FileContext(str(tmp_path / "rows.txt")).prompts(Bytes())


def test_scores_and_reports_of_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpt-5.1.csv"
    path.write_text("question,answer,model_output\n1 + 1?,#### 2,so 2\n1 + 2?,#### 3,so 4\n")
    assert main(["score", str(path)]) == 0
    assert [json.loads(line)["score"] for line in source(path).graded.read_text().splitlines()] == [1, 0]
    assert source(path).graded.name == "gpt-5.1_graded.jsonl"
    (other := tmp_path / "answers.jsonl").touch()
    (tmp_path / "answers.csv").touch()
    assert source(other).graded.name == "answers.jsonl_graded.jsonl"  # each file has its own
    assert source(tmp_path / "answers.csv").scores.name == "answers.csv.scores.jsonl"
    (run,) = read_runs([str(source(path).graded)])
    assert (run.label, [(one.arm, one.score) for one in run.scores]) == ("gpt-5.1", [("gpt-5.1", 1), ("gpt-5.1", 0)])
    first, second = (one.idx for one in run.scores)  # rows without idx are named by what they ask
    assert first.startswith("asked-")
    assert second.startswith("asked-")
    assert first != second
    # a text "1" is no score, and contexts written as text would be lost
    path.write_text("model_output,score,metadata\nx,1,{}\n")
    with pytest.raises(InputError, match="row 1: expected metadata, score as JSON has them, received texts"):
        read_runs([str(path)])
    assert stem(Path("x.jsonl.gz")) == "x"
    assert stem(Path("gpt-5.1")) == "gpt-5.1"


def test_lists_of_ids_may_have_a_byte_order_mark(tmp_path: Path) -> None:
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "ids.txt").write_bytes("a # why\r\n\r\nb\n".encode(encoding))
        assert read_excluded(str(tmp_path / "ids.txt"), []) == {"a", "b"}
    (tmp_path / "ids.txt").write_bytes(b"\xe9")
    with pytest.raises(InputError, match=r"^exclude: expected UTF-8 text"):
        read_excluded(str(tmp_path / "ids.txt"), [])


HALF = "\ud800"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"q": "why", "id": f"a{HALF}"}, "data.path line 1: .*in 'id'"),
        ({"q": "why", "id": "a", "metadata": {"context_id": HALF}}, "data.path line 1: .*in 'metadata'"),
        ({"q": f"why {HALF}", "id": "a"}, "data.path line 1: .*in 'q'"),
        ({"q": "why", "id": "a", "answer": HALF}, "data.path line 1: .*in 'answer'"),
        ({"q": "why", "id": "a", HALF: 1}, "data.path line 1: .*in '.ud800'"),
    ],
)
def test_half_characters_are_refused_when_read(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=words):
        _ = PromptsData(str(tmp_path / "x.jsonl"), field="q", id_field="id").tasks


def test_ids_that_utf8_cannot_hold_are_refused_by_scoring(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.jsonl"
    for row in ({"idx": f"a{HALF}"}, {"metadata": {"task_id": HALF}}):
        path.write_text(json.dumps({**row, "model_output": "x", "score": 1, "requirement_status": []}) + "\n")
        assert main(["score", str(path)]) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"dgd: error: {path} line 1: idx: expected Unicode text")
        assert told.count("\n") == 1
    # what only says something about a row, such as a judge's words, passes through and comes out as it came in
    said = {"metadata": {"context_category": HALF}, "grading_rationale": HALF, "model_output": HALF}
    path.write_text(json.dumps({"idx": "a", "score": 1, "requirement_status": ["yes"], **said}) + "\n")
    assert main(["score", str(path)]) == 0
    (graded,) = map(json.loads, source(path).graded.read_text().splitlines())
    assert said.items() <= graded.items()
    assert HALF in json.loads(source(path).summary.read_text())["arms"]["x"]["by_category"]
