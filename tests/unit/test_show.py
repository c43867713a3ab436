"""`dgd show`: what it shows of runs with and without gold answers, and that no answer controls the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dgd_lightning.cli import main


def row(idx: str, arm: str, answer: str | None, **more: Any) -> dict[str, Any]:
    record = {"arm": arm, "method": "Guided", "settings": {}, "tokens": 3, "stop_reason": "stop", **more.pop("dgd", {})}
    return {"prompt": f"Question {idx}?", "idx": idx, "model_output": answer, "dgd": record, **more}


ROWS = [row(idx, arm, f"{arm} says \x1b[31m{idx}\ud800") for idx in ("1", "2") for arm in ("plain", "guided")]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))


def shown(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main(["show", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_answers_task_by_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "run/predictions.jsonl", ROWS)
    out = shown(capsys, tmp_path / "run")
    assert out.split("\n\n")[0].splitlines() == [
        "━━ 1", "Question 1?",
        "── plain (tokens 3, ended by stop)", "plain says ␛[31m1�",
        "── guided (tokens 3, ended by stop)", "guided says ␛[31m1�",
    ]  # fmt: skip
    assert out.count("━━") == 2
    assert "guided" not in shown(capsys, tmp_path / "run", "--arm", "plain")
    assert shown(capsys, tmp_path / "run/predictions.jsonl", "--limit", "1") == out.split("\n\n")[0] + "\n"
    assert main(["show", str(tmp_path / "run"), "--arm", "plan"]) == 2
    assert "arm: expected one of plain, guided, received plan" in capsys.readouterr().err


def test_unfinished_runs_scores_and_what_has_no_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    skipped = row("3", "plain", None, dgd={"skipped": "prompt of 9 tokens, at most 4 fit"})
    talk = {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "x" * 500 + "last?"}]}
    write(tmp_path / "run/predictions.rank0.jsonl", [ROWS[0], skipped])
    write(tmp_path / "run/predictions.rank1.jsonl", [ROWS[1], row("4", "plain", "Yes.", **talk)])
    out = shown(capsys, tmp_path / "run")
    assert out.count("━━") == 3
    assert "no answer: prompt of 9 tokens, at most 4 fit" in out
    assert f"━━ 4\n…{'x' * 395}last?\n" in out
    write(tmp_path / "run/predictions.jsonl", ROWS)
    write(tmp_path / "run/graded.jsonl", [{**one, "score": 1, "grading_rationale": ""} for one in ROWS])
    assert "── plain (score 1, tokens 3, ended by stop)" in shown(capsys, tmp_path / "run")


@pytest.mark.parametrize("command", ["show", "score", "report"])
def test_a_runs_folder_names_its_newest_version(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    for number in (2, 10):
        write(tmp_path / f"run/version_{number}/predictions.jsonl", ROWS)
    assert main([command, str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.rstrip().endswith(str(tmp_path / "run/version_10"))
