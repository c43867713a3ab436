"""Sessions and batches: log-probabilities of what was committed, and rows that go back and decode on from there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from decode_tools import random_prompts, tokens_of
from tiny import make_pair
from torch import Tensor

from dgd_lightning.decode.batch import Batch, choose
from dgd_lightning.decode.blending import Blend
from dgd_lightning.decode.call import Call, check_request
from dgd_lightning.decode.drafter import Drafter, propose
from dgd_lightning.decode.readouts.draft import DraftReadout
from dgd_lightning.decode.replay import replay
from dgd_lightning.decode.sampling import sampling_params
from dgd_lightning.decode.session import Session
from dgd_lightning.decode.verify import Verdict, verify_match
from dgd_lightning.methods.autoregressive import autoregressive_generate
from dgd_lightning.methods.guided import guided_generate
from dgd_lightning.methods.speculative import speculative_generate
from dgd_lightning.pair import Pair

EXACT = 1e-10  # fp64 logits of two shapes of one forward


@torch.no_grad()
def teacher_forced(pair: Pair, prompt: Tensor, tokens: Tensor) -> Tensor:
    """[T, V] log-probabilities that transformers gives before each token."""
    logits = pair.target.model(torch.cat([prompt, tokens])[None]).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_log_probabilities_of_every_token_are_reported_on_request(temperature: float) -> None:
    pair, prompts = make_pair(block_size=5), random_prompts(3, seed=4)
    knobs: dict[str, Any] = {"max_new_tokens": 12, "temperature": temperature, "seed": 3, "log_probs": True}
    for outputs in (
        autoregressive_generate(pair, prompts, **knobs),
        speculative_generate(pair, prompts, **knobs),
        guided_generate(pair, prompts, beta=0.0, **knobs),
    ):
        for prompt, (tokens, _, _, trace) in zip(prompts, outputs, strict=True):
            log_p = teacher_forced(pair, prompt, tokens)
            torch.testing.assert_close(trace.log_probs, log_p.gather(1, tokens[:, None])[:, 0], rtol=0, atol=EXACT)
            expected = (log_p / temperature).logsumexp(-1) if temperature else torch.zeros(len(tokens)).double()
            torch.testing.assert_close(trace.log_normalisers, expected, rtol=0, atol=EXACT)
    assert autoregressive_generate(pair, prompts, max_new_tokens=2)[0].trace.log_probs is None


def test_those_of_guided_tokens_are_the_blends() -> None:
    pair, (prompt,) = make_pair(block_size=5), random_prompts(1, seed=4)
    knobs: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.7, "seed": 3, "log_probs": True, "beta": 0.4}
    fast, slow = (guided_generate(pair, [prompt], speculative=fast, **knobs)[0] for fast in (True, False))
    plain = autoregressive_generate(pair, [prompt], max_new_tokens=12, temperature=0.7, seed=3, log_probs=True)[0]
    for found in (fast, slow):
        parts = [
            Blend(0.4).mix_along(part.target, part.readouts[0], part.first)
            for part in replay(pair, prompt, [found.tokens], [DraftReadout()])
        ]
        log_p = torch.cat(parts).log_softmax(-1)
        chosen = log_p.gather(1, found.tokens[:, None])[:, 0]
        torch.testing.assert_close(found.trace.log_probs, chosen, rtol=0, atol=EXACT)
    assert not torch.allclose(slow.trace.log_probs[:1], plain.trace.log_probs[:1])  # type: ignore[index]


def decode_on(pair: Pair, batch: Batch, drafter: Drafter | None) -> list[list[int]]:
    """Greedily to the rows' ends, token by token or by drafted blocks."""
    while batch.active:
        positions = batch.positions(batch.width)
        if drafter is None:
            logits = batch.step(batch.last[:, None], positions).logits
            tokens = choose(logits, batch.request.sampling, batch.random_source, positions + 1)
            batch.commit(Verdict(tokens, torch.ones_like(batch.last)), logits)
        else:
            proposal = propose(drafter, batch, positions, "rejection")
            forward = batch.step(torch.cat([batch.last[:, None], proposal.tokens], dim=1), positions)
            batch.commit(verify_match(proposal.tokens, forward.logits.argmax(-1)), forward.logits)
            drafter.extend(forward.features, positions)
        batch.synchronise()
    return tokens_of(batch.outputs(drafts=0))


