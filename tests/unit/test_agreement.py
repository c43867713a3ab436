"""Cohen's κ against worked examples, statsmodels, and a count over all pairs."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
from statsmodels.stats.inter_rater import cohens_kappa, to_table

from dgd_lightning.scoring.statistics import agreement, kappa


def test_a_worked_example() -> None:
    # 50 proposals, two readers: 20 both yes, 5 and 10 split, 15 both no. p_o = 0.7, p_e = 0.5·0.6 + 0.5·0.4 = 0.5
    table = [("y", "y")] * 20 + [("y", "n")] * 5 + [("n", "y")] * 10 + [("n", "n")] * 15
    first, second = zip(*table, strict=True)
    assert kappa(first, second) == pytest.approx(0.4, abs=1e-15)


def test_the_ends_of_the_scale() -> None:
    assert kappa("yn", "yn") == 1.0
    assert kappa("yn", "ny") == -1.0
    assert kappa("yynn", "ynyn") == 0.0
    assert kappa("yyy", "yyn") == 0.0  # one judge tells nothing apart
    assert math.isnan(kappa("yyy", "yyy"))  # neither does: 0/0
    assert math.isnan(kappa("", ""))
    with pytest.raises(ValueError, match="shorter"):
        kappa("yn", "y")


def _by_pairs(first: str, second: str) -> float:
    """Chance agreement as what it is: how often verdicts of two items drawn independently agree."""
    total = len(first)
    seen = sum(a == b for a, b in zip(first, second, strict=True)) / total
    chance = sum(a == b for a, b in itertools.product(first, second)) / total**2
    return (seen - chance) / (1 - chance)


@pytest.mark.parametrize("seed", range(20))
def test_equals_a_count_over_all_pairs_and_statsmodels(seed: int) -> None:
    rng = random.Random(seed)
    first = [rng.choice("yn") for _ in range(rng.randint(5, 60))]
    second = [one if rng.random() < 0.7 else rng.choice("yn") for one in first]
    first[:2], second[:2] = "yn", "yn"  # both tell something apart
    found = kappa(first, second)
    assert found == pytest.approx(_by_pairs("".join(first), "".join(second)), abs=1e-12)
    table, _ = to_table([["yn".index(a), "yn".index(b)] for a, b in zip(first, second, strict=True)])
    assert found == pytest.approx(cohens_kappa(table, return_results=False), abs=1e-12)


def _row(first: list[str] | None, second: list[str] | None) -> dict[str, Any]:
    def verdict(status: list[str] | None) -> dict[str, Any]:
        score = None if status is None else int("no" not in status)
        return {"score": score, "requirement_status": status or []}

    return {**verdict(first), "dgd": {"grading": {"second": verdict(second)}}}


def test_rows_per_rubric_and_per_task() -> None:
    rows = [
        _row(["yes", "yes"], ["yes", "no"]),
        _row(["no", "yes"], ["no", "yes"]),
        _row(["yes"], ["yes"]),
        _row(None, ["yes"]),  # a judge's error is no verdict
        _row(["yes"], None),
        {"score": 1, "requirement_status": ["yes"], "dgd": {"grading": {"cached": True}}},  # one judge
        {"score": 0, "requirement_status": []},  # no answer
        {**_row(["yes"], ["yes"]), "score": "perhaps"},  # as others write them
        _row(["yes", "no"], ["no"]),  # of other rubrics
        {**_row(["yes"], ["yes"]), "dgd": {"grading": {"second": "good"}}},
    ]
    found = agreement(rows)
    assert (found.tasks, found.rubrics) == (3, 5)
    assert found.task_share == pytest.approx(2 / 3)
    assert found.rubric_share == pytest.approx(4 / 5)
    assert found.task_kappa == kappa([1, 0, 1], [0, 0, 1])
    assert found.rubric_kappa == kappa("yynyy", "ynnyy")


def test_no_rows() -> None:
    found = agreement([])
    assert (found.tasks, found.rubrics) == (0, 0)
    assert math.isnan(found.task_share)
    assert math.isnan(found.rubric_kappa)
