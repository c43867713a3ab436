"""Scoring a run: rows find their grader, scores survive kills and faults, the graded file is CL-bench's format."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fork_server import launch, launched

from dgd_lightning.cli import main
from dgd_lightning.errors import InputError
from dgd_lightning.grader import Grader
from dgd_lightning.scoring.graded import Versus
from dgd_lightning.scoring.score_run import (
    Counts,
    content_key,
    grade_run,
    read_scores,
    rows_of,
    score_rows,
    source,
    write_graded,
)
from dgd_lightning.types import Score


class Echo(Grader):
    """Scores what the row says is right; counts how often it is asked."""

    name, workers = "echo", 4

    def __init__(self, field: str = "gold", version: int = 1, lose: int = 0) -> None:
        self.field, self.version, self.lose = field, version, lose
        self.asked: list[str] = []
        self.lock = threading.Lock()

    def takes(self, row: dict[str, Any]) -> bool:
        return self.field in row

    def grade(self, row: dict[str, Any], answer: str) -> Score:
        with self.lock:
            self.asked.append(row["idx"])
            if len(self.asked) <= self.lose:
                return Score(None, [], "judge_error: gave up")
        time.sleep(0.001 * (len(row["idx"]) % 3))  # so that they do not finish in order
        right = answer == row[self.field]
        return Score(float(right), ["yes" if right else "no"], "compared", {"seconds": 0.0})

    def fingerprint(self) -> dict[str, Any]:
        return {"version": self.version}


def write_rows(path: Path, count: int = 40) -> Path:
    """Rows as CL-bench's own inference writes them: every third answer is wrong, every tenth is missing."""
    rows = [
        {
            "idx": f"t{n}",
            "messages": [{"role": "user", "content": f"question {n}"}],
            "rubrics": ["is right"],
            "gold": f"a{n}",
            "model_output": None if n % 10 == 9 else f"a{n}" if n % 3 else "\udc80 no",
            "metadata": {"task_id": f"t{n}", "context_id": f"c{n // 4}"},
        }
        for n in range(count)
    ]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_scores_and_graded_rows(tmp_path: Path) -> None:
    where = source(write_rows(tmp_path / "answers.jsonl"))
    seen: list[Counts] = []
    scores = score_rows(where, [Echo("absent"), Echo()], on_progress=seen.append)
    write_graded(where, scores)
    rows = [json.loads(line) for line in where.graded.read_text().splitlines()]
    assert where.graded.name == "answers_graded.jsonl"
    assert [row["idx"] for row in rows] == [f"t{n}" for n in range(40)]
    for n, row in enumerate(rows):
        assert row["score"] == (None if n % 10 == 9 else int(n % 3 != 0))
        assert type(row["score"]) in (int, type(None))
        assert row["requirement_status"] == ([] if n % 10 == 9 else ["yes" if n % 3 else "no"])
        assert row["dgd"]["grader"] == (None if n % 10 == 9 else "echo")
    assert seen[-1] == Counts(rows=40, scored=36, unscored=0, reused=0, skipped=4)


def test_a_second_run_asks_nothing_and_a_changed_grader_everything(tmp_path: Path) -> None:
    where = source(write_rows(tmp_path / "answers.jsonl"))
    first = score_rows(where, [Echo()])
    before = where.scores.read_bytes()
    again, changed = Echo(), Echo(version=2)
    assert score_rows(where, [again]) == first
    assert again.asked == []
    assert where.scores.read_bytes() == before
    score_rows(where, [changed])
    assert len(changed.asked) == 36


def test_a_changed_answer_is_graded_anew(tmp_path: Path) -> None:
    where = source(write_rows(tmp_path / "answers.jsonl"))
    score_rows(where, [Echo()])
    where.rows.write_text(where.rows.read_text().replace('"model_output": "a1"', '"model_output": "b1"'))
    again = Echo()
    scores = score_rows(where, [again])
    assert again.asked == ["t1"]
    assert scores["t1", "answers"].score == 0.0


def test_what_was_given_up_is_tried_again_and_never_a_zero(tmp_path: Path) -> None:
    where = source(write_rows(tmp_path / "answers.jsonl"))
    scores = score_rows(where, [Echo(lose=5)])
    lost = [key for key, record in scores.items() if record.score is None]
    assert len(lost) == 5
    again = Echo()
    assert all(record.score is not None for record in score_rows(where, [again]).values())
    assert sorted(again.asked) == sorted(idx for idx, _ in lost)


