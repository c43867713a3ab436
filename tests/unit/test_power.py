"""Power sampling around its distribution: batches, drafts, prefixes, stop strings, records, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from decode_tools import random_prompts, tokens_of
from guided_tools import ragged, readout_of, tapped
from tiny import make_pair, make_target
from torch import Tensor

from dgd_lightning import (
    Blend,
    DecodeOutput,
    InputError,
    Majority,
    Pair,
    Power,
    autoregressive_generate,
    make_prefix_cache,
    power_generate,
    speculative_generate,
)
from dgd_lightning.decode.call import Call
from dgd_lightning.decode.replay import replay
from dgd_lightning.decode.sampling import sampling_params
from dgd_lightning.methods.power import REFERENCE_TOP_K

EXACT = 1e-9
LIMIT, STOPS = 20, [3, 9, 17]
SHORT: dict[str, Any] = {"max_new_tokens": LIMIT, "alpha": 2.0, "steps": 3, "blocks": 4, "stop_token_ids": STOPS}


def details(output: DecodeOutput) -> dict[str, Any]:
    assert output.trace.details is not None
    return output.trace.details


@pytest.fixture(scope="module")
def pair() -> Pair:
    return make_pair(block_size=4)


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"speculative": False},
        {"beta": 0.4},
        {"beta": -0.5, "readout": "other"},
        {"beta": -0.5, "readout": "without"},
        {"beta": 0.5, "readout": "noise"},
        {"beta": 0.5, "readout": "shuffled"},
        {"mode": "reference"},
        {"mode": "smc", "particles": 3, "steps": 10},
    ],
    ids=str,
)
def test_chains_of_a_batch_are_those_of_single_prompts(pair: Pair, knobs: dict[str, Any]) -> None:
    """Ragged rows, each at its own step: nothing of one gets into another."""
    prompts, seeds = ragged(4, seed=8), [5, 6, 7, 8]
    given = SHORT | knobs
    kind = given.pop("readout", "draft")

    def readout(some: list[Tensor]) -> Any:
        return "draft" if kind == "draft" else readout_of(kind, pair, some)

    together = power_generate(pair, prompts, seed=seeds, readout=readout(prompts), **given)
    for prompt, seed, output in zip(prompts, seeds, together, strict=True):
        (alone,) = power_generate(pair, [prompt], seed=[seed], readout=readout([prompt]), **given)
        assert alone.tokens.tolist() == output.tokens.tolist()
        assert alone.acceptance_lengths == output.acceptance_lengths
        same = {"log_p", "log_weight", "log_evidence"} & set(details(alone))
        assert {name: details(alone)[name] for name in same} == pytest.approx(
            {name: details(output)[name] for name in same}, abs=EXACT
        )
    assert len({len(output.tokens) for output in together}) > 1


@pytest.mark.parametrize("beta", [0.0, 0.4])
def test_drafts_checked_by_exact_match_give_the_plain_chain(pair: Pair, beta: float) -> None:
    """Seed for seed: every token, cut and decision."""
    prompts, given = random_prompts(3, seed=4), SHORT | {"beta": beta, "seed": 1}
    plain = power_generate(pair, prompts, speculative=False, **given)
    fast = power_generate(pair, prompts, scheme="exact_match", **given)
    assert tokens_of(fast) == tokens_of(plain)
    assert sum(one.trace.target_forwards for one in fast) < sum(one.trace.target_forwards for one in plain)
    for one, other in zip(plain, fast, strict=True):
        for name in ("cut", "length", "accepted"):
            assert details(one)["steps"][name] == details(other)["steps"][name]
        assert sum(one.acceptance_lengths) == sum(other.acceptance_lengths)
        assert details(one)["steps"]["log_ratio"] == pytest.approx(details(other)["steps"]["log_ratio"], abs=EXACT)


@pytest.mark.parametrize("beta", [0.0, 0.4])
def test_what_is_recorded_is_what_a_replay_says(pair: Pair, beta: float) -> None:
    """log p and log Z of the answer, from reading prompt and answer once more."""
    prompts, alpha = random_prompts(3, seed=4), 2.0
    blend, method = Blend(beta), Power(alpha, beta=beta)
    for prompt, output in zip(prompts, power_generate(pair, prompts, beta=beta, seed=2, **SHORT), strict=True):
        logits = torch.cat(
            [
                blend.mix_along(part.target, part.readouts[0], part.first)
                for part in replay(pair, prompt, [output.tokens], [method.readout])  # type: ignore[list-item]
            ]
        )
        log_p = logits.double().log_softmax(-1)
        chosen = log_p.gather(1, output.tokens[:, None])[:, 0]
        found = details(output)
        assert found["log_p"] == pytest.approx(chosen.sum().item(), abs=EXACT)
        assert found["alpha_log_p"] == pytest.approx(alpha * chosen.sum().item(), abs=EXACT)
        assert found["log_weight"] == pytest.approx((alpha * log_p).logsumexp(-1).sum().item(), abs=EXACT)
        steps = found["steps"]
        assert found["acceptance_rate"] == sum(steps["accepted"]) / len(steps["accepted"])
        assert steps["log_p"][-1] == found["log_p"]
        assert output.trace.states is not None
        assert output.trace.states[-1].tolist() == output.tokens.tolist()
        assert found["tokens_drawn"] == sum(output.acceptance_lengths) + 1
        assert output.stop_reason == ("stop" if output.tokens[-1] in torch.tensor(STOPS) else "length")


def test_an_answer_that_ends_while_it_grows_takes_the_last_steps_alone(pair: Pair) -> None:
    prompts, steps, blocks = random_prompts(12, seed=4), 3, 4
    outputs = power_generate(pair, prompts, seed=3, **SHORT)
    short = 0
    for output in outputs:
        limits = details(output)["steps"]["limit"]
        assert limits[-steps:] == [LIMIT] * steps
        assert limits == sorted(limits)
        assert output.trace.states is not None
        if len(output.trace.states[0]) < LIMIT // blocks:
            assert limits == [LIMIT] * steps
            short += 1
    assert short
    endless = power_generate(pair, prompts[:2], seed=3, **(SHORT | {"stop_token_ids": []}))
    for output in endless:
        assert details(output)["steps"]["limit"] == [limit for limit in (5, 10, 15, 20) for _ in range(steps)]


def test_guided_noise_is_of_the_place_not_of_the_step(pair: Pair) -> None:
    """Cut anew at the same place, the same text meets the same noise: its log p is that of a replay at every step."""
    (prompt,) = random_prompts(1, seed=4)
    noise = readout_of("noise", pair, [prompt])
    given = SHORT | {"beta": 0.5, "readout": noise, "steps": 8, "blocks": 1, "seed": 5}
    (output,) = power_generate(pair, [prompt], **given)
    assert output.trace.states is not None
    assert len(output.trace.states) > 2
    logs = [
        value
        for value, taken in zip(*(details(output)["steps"][n] for n in ("log_p", "accepted")), strict=True)
        if taken
    ]
    for state, log_p in zip(output.trace.states[1:], logs, strict=True):
        logits = [
            Blend(0.5).mix_along(part.target, part.readouts[0], part.first)
            for part in replay(pair, prompt, [state], [noise])
        ]
        chosen = torch.cat(logits).double().log_softmax(-1).gather(1, state[:, None])
        assert log_p == pytest.approx(chosen.sum().item(), abs=EXACT)


def test_alpha_of_one_takes_every_proposal_of_full_length(pair: Pair) -> None:
    """Then Z is 1, and nothing but lengths decides."""
    prompts = random_prompts(3, seed=4)
    outputs = power_generate(pair, prompts, seed=3, **(SHORT | {"alpha": 1.0, "stop_token_ids": []}))
    assert all(all(details(output)["steps"]["accepted"]) for output in outputs)


def test_prefixes_and_several_rows_of_a_prompt(pair: Pair) -> None:
    prompt = random_prompts(3, seed=9)[0]
    given = SHORT | {"num_return_sequences": 3, "seed": 4}
    plain = power_generate(pair, [prompt], **given)
    prefix = make_prefix_cache(pair.target, prompt[: len(prompt) // 2], tapped(pair))
    assert tokens_of(power_generate(pair, [prompt], prefixes=[prefix], **given)) == tokens_of(plain)
    assert len({tuple(tokens) for tokens in tokens_of(plain)}) == 3


def test_stop_strings_end_answers_of_chains(pair: Pair) -> None:
    """As in other methods: a chain with stop strings is the one with the stop tokens that they stand for."""
    named = Pair(pair.target, pair.draft, Letters())  # type: ignore[arg-type]
    prompts, given = random_prompts(6, seed=3), SHORT | {"seed": 1}
    words = [f"{stop:02d}" for stop in STOPS]
    for mode in ({}, {"beta": 0.4}, {"mode": "smc", "particles": 3, "steps": 10}):
        by_token = power_generate(pair, prompts, **(given | mode))
        by_word = power_generate(named, prompts, stop_strings=words, **(given | mode | {"stop_token_ids": []}))
        assert tokens_of(by_word) == tokens_of(by_token)
        assert [one.stop_reason for one in by_word] == [one.stop_reason for one in by_token]
        assert {"stop", "length"} >= {one.stop_reason for one in by_word} > set()


def test_a_chain_may_begin_at_an_answer_that_a_stop_string_ended(pair: Pair) -> None:
    named = Pair(pair.target, pair.draft, Letters())  # type: ignore[arg-type]
    prompts, given = random_prompts(1, seed=3), {"max_new_tokens": 4, "blocks": 1, "steps": 1, "stop_strings": ["1 03"]}
    (output,) = power_generate(named, prompts, start=[torch.tensor([1, 3])], seed=1, **given)  # type: ignore[arg-type]
    assert output.trace.states is not None
    assert output.trace.states[0].tolist() == [1, 3]
    with pytest.raises(InputError, match=r"start\[0\]: expected an answer that ends"):
        power_generate(named, prompts, start=[torch.tensor([1, 3, 4, 5])], **given)  # type: ignore[arg-type]


def test_the_reference_filters_as_the_published_code_does() -> None:
    """transformers' generate keeps the 50 likeliest where nothing is said; log Z is over these."""
    target = make_target(vocab_size=128)
    pair = Pair(target, None, None)
    (prompt,) = random_prompts(1, seed=4, vocab=128)
    (output,) = power_generate(
        pair, [prompt], max_new_tokens=12, alpha=0.5, steps=1, blocks=1, mode="reference", speculative=False, seed=1
    )
    (part,) = replay(pair, prompt, [output.tokens], [])
    log_p = part.target.double().log_softmax(-1)
    best = log_p.topk(REFERENCE_TOP_K, dim=-1).values
    assert output.trace.log_normalisers is not None
    expected = (0.5 * best).logsumexp(-1)
    torch.testing.assert_close(output.trace.log_normalisers, expected, rtol=0, atol=EXACT)
    chosen = log_p.gather(1, output.tokens[:, None])
    assert (chosen >= best[:, -1:]).all()


