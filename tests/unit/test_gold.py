"""Ranks, probabilities and the gold answers they are about, against sorting and counting by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dgd_lightning.data.chat import gold_answer
from dgd_lightning.data.prompts import PromptsData
from dgd_lightning.errors import InputError
from dgd_lightning.metrics.gold import confidence, gold_log_probability, gold_rank
from dgd_lightning.types import Task

CLOSE = 1e-12  # fp64, sums in another order


def counted_rank(logits: list[float], token: int) -> float:
    """The mean of the places that a token can take when equal ones are ordered by chance."""
    order = sorted(logits, reverse=True)
    places = [place for place, value in enumerate(order, 1) if value == logits[token]]
    return sum(places) / len(places)


@pytest.mark.parametrize("levels", [2, 5, 1000])  # few levels: many ties
def test_rank_is_the_mean_place_among_equals(levels: int, generator: torch.Generator) -> None:
    logits = torch.randint(levels, (4, 6, 17), generator=generator).double()
    tokens = torch.randint(17, (4, 6), generator=generator)
    found = gold_rank(logits, tokens)
    for at in [(row, slot) for row in range(4) for slot in range(6)]:
        assert found[at] == counted_rank(logits[at].tolist(), int(tokens[at]))


def test_constant_logits_are_neither_best_nor_worst() -> None:
    assert gold_rank(torch.zeros(3, 7), torch.tensor([0, 3, 6])).tolist() == [4.0, 4.0, 4.0]


def test_ranks_of_all_tokens_have_the_same_sum_with_ties_or_without(generator: torch.Generator) -> None:
    """Nobody gains by calling many tokens equal."""
    for levels in (1, 3, 10**6):
        logits = torch.randint(levels, (20,), generator=generator).float()
        assert gold_rank(logits.expand(20, 20), torch.arange(20)).sum() == 20 * 21 / 2


def test_probabilities(generator: torch.Generator) -> None:
    logits = 5 * torch.randn(8, 11, generator=generator, dtype=torch.float64)
    tokens = torch.randint(11, (8,), generator=generator)
    distributions = [[math.exp(value) / sum(map(math.exp, row)) for value in row] for row in logits.tolist()]
    expected = torch.tensor(
        [distribution[i] for distribution, i in zip(distributions, tokens.tolist(), strict=True)], dtype=torch.float64
    )
    assert (gold_log_probability(logits, tokens).exp() - expected).abs().max() < CLOSE
    assert (
        confidence(logits) - torch.tensor([max(distribution) for distribution in distributions], dtype=torch.float64)
    ).abs().max() < CLOSE


def test_half_precision_is_widened() -> None:
    logits = torch.tensor([[60.0, 0.0]], dtype=torch.bfloat16)
    assert gold_log_probability(logits, torch.tensor([1])).tolist() == [-60.0]


# Gold answers.


@pytest.mark.parametrize(
    ("file", "field", "id_field", "words"),
    [
        ("gsm8k_test.jsonl", "question", None, "#### 18"),
        ("HumanEval.jsonl.gz", "prompt", "task_id", "    for idx, elem in enumerate(numbers):"),
    ],
)
def test_gold_answers_of_real_data_sets(
    bench_data: Path, file: str, field: str, id_field: str | None, words: str
) -> None:
    tasks = PromptsData(str(bench_data / file), field=field, id_field=id_field).tasks
    assert words in gold_answer(tasks[0])
    assert all(map(gold_answer, tasks))


def task(**row: Any) -> Task:
    return Task("t1", None, "?", row)


@pytest.mark.parametrize(
    ("row", "field", "expected"),
    [
        ({"metadata": {"lab": {"answer": "lab"}}, "answer": "other"}, None, "lab"),
        ({"answer": "gsm"}, None, "gsm"),
        ({"solution": "so it is 7", "answer": "7"}, None, "so it is 7"),
        ({"solution": "so it is 7", "answer": "7"}, "answer", "7"),
        ({"canonical_solution": "    return 1\n"}, None, "    return 1\n"),
        ({"a": {"b": "deep"}}, "a.b", "deep"),
        ({"answer": 7}, None, "7"),
        ({"answer": -0.5}, None, "-0.5"),
    ],
)
def test_where_gold_answers_stand(row: dict[str, Any], field: str | None, expected: str) -> None:
    assert gold_answer(task(**row), field) == expected


@pytest.mark.parametrize(
    ("row", "field", "words"),
    [
        ({"rubrics": [], "messages": []}, None, "CL-bench's rows have rubrics, and no gold answer"),
        ({"answer": [7]}, None, "received [7]"),
        ({"answer": True}, None, "received True"),
        ({"answer": " \n"}, None, "received"),
        ({"answer": "yes"}, "soluton", "'soluton', received none, in a row with fields answer"),
        ({"answer": "\ud800"}, None, "surrogate"),
    ],
)
def test_no_gold_answer_is_told(row: dict[str, Any], field: str | None, words: str) -> None:
    with pytest.raises(InputError, match="task t1") as error:
        gold_answer(task(**row), field)
    assert words in str(error.value)


def test_no_logits_at_all() -> None:
    nothing: Tensor = torch.empty(0, 5)
    assert gold_rank(nothing, torch.empty(0, dtype=torch.long)).shape == (0,)
