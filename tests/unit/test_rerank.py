"""Reranking: scores against plain forwards, the choice, and that answers are those of the decoders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decode_tools import random_prompts, tokens_of
from guided_tools import naive_read, plain_forward, without_context
from tiny import make_pair
from torch import Tensor

from dgd_lightning.decode.blending import Blend, WarmUp
from dgd_lightning.decode.readouts.base import Readout
from dgd_lightning.decode.readouts.logit_lens import LogitLens
from dgd_lightning.decode.readouts.noise import Noise
from dgd_lightning.decode.readouts.without_context import WithoutContext
from dgd_lightning.errors import InputError
from dgd_lightning.methods.guided import guided_generate
from dgd_lightning.methods.rerank import rerank_generate
from dgd_lightning.methods.speculative import speculative_generate
from dgd_lightning.pair import Pair

SAME = 1e-8  # a sum of fp64 log-probabilities, from forwards of other shapes


@torch.no_grad()
def by_hand(pair: Pair, prompt: Tensor, answer: Tensor, beta: float = 0.0) -> float:
    """ln p of an answer under (1 − β)·target + β·layer 2, token by token by transformers' plain forward."""
    text, total = prompt.tolist(), 0.0
    for token in answer.tolist():
        logits = plain_forward(pair.target.model, text).logits[0, -1]
        logits = (1 - beta) * logits + beta * naive_read("lens", pair, prompt)(text)
        total += float(logits.log_softmax(-1)[token])
        text.append(token)
    return total


@pytest.mark.parametrize("rank_by", ["target", "likelihood", "blend"])
def test_the_best_of_drawn_answers(rank_by: Any) -> None:
    pair, prompts = make_pair(block_size=4), random_prompts(2, 5, longest=12)
    stops, knobs = [3, 9, 14, 20, 31, 44, 52], {"max_new_tokens": 8, "temperature": 1.2}
    blend: dict[str, Any] = {"blend": Blend(0.4), "readout": LogitLens(2)} if rank_by == "blend" else {}
    best = rerank_generate(
        pair, prompts, rank_by=rank_by, num_answers=5, seed=7, stop_token_ids=stops, **blend, **knobs
    )
    drawn = speculative_generate(pair, prompts, num_return_sequences=5, seed=7, stop_token_ids=stops, **knobs)
    for number, (prompt, output) in enumerate(zip(prompts, best, strict=True)):
        mine = drawn[5 * number : 5 * number + 5]
        answers = output.trace.answers
        assert answers is not None
        assert [one.tokens.tolist() for one in answers] == tokens_of(mine)
        assert [one.seed for one in answers] == [one.trace.seed for one in mine]
        expected = []
        for one in mine:
            total = by_hand(pair, prompt, one.tokens, 0.4 if rank_by == "blend" else 0.0)
            expected.append(total if rank_by == "target" else total / len(one.tokens))
        assert [one.score for one in answers] == pytest.approx(expected, abs=SAME)
        assert output.tokens.tolist() == mine[expected.index(max(expected))].tokens.tolist()
        assert len({len(one.tokens) for one in answers}) > 1  # else the length would not matter


def test_one_answer_per_beta() -> None:
    pair, prompts, betas = make_pair(block_size=4), random_prompts(2, 5, longest=12), [0.0, 0.5, -0.5, 1.0]
    knobs: dict[str, Any] = {"max_new_tokens": 8, "stop_token_ids": (), "temperature": 0.0}
    best = rerank_generate(pair, prompts, rank_by="target", betas=betas, **knobs)
    for at, output in enumerate(best):
        assert output.trace.answers is not None
        assert [one.beta for one in output.trace.answers] == betas
        for one in output.trace.answers:
            alone = guided_generate(pair, prompts, beta=one.beta, **knobs)[at]
            assert one.tokens.tolist() == alone.tokens.tolist()
        scores = [one.score for one in output.trace.answers]
        assert output.tokens.tolist() == output.trace.answers[scores.index(max(scores))].tokens.tolist()
    assert len({str(one.tokens.tolist()) for one in best[0].trace.answers or []}) > 1