class Broken(Echo):
    """Works for a while, then meets what only the user can hint."""

    workers = 2
    met = threading.Event()

    def grade(self, row: dict[str, Any], answer: str) -> Score:
        if row["idx"] == "t0":  # still at work then: what it comes to is kept too
            self.met.wait(10)
            time.sleep(0.2)
        if int(row["idx"][1:]) >= 20:
            self.met.set()
            raise InputError("judge.model", expected="a model", received="none", hint="name one")
        return super().grade(row, answer)


def test_a_users_mistake_stops_scoring_and_loses_nothing(tmp_path: Path) -> None:
    where = source(write_rows(tmp_path / "answers.jsonl"))
    with pytest.raises(InputError, match=r"judge\.model"):
        score_rows(where, [Broken()])
    kept = set(read_scores(where.scores))
    assert {(f"t{n}", "answers") for n in range(18) if n % 10 != 9} <= kept
    again = Echo()
    score_rows(where, [again])
    assert not kept & {(idx, "answers") for idx in again.asked}


def test_no_grader_names_the_fields(tmp_path: Path) -> None:
    where = source(write_rows(tmp_path / "answers.jsonl"))
    with pytest.raises(InputError, match=r"answers\.jsonl row 1: expected what one .* fields idx, messages"):
        score_rows(where, [Echo("absent")])
    where.rows.write_text(json.dumps({"question": "2 + 2?", "answer": 4, "model_output": "4"}) + "\n")
    with pytest.raises(InputError, match=r"row 1: .* fields question, answer \(4\), model_output"):
        score_rows(where, [Echo("absent")])


@pytest.mark.parametrize("line", ["{", "[]", '{"idx": "a"}', '{"idx": "t0", "model_output": "x"}'])
def test_lines_that_are_no_answers_are_named(tmp_path: Path, line: str) -> None:
    path = write_rows(tmp_path / "answers.jsonl", 2)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(InputError, match="line 3"):
        list(rows_of(path))


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="check the path"):
        source(tmp_path / "nothing")
    (tmp_path / "predictions.rank0.jsonl").touch()
    with pytest.raises(InputError, match="not finished"):
        source(tmp_path)


CHILD = """
import sys, time
from test_score_run import Echo
from dgd_lightning.scoring.score_run import score_rows, source, write_graded

class Slow(Echo):
    def grade(self, row, answer):
        time.sleep(0.002)
        return super().grade(row, answer)

where = source(sys.argv[1])
open(sys.argv[2], "w").close()
write_graded(where, score_rows(where, [Slow()]))
"""


def test_killed_again_and_again_it_ends_as_if_never_killed(tmp_path: Path) -> None:
    """SIGKILL at many points, with the last line torn by hand: no row is lost, doubled or changed."""
    undisturbed = source(write_rows(tmp_path / "undisturbed" / "answers.jsonl"))
    write_graded(undisturbed, score_rows(undisturbed, [Echo()]))
    where = source(write_rows(tmp_path / "answers.jsonl"))
    kills = 0
    for attempt in range(12):
        begun = tmp_path / f"begun{attempt}"
        child = launch(where.rows, begun, code=CHILD)
        while not begun.exists():
            assert child.poll() is None
            time.sleep(0.001)
        time.sleep(0.005 * attempt)
        child.kill()
        if child.wait(60) == 0:
            break
        kills += 1
        if where.scores.exists() and attempt % 2:
            with where.scores.open("ab") as file:
                file.write(b'{"idx": "t1", "arm": "ans')
    else:
        launched(where.rows, begun, code=CHILD).check_returncode()
    assert kills > 2
    write_graded(where, score_rows(where, [Echo()]))
    assert where.graded.read_bytes() == undisturbed.graded.read_bytes()
    lines = [json.loads(line)["idx"] for line in where.scores.read_bytes().splitlines()]
    assert len(lines) == len(set(lines)) == 36


def test_a_full_disk_is_told_and_nothing_is_torn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = source(write_rows(tmp_path / "answers.jsonl"))
    whole, written = os.write, []

    def full(number: int, text: Any) -> int:
        if len(written) == 7:
            whole(number, text[:13])
            raise OSError(28, "No space left on device")
        written.append(text)
        return whole(number, text)

    monkeypatch.setattr("dgd_lightning.jsonl.os.write", full)
    with pytest.raises(InputError, match="No space left"):
        score_rows(where, [Echo()])
    monkeypatch.undo()
    again = Echo()
    scores = score_rows(where, [again])
    assert len(scores) == 36
    assert len(again.asked) == 29


