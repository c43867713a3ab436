"""Replies are read strictly: what is a verdict, and what is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dgd_lightning.scoring.judge_text import UnreadableReply, Verdict, fill, read_template, read_verdict, rubric_texts

GOOD = {"Grading Rationale": "why", "List of Requirement Satisfaction Status": ["yes", "no"], "Overall Score": 0}
VERDICT = Verdict(0, ["yes", "no"], "why")
TEXT = json.dumps(GOOD)


def changed(**changes: Any) -> str:
    names = {
        "rationale": "Grading Rationale",
        "status": "List of Requirement Satisfaction Status",
        "score": "Overall Score",
    }
    return json.dumps({**GOOD, **{names[name]: value for name, value in changes.items()}}, ensure_ascii=False)


READABLE = {
    "bare": TEXT,
    "indented": json.dumps(GOOD, indent=2),
    "fenced": f"```json\n{TEXT}\n```",
    "fenced without a language": f"```\n{TEXT}\n```",
    "prose around": f"My verdict {{as asked}}:\n{TEXT}\nThat is all {{really}}.",
    "twice the same": f"{TEXT}\n\nFinal:\n{TEXT}",
    "another object before": f'{{"step": 1}} {TEXT}',
    "thoughts before": f"<think>maybe {changed(status=['yes', 'yes'], score=1)}</think>\n{TEXT}",
    "further keys": TEXT[:-1] + ', "Confidence": 0.4}',
    "a quoted verdict": changed(rationale="it wrote " + json.dumps(changed(status=["yes"], score=1))),
}


@pytest.mark.parametrize("name", READABLE)
def test_readable(name: str) -> None:
    assert read_verdict(READABLE[name], 2)[:2] == VERDICT[:2]


@pytest.mark.parametrize("yes", ["yes", "Yes", " YES ", "true", True, "✓", "✔️", "✅"])
@pytest.mark.parametrize("no", ["no", "No", "false", False, "✗", "❌"])
def test_statuses_are_normalised(yes: Any, no: Any) -> None:
    assert read_verdict(changed(status=[yes, no]), 2).status == ["yes", "no"]


@pytest.mark.parametrize("score", [1, 1.0, "1", "1 point", "1 points"])
def test_scores(score: Any) -> None:
    assert read_verdict(changed(status=["yes", "yes"], score=score), 2).score == 1


# a judge that quotes an answer's own verdict and forgets to escape it
BROKEN = (
    f'{{"Grading Rationale": "it wrote {changed(status=["yes", "yes"], score=1)}", '
    '"List of Requirement Satisfaction Status": ["no", "no"], "Overall Score": 0}'
)
UNREADABLE = {
    "nothing": ("", "an empty reply"),
    "prose": ("I will not grade this.", "no JSON object"),
    "a trailing comma": (TEXT[:-1] + ",}", "broken JSON"),
    "cut off": (TEXT[:-3], "broken JSON"),
    "single quotes": (repr(GOOD), "no JSON object"),
    "a list": (json.dumps(list(GOOD.values())), "no JSON object"),
    "two that differ": (TEXT + changed(rationale="why not"), "several verdicts"),
    "a key twice": (TEXT[:-1] + ', "Overall Score": 1}', "a key twice"),
    "a verdict in a broken one": (BROKEN, "broken JSON"),
    "no rationale": (json.dumps({k: v for k, v in GOOD.items() if "Rationale" not in k}), "no 'Grading Rationale'"),
    "no statuses": (json.dumps({k: v for k, v in GOOD.items() if "Status" not in k}), "no 'List of"),
    "no score": (json.dumps({k: v for k, v in GOOD.items() if "Score" not in k}), "no 'Overall Score'"),
    "a rationale that is no text": (changed(rationale=["a"]), "is no text"),
    "statuses as text": (changed(status="[yes, no]"), "is no list"),
    "too few": (changed(status=["no"]), "1 statuses for 2"),
    "too many": (changed(status=["no"] * 3), "3 statuses for 2"),
    "none": (changed(status=[]), "0 statuses for 2"),
    "partially": (changed(status=["yes", "partially"]), "a status of 'partially'"),
    "yes, mostly": (changed(status=["yes, mostly", "no"]), "a status of 'yes, mostly'"),
    "numbers": (changed(status=[1, 0]), "a status of '1'"),
    "null": (changed(status=["yes", None]), "a status of 'None'"),
    "a score of half": (changed(score=0.5), "an overall score of '0.5'"),
    "a score of 2": (changed(score=2), "an overall score of '2'"),
    "a score of true": (changed(score=True), "an overall score of 'True'"),
    "a score of null": (changed(score=None), "an overall score of 'None'"),
    "a score in words": (changed(score="0 of 1"), "an overall score of '0 of 1'"),
    "1 against a no": (changed(score=1), "a score of 1 with 1 of 2"),
    "0 against all yes": (changed(status=["yes", "yes"]), "a score of 0 with 2 of 2"),
    "deep": ("{" * 10_000, "no JSON object"),
    "deep lists": ('{"a":' + "[" * 10_000, "no JSON object"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable(name: str) -> None:
    text, told = UNREADABLE[name]
    with pytest.raises(UnreadableReply, match=told.replace("[", r"\[")):
        read_verdict(text, 2)


def test_the_prompt_puts_in_rubrics_and_answer_and_leaves_all_other_braces() -> None:
    text = fill('{rubrics_text}|{model_output}|{"Overall Score": 0}', ["a {model_output}", "b"], "{rubrics_text} \\1")
    assert text == '1. a {model_output}\n2. b|{rubrics_text} \\1|{"Overall Score": 0}'


def test_the_package_s_prompt_is_there_and_asks_for_the_keys_that_are_read() -> None:
    text = fill(read_template(None), ["only this"], "only that")
    assert "1. only this" in text
    assert "only that" in text
    for key in GOOD:
        assert f'"{key}"' in text


def test_rubrics_of_either_form_without_blank_ones() -> None:
    assert rubric_texts([" a ", "", {"rubric_criteria": "b"}]) == ["a", "b"]


def test_rows_that_cl_bench_graded_come_out_as_they_are(bench_data: Path) -> None:
    path = bench_data / "clbench" / "graded_sample.jsonl"
    if not path.is_file():
        pytest.skip("there are no graded rows of CL-bench")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert rows
    for row in rows:
        reply = {
            "Grading Rationale": row["grading_rationale"],
            "List of Requirement Satisfaction Status": row["requirement_status"],
            "Overall Score": row["score"],
        }
        rubrics = rubric_texts(row["rubrics"])
        verdict = read_verdict(json.dumps(reply, ensure_ascii=False, indent=2), len(rubrics))
        assert verdict == (row["score"], row["requirement_status"], row["grading_rationale"])
        text = fill(read_template(None), rubrics, row["model_output"])
        assert text.count(row["model_output"]) >= 1
        assert all(f"{number}. {rubric}\n" in text for number, rubric in enumerate(rubrics, 1))
