"""The rubric judge against a real server: faults change nothing, verdicts are asked for once, no failure is a score."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from judge_tools import KEY, expected, judge_server, make_judge, make_row

from dgd_lightning.commands.report import main as report
from dgd_lightning.scoring.rubric_grader import RubricJudge
from dgd_lightning.types import Score

FAULTS = [
    "status:429,0.2",
    "status:500",
    "stall",
    "half",
    "reset",
    "garbage",
    "html",
    "nochoice",
    "status:503",
    "status:408",
]
UNREADABLE = ["empty", "null", "refusal", "prose", "filter", "cut", "fewer", "contradiction", "maybe"]


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def grade_all(judge: RubricJudge, rows: list[dict[str, Any]], threads: int = 1) -> list[Score]:
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda row: judge.grade(row, row["model_output"]), rows))


def plain(scores: list[Score]) -> bytes:
    """What becomes score, requirement_status and grading_rationale of the rows."""
    return json.dumps([score[:3] for score in scores]).encode()


def report_of(scores: list[Score], rows: list[dict[str, Any]], folder: Path) -> list[bytes]:
    """What `dgd report` writes of graded rows."""
    graded = folder / "answers_graded.jsonl"
    with graded.open("w") as file:
        for row, score in zip(rows, scores, strict=True):
            assert score.value is not None
            status = {"requirement_status": score.status, "grading_rationale": score.rationale}
            line = {**row, "score": int(score.value), **status, "dgd": {"grading": score.details}}
            file.write(json.dumps(line) + "\n")
    assert report(["report", str(graded), "--out", str(folder)]) == 0
    return [(folder / name).read_bytes() for name in ("report.html", "report.json")]


def test_a_faultless_server_is_asked_once_per_row(tmp_path: Path) -> None:
    rows = [make_row(number) for number in range(6)]
    with judge_server() as server:
        judge = make_judge(server.url, tmp_path / "v.jsonl", sampling={"temperature": 0, "seed": 3})
        scores = grade_all(judge, rows)
        judge.close()
    assert [score[:3] for score in scores] == [expected(row) for row in rows]
    assert {score.value for score in scores} == {0.0, 1.0}  # both kinds are there
    assert len(server.prompts) == 6
    assert all(body["temperature"] == 0 and body["seed"] == 3 and body["model"] == "fair" for body in server.bodies)
    assert server.keys == {f"Bearer {KEY}"}


@pytest.mark.parametrize("fault", [*FAULTS, *UNREADABLE])
def test_each_fault_alone_is_got_over(fault: str, tmp_path: Path) -> None:
    row = make_row(1)
    with judge_server([fault]) as server:
        judge = make_judge(server.url, tmp_path / "v.jsonl")
        score = judge.grade(row, row["model_output"])
        judge.close()
    assert score[:3] == expected(row)
    assert score.details is not None
    assert (score.details["requests"], sum(score.details["faults"].values()), len(server.prompts)) == (2, 1, 2)


def test_faults_of_every_kind_from_eight_threads_change_no_byte(tmp_path: Path) -> None:
    rows = [make_row(number, rubrics=1 + number % 5) for number in range(24)]
    faults = ["status:429,0.05", "reset", "contradiction", "half", "garbage", "fewer", "fenced"]
    with judge_server() as clean, judge_server(faults) as faulty:
        # No fault here stalls, so that a busy machine adds none.
        first = make_judge(clean.url, tmp_path / "a.jsonl", timeout=20.0)
        second = make_judge(faulty.url, tmp_path / "b.jsonl", timeout=20.0)
        without, with_faults = grade_all(first, rows, 8), grade_all(second, rows, 8)
        totals = second.totals()
        first.close()
        second.close()
    assert plain(with_faults) == plain(without)
    assert report_of(without, rows, tmp_path) == report_of(with_faults, rows, tmp_path)
    assert len(clean.prompts) == 24
    assert len(faulty.prompts) == totals["requests"] == 24 * 7
    assert sum(totals["faults"].values()) == 24 * 6
    assert (totals["judged"], totals["failed"]) == (24, 0)


def test_a_second_run_asks_nothing_and_needs_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [make_row(number) for number in range(5)]
    with judge_server() as server:
        judge = make_judge(server.url, tmp_path / "v.jsonl")
        first = grade_all(judge, rows)
        judge.close()
        monkeypatch.delenv("OPENAI_API_KEY")
        again = make_judge(server.url, tmp_path / "v.jsonl")
        second = grade_all(again, rows, 4)
        assert again.totals()["requests"] == 0
        assert again.totals()["cached"] == 5
        again.close()
    assert len(server.prompts) == 5
    assert plain(first) == plain(second)
    assert [score.details for score in second] == [{**(score.details or {}), "cached": True} for score in first]


def test_what_changes_a_verdict_is_asked_again(tmp_path: Path) -> None:
    row = make_row(1)
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Grade.\n{rubrics_text}\n<response>{model_output}")
    with judge_server() as server:

        def asked(answer: str = row["model_output"], rubrics: list[str] = row["rubrics"], **settings: Any) -> int:
            before = len(server.prompts)
            judge = make_judge(server.url, tmp_path / "v.jsonl", **settings)
            judge.grade({**row, "rubrics": rubrics}, answer)
            judge.close()
            return len(server.prompts) - before

        assert asked() == 1
        assert asked() == 0
        assert asked(answer=row["model_output"] + " ") == 1
        assert asked(rubrics=row["rubrics"][::-1]) == 1
        assert asked(model="strict") == 1
        assert asked(sampling={"temperature": 0}) == 1
        assert asked(reasoning_effort="high") == 1
        assert server.bodies[-1]["reasoning_effort"] == "high"
        assert asked(sampling={"reasoning_effort": "high"}) == 0  # the same request
        assert asked(prompt=str(prompt)) == 1
        assert asked(workers=3, attempts=2, price_in=1.0, price_out=2.0) == 0  # nothing that changes a verdict


def test_equal_answers_are_judged_once_though_asked_at_once(tmp_path: Path) -> None:
    row = make_row(2)
    with judge_server(delay=0.2) as server:
        judge = make_judge(server.url, tmp_path / "v.jsonl")
        scores = grade_all(judge, [row] * 8, 8)
        judge.close()
    assert len(server.prompts) == 1
    assert {score.rationale for score in scores} == {expected(row)[2]}


@pytest.mark.parametrize("answer", ["", " \n\t"])
def test_an_empty_answer_scores_zero_unasked(answer: str, tmp_path: Path) -> None:
    with judge_server() as server:
        judge = make_judge(server.url, tmp_path / "v.jsonl")
        score = judge.grade(make_row(1), answer)
        judge.close()
    assert (score.value, score.status, server.prompts) == (0.0, [], [])


@pytest.mark.parametrize("fault", UNREADABLE)
def test_a_reply_that_never_becomes_a_verdict_is_no_score(fault: str, tmp_path: Path) -> None:
    with judge_server([fault] * 9) as server:
        judge = make_judge(server.url, tmp_path / "v.jsonl", asks=3)
        score = judge.grade(make_row(1), "an answer")
        totals = judge.totals()
        judge.close()
    assert score.value is None
    assert score.status == []
    assert score.rationale.startswith("judge_error: 3 replies without a verdict")
    assert len(server.prompts) == 3
    assert (totals["failed"], totals["judged"]) == (1, 0)
    assert (tmp_path / "v.jsonl").read_bytes() == b""  # a failure is not stored: the next run asks again


@pytest.mark.parametrize("fault", ["status:429", "status:500", "stall", "half", "reset", "garbage"])
def test_an_endpoint_that_fails_a_row_to_the_end_is_no_score(fault: str, tmp_path: Path) -> None:
    good, bad = make_row(1), make_row(2)
    with judge_server([fault] * 9) as server:
        server.seen.update({})
        judge = make_judge(server.url, tmp_path / "v.jsonl", attempts=2, timeout=0.2)
        server.faults = ()
        assert judge.grade(good, good["model_output"]).value is not None
        server.faults = [fault] * 9
        score = judge.grade(bad, bad["model_output"])
        judge.close()
    assert score.value is None
    assert score.rationale.startswith("judge_error: no answer after 2 attempts")
    assert len(server.prompts) == 3


def test_tokens_and_cost_count_what_was_thrown_away(tmp_path: Path) -> None:
    row = make_row(1)
    with judge_server(["fewer"]) as server:
        judge = make_judge(server.url, tmp_path / "v.jsonl", price_in=2.0, price_out=10.0)
        details = judge.grade(row, row["model_output"]).details or {}
        totals = judge.totals()
        judge.close()
        free = make_judge(server.url, tmp_path / "v.jsonl")
        assert "cost" not in free.totals()
        assert "cost" not in (free.grade(row, row["model_output"]).details or {})
        free.close()
    assert (details["tokens_in"], details["tokens_out"]) == (2000, 20)
    assert details["cost"] == pytest.approx(2000 * 2e-6 + 20 * 10e-6)
    assert totals["cost"] == details["cost"]


def test_tokens_that_an_endpoint_does_not_tell_are_unknown_and_not_free(tmp_path: Path) -> None:
    row = make_row(1)
    with judge_server(usage=False) as server:
        judge = make_judge(server.url, tmp_path / "v.jsonl", price_in=2.0, price_out=10.0)
        details = judge.grade(row, row["model_output"]).details or {}
        judge.close()
    assert details["tokens_in"] is None
    assert details["cost"] is None


def test_the_second_judge_is_kept_and_the_first_one_counts(tmp_path: Path) -> None:
    row = make_row(3)  # solved
    with judge_server() as first, judge_server(["always_no"]) as second:
        from dgd_lightning.scoring.judge_config import JudgeModel

        other = JudgeModel("harsh", base_url=second.url, first_wait=0.01)
        judge = make_judge(first.url, tmp_path / "v.jsonl", second=other)
        score = judge.grade(row, row["model_output"])
        stored = make_judge(first.url, tmp_path / "v.jsonl", second=other)
        again = stored.grade(row, row["model_output"])
        fingerprint = judge.fingerprint()
        judge.close()
        stored.close()
    assert (len(first.prompts), len(second.prompts)) == (1, 1)
    assert score[:3] == again[:3] == expected(row)
    details = score.details or {}
    assert details["second"]["score"] == 0
    assert details["second"]["requirement_status"] == ["no"] * 3
    assert (fingerprint["judge"]["model"], fingerprint["second"]["model"]) == ("fair", "harsh")


def test_half_a_surrogate_pair_in_an_answer_can_be_asked_about(tmp_path: Path) -> None:
    row = make_row(3)
    with judge_server() as server:
        judge = make_judge(server.url, tmp_path / "v.jsonl")
        assert judge.grade(row, row["model_output"] + "\ud83d and 😀").value == 1.0
        judge.close()
    assert server.prompts[0].count("\ufffd and 😀") == 1


def test_rows_it_takes() -> None:
    takes = RubricJudge.takes
    judge = object.__new__(RubricJudge)
    assert takes(judge, {"rubrics": ["a"]})
    assert takes(judge, {"rubrics": [{"rubric_criteria": "a"}]})
    for rubrics in ([], [" "], [3], "a", None, {"a": 1}):
        assert not takes(judge, {"rubrics": rubrics})
    assert not takes(judge, {})


def test_the_judge_starts_without_torch() -> None:
    code = (
        "import sys, dgd_lightning.scoring.rubric_grader\nsys.exit('torch' in sys.modules or 'openai' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