def test_a_prompt_has_its_answers_in_any_batch_and_without_a_draft() -> None:
    pair, prompts = make_pair(block_size=4), random_prompts(3, 5, longest=12)
    knobs: dict[str, Any] = {"max_new_tokens": 6, "num_answers": 4}
    together = rerank_generate(pair, prompts, seed=[4, 5, 6], **knobs)
    alone = rerank_generate(pair, prompts[1:2], seed=[5], **knobs)
    assert together[1].tokens.tolist() == alone[0].tokens.tolist()
    assert [one.seed for one in together[1].trace.answers or []] == [one.seed for one in alone[0].trace.answers or []]
    bare = Pair(pair.target, None, None)
    assert len(rerank_generate(bare, prompts, seed=1, **knobs)[0].trace.answers or []) == 4


@pytest.mark.parametrize("betas", [None, [0.0, -0.5, 0.5]])
@pytest.mark.parametrize("like", [False, True])
def test_prompts_without_context_are_each_ranked_by_their_own(betas: list[float] | None, like: bool) -> None:
    pair, prompts = make_pair(block_size=4), random_prompts(3, 5, longest=12)

    def readout(bare: list[Tensor]) -> Readout:
        return Noise(WithoutContext(bare)) if like else WithoutContext(bare)

    bare = without_context(prompts)
    knobs: dict[str, Any] = {
        "max_new_tokens": 6, "betas": betas, "rank_by": "blend", "blend": Blend(-0.5),
        **({} if betas else {"num_answers": 3}),
    }  # fmt: skip
    together = rerank_generate(pair, prompts, readout=readout(bare), seed=[4, 5, 6], **knobs)
    others = rerank_generate(pair, prompts, readout=readout(bare[::-1]), seed=[4, 5, 6], **knobs)
    for number, output in enumerate(together):
        own = readout([bare[number]])
        (alone,) = rerank_generate(pair, [prompts[number]], readout=own, seed=[4 + number], **knobs)
        assert output.tokens.tolist() == alone.tokens.tolist()
        scores, expected = ([one.score for one in found.trace.answers or []] for found in (output, alone))
        assert scores == pytest.approx(expected, abs=SAME)
        assert output.trace.rank_seconds > 0
    assert [one.trace.answers[0].score for one in together if one.trace.answers] != [
        one.trace.answers[0].score for one in others if one.trace.answers
    ]


def test_a_schedule_counts_the_answers_tokens() -> None:
    pair, prompts = make_pair(block_size=4), random_prompts(1, 5, longest=12)
    knobs: dict[str, Any] = {"max_new_tokens": 4, "num_answers": 3, "seed": 2}
    blend = Blend(0.4, schedule=WarmUp(1000))
    late = rerank_generate(pair, prompts, rank_by="blend", blend=blend, readout=LogitLens(2), **knobs)
    never = rerank_generate(pair, prompts, rank_by="likelihood", **knobs)
    for one, other in zip(late[0].trace.answers or [], never[0].trace.answers or [], strict=True):
        assert one.score == pytest.approx(other.score, abs=0.05)  # β stays below 0.002
        assert one.score != other.score


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"rank_by": "votes"}, "rank_by"),
        ({"rank_by": "blend"}, "blend"),
        ({"temperature": 0.0}, "temperature"),
        ({"betas": []}, "betas"),
        ({"betas": [0.1, float("inf")]}, "betas"),
        ({"betas": [2.0], "blend": Blend(0.1, "probs")}, "betas"),
        ({"betas": 0.3}, "betas"),
        ({"betas": [0.1, 0.2], "num_answers": 4}, "num_answers"),
        ({"readout": LogitLens(2)}, "readout"),
        ({"seed": [1, 2, 3]}, "seed"),
        ({"num_answers": 0}, "num_answers"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"betas": [0.1, 0.2], "num_return_sequences": 2}, "num_return_sequences"),
    ],
)
def test_unusable_arguments_are_named(arguments: dict[str, Any], named: str) -> None:
    pair = make_pair(block_size=4)
    with pytest.raises(InputError, match=f"^{named}: "):
        rerank_generate(pair, [torch.tensor([3, 4])], max_new_tokens=4, **arguments)
