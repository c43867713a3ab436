"""lm-evaluation-harness' two verdicts on GSM8K answers: known ones, its own code, and where they are shown."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import yaml
from rich.table import Table

from dgd_lightning.grader import remarked
from dgd_lightning.report.run_summary import add_solve_rates
from dgd_lightning.report.solve_rates import group_table, rate_table
from dgd_lightning.scoring.graded import graded
from dgd_lightning.scoring.harness_rules import FILTERS, harness_verdicts
from dgd_lightning.scoring.math_grader import MathGrader
from dgd_lightning.scoring.summary import length_group, rates
from dgd_lightning.types import Score, Summary

GOLD = "She has 1,200 and gives away 120.\n#### 1,080"
VERDICTS = [  # of version 0.4.13's own code
    ("#### 1080", 1, 1),
    ("#### 1,080.", 1, 1),
    ("#### $1080", 0, 1),
    ("####1080", 0, 1),
    ("#### 1080.0", 0, 0),
    ("#### 1080\n#### 7", 1, 0),  # the first mark, the last number
    ("#### -1080", 0, 0),
    ("#### Step 1\n#### 1080", 1, 1),
    ("The answer is 1080. That took 3 steps.", 0, 0),
    ("The answer is 1080. That took a day.", 0, 1),
    ("It is $1,080.", 0, 1),
    ("1080 ,", 0, 1),  # one comma alone is no number
    ("1080 ..", 0, 0),  # two marks pass for one
    ("１０８０", 0, 0),
    ("none", 0, 0),
    ("", 0, 0),
]


@pytest.mark.parametrize(("answer", "strict", "flexible"), VERDICTS)
def test_known_verdicts(answer: str, strict: int, flexible: int) -> None:
    assert harness_verdicts(answer, GOLD) == {"strict-match": strict, "flexible-extract": flexible}


@pytest.mark.slow
def test_the_harness_own_code_says_the_same() -> None:
    extraction = pytest.importorskip("lm_eval.filters.extraction")
    metrics = pytest.importorskip("lm_eval.api.metrics")
    task = yaml.safe_load((Path(extraction.__file__).parents[1] / "tasks" / "gsm8k" / "gsm8k.yaml").read_text())
    assert [one["name"] for one in task["filter_list"]] == [*FILTERS]
    ignored = ("metric", "aggregation", "higher_is_better")
    settings = {name: value for name, value in task["metric_list"][0].items() if name not in ignored}
    draw = random.Random(0)
    answers = [answer for answer, _, _ in VERDICTS]
    for _ in range(2000):  # marks put in and characters taken out
        text = [*draw.choice(answers)]
        for _ in range(draw.randint(1, 4)):
            place = draw.randint(0, len(text))
            text[place : place + draw.randint(0, 1)] = draw.choice(["", "1", "0", ".", ",", "$", "-", "#### ", "\n"])
        answers.append("".join(text))
    for answer in answers:
        for rule in task["filter_list"]:
            pattern = {name: value for name, value in rule["filter"][0].items() if name != "function"}
            ((found,),) = extraction.RegexFilter(**pattern).apply([[answer]], [{}])
            own = metrics.exact_match_fn(predictions=[found], references=[GOLD], **settings)["exact_match"]
            assert harness_verdicts(answer, GOLD)[rule["name"]] == own, answer


def test_they_stand_beside_our_score_in_rows_and_tables() -> None:
    row = {"question": "How many?", "answer": GOLD, "idx": "1"}
    grader = MathGrader()
    found = []
    for arm, answer in (("a", "#### 1080"), ("b", "The answer is 1080. That took 3 steps.")):
        for tokens, score in ((10, 1.0), (5000, None)):
            details = remarked(row, answer, Score(score, [], ""), [grader]).details
            about = {"arm": arm, "prompt_tokens": tokens, "grading": details}
            found.append(graded({**row, "idx": f"{tokens}", "score": score, "dgd": about}))
    assert rates(found[:2]).lm_eval == {"strict-match": 1.0, "flexible-extract": 1.0}
    assert rates(found[2:]).lm_eval == {"strict-match": 0.0, "flexible-extract": 0.0}

    def cells(table: Table | None) -> dict[str, list[str]]:
        assert table is not None
        return {"".join(str(column.header).split()): [*column.cells] for column in table.columns}

    assert cells(rate_table(found))["strict-match"] == ["100.0%\n2/2", "0.0%\n0/2"]
    by_length = cells(group_table(found, "by length", length_group, ["a", "b"]))
    assert by_length["a:flexible-extract"] == ["100.0%  1/1"] * 2
    assert by_length["b:flexible-extract"] == ["0.0%  0/1"] * 2
    summary = Summary()
    add_solve_rates(summary, found, [])
    assert summary.cells["b"] == {"solved": "100.0%", "strict-\nmatch": "0.0%", "flexible-\nextract": "0.0%"}


def test_other_rows_have_none() -> None:
    row = {"problem": "?", "answer": "1", "idx": "1"}
    assert remarked(row, "1", Score(1.0, [], ""), [MathGrader()]).details is None
    assert rates([graded({**row, "score": 1})]).lm_eval is None