@torch.no_grad()
@pytest.mark.parametrize("drafted", [False, True])
@pytest.mark.parametrize("stay", [(1, 5, 9), (11, 2, 0)])
def test_rows_go_back_and_decode_on(drafted: bool, stay: Sequence[int]) -> None:
    """What is decoded again is the same, whatever the caches hold beyond the cut; limits and stops hold as before."""
    pair, prompts = make_pair(block_size=4), random_prompts(3, seed=9)
    assert pair.draft is not None
    (stop,) = autoregressive_generate(pair, prompts[:1], max_new_tokens=8)[0].tokens[-1:].tolist()
    request = check_request(pair, prompts, Call(12, sampling_params(), stop_token_ids=[stop]))
    width = 4 if drafted else 1
    drafter = Drafter(pair.target, pair.draft, request, width) if drafted else None
    session = Session(
        pair.target,
        request,
        width=width,
        layer_ids=pair.draft.config.target_layer_ids,
        companions=[] if drafter is None else [drafter.cache],
    )
    extend = None if drafter is None else drafter.extend
    batch = Batch.after_prefill(session, extend, keep_finished=True)
    first = decode_on(pair, batch, drafter)
    assert first == tokens_of(autoregressive_generate(pair, prompts, max_new_tokens=12, stop_token_ids=[stop]))
    kept = [min(count, len(row) - 1) for count, row in zip(stay, first, strict=True)]  # no stop token
    limits = dict.fromkeys(range(3), 12)
    batch.resume(dict(enumerate(kept)), limits)
    # Another continuation first: its keys and values must not be seen after the next cut.
    batch.last = (batch.last + 1) % pair.target.vocab_size
    decode_on(pair, batch, drafter)
    assert tokens_of(batch.outputs(drafts=0)) != first
    for row, tokens in enumerate(first):
        batch.put(row, torch.tensor(tokens), torch.zeros(0, 0))
    batch.resume(dict(enumerate(kept)), limits)
    assert decode_on(pair, batch, drafter) == first
    # One row alone goes on, the others stay at their ends; and it ends where it is told to.
    batch.resume({1: 1}, {1: 3})
    assert batch.active == [1]
    assert decode_on(pair, batch, drafter) == [first[0], first[1][:3], first[2]]
    for count, own, (_, accepted, _, trace) in zip(kept, first, batch.outputs(drafts=1), strict=True):
        assert sum(accepted) >= 2 * (len(own) - 1) - max(count, 1)  # all that was drawn, what was taken back too
        assert len(trace.verified_lengths) == len(accepted) == trace.target_forwards


@torch.no_grad()
def test_what_is_drawn_again_is_drawn_with_other_numbers() -> None:
    pair, prompts = make_pair(), random_prompts(2, seed=9)
    request = check_request(pair, prompts, Call(24, sampling_params(1.3), stop_token_ids=(), seed=[1, 2]))
    batch = Batch.after_prefill(Session(pair.target, request, width=1), keep_finished=True)
    first = decode_on(pair, batch, None)
    limits = {0: 24, 1: 24}
    batch.resume({0: 8, 1: 8}, limits)
    assert decode_on(pair, batch, None) == first  # the same positions have the same numbers
    batch.resume({0: 8, 1: 8}, limits)
    batch.renew([0, 1], [3, 4])
    second = decode_on(pair, batch, None)
    assert [row[:8] for row in second] == [row[:8] for row in first]
    assert all(mine != theirs for mine, theirs in zip(second, first, strict=True))


@torch.no_grad()
def test_a_session_has_room_for_proposals_in_spare_slots() -> None:
    pair, (prompt,) = make_pair(), random_prompts(1, seed=9)
    request = check_request(pair, [prompt], Call(8, sampling_params()))
    session = Session(pair.target, request._replace(spare=3), width=1)
    plain = Session(pair.target, request, width=1)
    for one in (session, plain):
        one.prefill()
    tokens = torch.tensor([[5, 6, 7]])
    positions = len(prompt) + torch.arange(3)[None]
    slots = request.capacity(1) + torch.arange(3)[None]
    aside = session.step(tokens, positions, max_length=request.capacity(1) + 3, slots=slots).logits
    there = plain.step(tokens, positions, max_length=len(prompt) + 3).logits
    torch.testing.assert_close(aside, there, rtol=0, atol=EXACT)