def test_exponents_rise_over_the_ramp() -> None:
    assert Power(4.0, blocks=4, mode="smc", ramp=2).alphas() == [2.5, 4.0, 4.0, 4.0]
    assert Power(4.0, blocks=4, mode="smc").alphas() == [4.0] * 4
    assert Power(4.0, blocks=2, mode="smc", ramp=9).alphas() == [2.5, 4.0]
    for alpha in (1e-17, 0.1):
        assert Power(alpha, blocks=2, mode="smc").alphas() == [alpha] * 2  # not rounded, to 0 either
    assert Power(blocks=16).levels(3072) == [192 * number for number in range(1, 17)]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "alpha": ({"alpha": 0.0}, "alpha: expected a finite number above 0"),
    "negative": ({"alpha": -1}, "alpha: expected a finite number above 0"),
    "nan": ({"alpha": math.nan}, "alpha: expected a finite number above 0"),
    "several betas": ({"beta": [0.1, 0.2]}, "beta: expected one number"),
    "betas of particles": (
        {"beta": [0.1, 0.2], "mode": "smc", "particles": 2, "steps": 10},
        "beta: expected one number",
    ),
    "steps": ({"steps": 0}, "steps: expected an integer of at least 1"),
    "blocks": ({"blocks": 0}, "blocks: expected an integer of at least 1"),
    "many blocks": ({"blocks": 21}, "blocks: expected at most 20, the limit of new tokens"),
    "mode": ({"mode": "mcmc"}, "mode: expected mh or reference or smc"),
    "temperature": ({"temperature": 1.0}, "temperature: expected nothing: tokens are drawn at temperature 1/α"),
    "top_k": ({"top_k": 5}, "top_k: expected nothing: tokens are drawn at temperature 1/α, and a filter"),
    "top_p": ({"top_p": 0.9}, "top_p: expected nothing"),
    "particles": ({"particles": 4}, "particles: expected nothing: mode mh has one answer"),
    "steps of smc": ({"mode": "smc", "blocks": 2}, "steps: expected nothing: a population makes no steps"),
    "readout": ({"readout": "noise"}, "readout: expected nothing: with β 0 nothing is blended"),
    "start": (
        {"start": [torch.tensor([1, 2])] * 2},
        r"start\[0\]: expected an answer that ends with its first stop token",
    ),
    "late start": ({"start": [torch.tensor([3, 9])] * 2}, r"start\[0\]: expected an answer that ends"),
    "few starts": ({"start": [torch.tensor([3])]}, "start: expected an answer for each of 2 chains"),
    "block size": ({"block_size": 99}, "block_size: expected an integer from 2 to 4"),
    "idle block size": ({"speculative": False, "block_size": 3}, "block_size: expected nothing: token by token"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_told_in_one_line(bad: str, pair: Pair) -> None:
    knobs, told = BAD[bad]
    prompts = random_prompts(2, seed=4)
    if knobs.get("readout") == "noise":
        knobs = {"readout": readout_of("noise", pair, prompts)}
    with pytest.raises(InputError, match=told) as error:
        power_generate(pair, prompts, **(SHORT | knobs))
    assert "\n" not in str(error.value)


def test_a_readout_that_can_not_run_on_a_block_is_refused(pair: Pair) -> None:
    """One of a user's own, whose begin() refuses more than a token at a time."""
    from dgd_lightning.decode.readouts.draft import DraftReadout

    class Slow(DraftReadout):
        def begin(self, pair: Any, request: Any, width: int) -> Any:
            if width > 1:
                raise InputError("readout", expected="token by token", received=width, hint="set speculative: false")
            return super().begin(pair, request, width)

    prompts = random_prompts(1, seed=4)
    with pytest.raises(InputError, match="readout: expected token by token"):
        power_generate(pair, prompts, beta=0.3, readout=Slow(), **SHORT)
    assert power_generate(pair, prompts, beta=0.3, readout=Slow(), speculative=False, **SHORT)


class Letters:
    """A tokenizer whose texts are the ids."""

    eos_token_id = None

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(f"{number:02d}" for number in ids)


def parity(text: str) -> str | None:
    """The result of an answer, for the vote: whether its first token is even; none where it is 0."""
    first = int(text.split()[0])
    return None if first == 0 else "even" if first % 2 == 0 else "odd"


def listed(text: str) -> list[str]:
    """A rule that gives what can't be counted."""
    return [text]


def failing(text: str) -> str:
    """A rule with a fault."""
    raise ValueError("no number")


def test_the_majority_decides(pair: Pair) -> None:
    prompts = random_prompts(6, seed=4)
    named = Pair(pair.target, pair.draft, Letters())  # type: ignore[arg-type]
    method = Majority(f"{parity.__module__}.parity", num_answers=5)
    call = Call(6, sampling_params(1.5), seed=[*range(6)])
    for output in method.generate(named, prompts, call):
        answers, trace = output.trace.answers, output.trace
        assert answers is not None
        results = [parity(Letters().decode(one.tokens.tolist())) for one in answers]
        assert details(output)["results"] == results
        counts = {result: results.count(result) for result in results if result is not None}
        assert counts[results[trace.chosen]] == max(counts.values()) == details(output)["votes"]  # type: ignore[index]
        assert output.tokens.tolist() == answers[trace.chosen].tokens.tolist()  # type: ignore[index]
        assert trace.spent is not None
        assert trace.spent[0] > trace.target_forwards
    for rule, told in (("listed", "list of "), ("failing", "ValueError: no number")):
        with pytest.raises(InputError, match=f"result: expected a rule that gives a text or None .* {told}"):
            Majority(f"{parity.__module__}.{rule}", num_answers=2).generate(named, prompts, call)
    with pytest.raises(InputError, match="temperature: expected above 0"):
        method.generate(named, prompts, Call(6))
    with pytest.raises(InputError, match="num_return_sequences: expected 1"):
        method.generate(named, prompts, call._replace(num_return_sequences=2))
    for path in ("number", "no.such.rule", "dgd_lightning.scoring.final_results.many", "math.pi"):
        with pytest.raises(InputError, match="result: expected a function's import path"):
            Majority(path)


def test_proposals_at_a_low_temperature_are_where_drafts_are_good(pair: Pair) -> None:
    """The chain's proposals and plain sampling at 1/α have one law: the same seed gives the same first answer."""
    prompts, seeds = random_prompts(3, seed=4), [1, 2, 3]
    given = {"max_new_tokens": LIMIT, "stop_token_ids": STOPS, "seed": seeds}
    cold = speculative_generate(pair, prompts, temperature=0.5, **given)  # type: ignore[arg-type]
    slow = autoregressive_generate(pair, prompts, temperature=0.5, **given)  # type: ignore[arg-type]
    for scheme, expected in (("rejection", cold), ("exact_match", slow)):
        outputs = power_generate(pair, prompts, scheme=scheme, **(SHORT | {"blocks": 1, "seed": seeds}))  # type: ignore[arg-type]
        assert [one.trace.states[0].tolist() for one in outputs] == tokens_of(expected)  # type: ignore[index]