def test_rows_of_old_runs_keep_their_scores_and_their_comparisons(tmp_path: Path) -> None:
    """The key of a score does not depend on the form of a row's `dgd`; lossless arms are known in both."""
    path = write_rows(tmp_path / "run" / "predictions.jsonl", 8)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    records = {
        name: {"arm": name, "method": name, "beta": 0.3, "stop_reason": "stop"} for name in ("speculative", "guided")
    }
    old = [{**row, "dgd": record} for row in rows for record in records.values()]
    path.write_text("".join(json.dumps(row) + "\n" for row in old))
    for raw, row in zip(old, rows_of(path), strict=True):
        assert row["dgd"]["settings"] is not None
        assert content_key(raw, "echo", {}) == content_key(row, "echo", {})
    first, again = Echo(), Echo()
    where = source(tmp_path / "run")
    run = grade_run(where, [first])
    assert [one.versus for one in run.compared] == [Versus("guided", "speculative", False, blends=True)]
    grade_run(where, [again])
    assert (len(first.asked), again.asked) == (16, [])


def test_refused_files_are_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_rows(tmp_path / "answers.jsonl")
    (tmp_path / "answers.scores.jsonl").mkdir()
    assert main(["score", str(path)]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.startswith(f"dgd: error: {tmp_path / 'answers.scores.jsonl'}: expected a file that may be read")
    path.write_text('{"a": ' + "[" * 100_000 + "\n")
    assert main(["score", str(path)]) == 2
    assert "line 1: expected JSON that Python reads" in capsys.readouterr().err
    path.write_text("")
    assert main(["score", str(path)]) == 2
    assert "expected at least one row" in capsys.readouterr().err


def clbench_script(rows: list[dict[str, Any]]) -> tuple[int, int]:
    """What CL-bench's ``eval.py`` does with rows, its judge aside: how many it asks its judge about, of how many."""
    asked = 0
    for row in rows:
        named = row.get("metadata", {}).get("task_id", row.get("idx", -1))
        assert named == row["idx"]
        answer = row.get("model_output", "")
        if answer and answer.strip():
            asked += bool([str(rubric).strip() for rubric in row.get("rubrics", [])])
    return asked, len({row["metadata"]["task_id"] for row in rows})


def test_one_arm_is_written_for_clbench_s_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.loads(line) for line in write_rows(tmp_path / "answers.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {"rubrics": ["It is there."], "secret": 1}
    both = [{**row, "dgd": {"arm": arm}} for row in rows for arm in ("plain", "guided")]
    path, out = tmp_path / "both.jsonl", tmp_path / "new" / "guided.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in both))
    assert main(["score", str(path), "--export_clbench", str(out)]) == 2
    assert "arm: expected one of plain, guided, received nothing" in capsys.readouterr().err
    assert main(["score", str(path), "--export_clbench", str(out), "--arm", "guided"]) == 0
    assert f"40 rows for CL-bench's script: eval.py --input {out}" in capsys.readouterr().out
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["model_output"] for row in written] == [row["model_output"] for row in rows]
    assert clbench_script(written) == (sum(row["model_output"] is not None for row in rows), 40)
    assert all(row["dgd"]["arm"] == "guided" and "secret" not in row for row in written)
    assert main(["score", str(path), "--export_clbench", str(path), "--arm", "guided"]) == 2  # nothing is lost
    assert "expected a new file" in capsys.readouterr().err
    path.write_text(json.dumps({**rows[0], "rubrics": []}) + "\n")
    assert main(["score", str(path), "--export_clbench", str(tmp_path / "x.jsonl")]) == 2
    assert "rows in CL-bench's format" in capsys.readouterr().err


def test_rows_without_idx_are_named_by_what_they_ask(tmp_path: Path) -> None:
    """So that files of two models are paired by task, in whatever order their rows are."""
    rows = [
        {"question": "1 + 1?", "answer": "#### 2", "model_output": "2"},
        {"question": "1 + 2?", "answer": "#### 3", "model_output": "3"},
        {"problem": "1 + 3?", "answer": "4", "unique_id": "sums/3", "model_output": "4"},
        {"prompt": "def f():", "task_id": "HumanEval/7", "model_output": "pass"},
        {"messages": [{"role": "user", "content": "Hi"}], "metadata": {"task_id": "t9"}, "model_output": "Hi"},
    ]
    first, second = (write(tmp_path / name, own) for name, own in (("a.jsonl", rows), ("b.jsonl", rows[::-1])))
    names = [row["idx"] for row in rows_of(first)]
    assert [row["idx"] for row in rows_of(second)] == names[::-1]
    assert names[2:] == ["sums/3", "HumanEval/7", "t9"]
    assert len(set(names)) == 5
    other = write(tmp_path / "c.jsonl", [{"question": "2 + 2?", "model_output": "4"}])
    assert next(iter(rows_of(other)))["idx"] not in names
    with pytest.raises(InputError, match=r"each idx .* once per arm, received asked-.* again"):
        list(rows_of(write(tmp_path / "d.jsonl", [rows[0], rows[0]])))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
