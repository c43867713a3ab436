"""Error classes by judge: asked of failed answers only, read strictly, kept, tried again, and counted apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from judge_tools import KEY, judge_server, make_judge, make_row

from dgd_lightning.commands.score import main
from dgd_lightning.errors import InputError
from dgd_lightning.scoring.error_judge import Classified
from dgd_lightning.scoring.given_grader import AsGraded
from dgd_lightning.scoring.judge_text import UnreadableReply, read_error_class
from dgd_lightning.scoring.score_run import score_rows, source
from dgd_lightning.types import Score


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


@pytest.mark.parametrize("name", ["context_ignored", " Format_Error ", "other"])
def test_a_class_is_read(name: str) -> None:
    text = "<think>{}</think>" + json.dumps({"Reason": "why", "Error Class": name})
    assert read_error_class(text) == (name.strip().lower(), "why")


@pytest.mark.parametrize(
    ("text", "flaw"),
    [
        ("", "empty"),
        ("context_ignored", "no JSON"),
        ('{"Error Class": "other"}', "no text under 'Reason'"),
        ('{"Reason": "r", "Error Class": "context ignored"}', "an error class of 'context ignored'"),
        ('{"Reason": "r", "Error Class": ["other"]}', "an error class of"),
        ('{"Reason": "r", "Error Class": "other"', "broken"),
        ('{"Reason": "r", "Error Class": "other"} or {"Reason": "r", "Error Class": "format_error"}', "several"),
    ],
)
def test_what_is_no_class_is_not_guessed(text: str, flaw: str) -> None:
    with pytest.raises(UnreadableReply, match=flaw):
        read_error_class(text)


def graded_row(number: int, **changes: Any) -> dict[str, Any]:
    """A row that another program has graded; each third one is solved."""
    score = int(number % 3 == 0)
    status = ["yes", "yes" if score else "no", "yes"]
    return {
        **make_row(number), "score": score, "requirement_status": status, "grading_rationale": f"as it was {number}"
    } | changes  # fmt: skip


def test_only_failed_answers_are_asked_about_and_each_once(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    rows = [graded_row(n) for n in range(6)]
    rows += [graded_row(7, model_output=" "), graded_row(8, score=None)]
    rows += [{**rows[1], "dgd": {"arm": "other arm"}}]  # an equal answer
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with judge_server() as server:
        judge = make_judge(server.url, tmp_path / "v.jsonl", price_in=1.0, price_out=1.0)
        errors = judge.error_judge()
        graders = [Classified(AsGraded(), errors), Classified(judge, errors)]
        found = score_rows(source(path), graders)
        totals = graders[1].totals() or {}
        again = score_rows(source(path), graders)
        judge.close()
    asked = [prompt for prompt in server.prompts if '"Error Class"' in prompt]
    assert len(asked) == 5  # 1, 2, 4, 5 and 8, which the judge graded first
    assert len(server.prompts) == 6
    assert again == found
    assert (totals["judged"], totals["error_classes"]["judged"]) == (1, 5)
    assert totals["error_classes"]["cost"] == pytest.approx(5 * 1010e-6)
    classes = {idx: (record.details or {}).get("error_class") for (idx, _), record in found.items()}
    assert classes == {
        "0": None, "1": "format_error", "2": "format_error", "3": None, "4": "format_error", "5": "format_error",
        "7": "incomplete_or_refused", "8": "format_error",
    }  # fmt: skip
    (one,) = [prompt for prompt in asked if "as it was 2" in prompt]
    assert "1. [met] It must mention" in one
    assert "2. [not met] It must mention" in one
    assert "{" not in one.partition("Answer with one JSON")[0]
    details = found["1", "answers"].details or {}
    assert details["error_reason"] == "naïve ☃"
    assert details["error_asked"]["tokens_in"] == 1000


def test_a_class_that_could_not_be_had_is_none_and_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps(graded_row(1)) + "\n")
    with judge_server(["prose"] * 3) as server:
        judge = make_judge(server.url, tmp_path / "v.jsonl", asks=3)
        graders = [Classified(AsGraded(), judge.error_judge())]
        first = score_rows(source(path), graders)["1", "answers"]
        second = score_rows(source(path), graders)["1", "answers"]
        judge.close()
    assert first.score == second.score == 0.0  # the score stands whatever becomes of the class
    assert first.details is not None
    assert first.details["error_class"] is None
    assert first.details["error_reason"].startswith("judge_error: 3 replies")
    assert (second.details or {})["error_class"] == "format_error"
    assert len(server.prompts) == 4


def test_taxonomy_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(graded_row(n)) + "\n" for n in range(3)))
    with pytest.raises(InputError, match=r"^taxonomy: expected a judge"):
        main(["score", str(path), "--taxonomy", "true"])
    with judge_server() as server:
        judge = [f"--judge.base_url={server.url}", "--judge.model=fair", f"--judge.cache={tmp_path / 'v.jsonl'}"]
        assert main(["score", str(path), "--taxonomy", "true", *judge]) == 0
    assert "What came of the tasks" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "answers_graded.jsonl").read_text().splitlines()]
    assert [row["dgd"]["grading"] and row["dgd"]["grading"]["error_class"] for row in rows] == [
        None, "format_error", "format_error"
    ]  # fmt: skip
    summary = json.loads((tmp_path / "answers.scores.json").read_text())
    assert summary["arms"]["answers"]["outcomes"] == {"solved": 1, "format_error": 2}
    assert summary["judge"]["error_classes"]["judged"] == 2
    assert len(server.prompts) == 2


def test_classified_leaves_alone_what_needs_no_judge() -> None:
    class Fixed(AsGraded):
        """Scores as the row says."""

        def grade(self, row: dict[str, Any], answer: str) -> Score:
            return row["fixed"]

    class Nobody:
        """Has nothing that could be asked."""

    grader = Classified(Fixed(), Nobody())  # type: ignore[arg-type]
    for score in (
        Score(1.0, ["yes"], ""), Score(None, [], "judge_error"), Score(0.0, ["no"], "", {"error_class": "other"})
    ):  # fmt: skip
        assert grader.grade({"fixed": score, "rubrics": ["a"]}, "answer") == score
    assert grader.grade({"fixed": Score(0.0, [], "")}, "answer") == Score(0.0, [], "")  # no rubrics
