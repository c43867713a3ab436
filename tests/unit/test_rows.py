"""Prediction rows: what a method says of itself is held against what it did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from decode_tools import random_prompts
from tiny import make_pair
from torch import Tensor

from dgd_lightning.decode.call import Call
from dgd_lightning.errors import InputError
from dgd_lightning.methods.autoregressive import Autoregressive
from dgd_lightning.methods.base import Method
from dgd_lightning.methods.speculative import Speculative
from dgd_lightning.modules.arms import Arm
from dgd_lightning.modules.rows import prediction_row
from dgd_lightning.pair import Pair
from dgd_lightning.types import DecodeOutput, RankedAnswer, Task


@dataclass(frozen=True)
class Forgetful(Method):
    """Drafts blocks and does not say so."""

    def generate(self, pair: Pair, prompts: Sequence[Tensor], call: Call) -> list[DecodeOutput]:
        return Speculative().generate(pair, prompts, call)


class Letters:
    """A tokenizer."""

    def decode(self, tokens: list[int], **_: Any) -> str:
        return str(tokens)


def test_an_answer_that_nothing_ranked_has_no_score() -> None:
    tokens = torch.tensor([1, 2])
    answers = [RankedAnswer(tokens, score, None, 7, "length") for score in (1.5, float("-inf"), None)]
    pair = Pair(make_pair().target, None, Letters())
    (output,) = Autoregressive().generate(pair, [tokens], Call(3))
    output = output._replace(trace=output.trace._replace(answers=answers, chosen=0))
    row = prediction_row(Arm("a", Autoregressive()), Task("t", None, "x", {}), tokens, output, pair=pair, limit=99)
    assert [one.get("score", "none") for one in row["dgd"]["answers"]] == [1.5, None, "none"]


def boasting_row(said: Any) -> dict[str, Any]:
    """The row of a method that says this of its answer."""

    class Boasting(Autoregressive):
        def record(self, output: DecodeOutput) -> dict[str, Any]:
            return said  # type: ignore[no-any-return]

    (prompt,) = random_prompts(1, seed=5)
    pair = Pair(make_pair().target, None, Letters())
    (output,) = Boasting().generate(pair, [prompt], Call(3))
    row = prediction_row(Arm("a", Boasting()), Task("t", None, "x", {}), prompt, output, pair=pair, limit=99)
    return row["dgd"]


def test_a_methods_own_facts_change_none_of_the_others() -> None:
    others = boasting_row({})
    row = boasting_row({"arm": "b", "seed": 9, "tokens": 99, "odds": [float("inf"), 0.5], "mean": torch.tensor(2.0)})
    timed = {name for name in others if "second" in name}  # each decoding has its own
    assert {name: row[name] for name in others if name not in timed} == {
        name: value for name, value in others.items() if name not in timed
    }
    assert {name: row[name] for name in row if name not in others} == {"odds": [None, 0.5], "mean": 2.0}


@pytest.mark.parametrize("said", [None, [1], {"of": object()}])
def test_a_record_that_no_row_can_hold_is_named(said: Any) -> None:
    with pytest.raises(InputError, match=r"^model.arms\[a\].method: expected a record"):
        boasting_row(said)


def test_a_method_that_drafts_must_say_its_block_size() -> None:
    pair, (prompt,) = make_pair(block_size=4), random_prompts(1, seed=5)
    pair = Pair(pair.target, pair.draft, Letters())
    (output,) = Speculative().generate(pair, [prompt], Call(30))
    accepted = output._replace(trace=output.trace._replace(verified_lengths=[1, 3]))
    more: dict[str, Any] = {"pair": pair, "limit": 99}
    decoded = (Task("t", None, "x", {}), prompt, accepted)
    assert prediction_row(Arm("a", Speculative()), *decoded, **more)["dgd"]["block_size"] == 4
    with pytest.raises(InputError, match=r"^model\.arms\[a\]\.method: expected verifications of at most 1 tokens"):
        prediction_row(Arm("a", Forgetful()), *decoded, **more)
