"""The output distribution of the real loops, enumerated exactly; planted bugs; drafts of any acceptance.

Most run over the stub pair of ``distribution_tools``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distribution_tools import (
    BUG_IS_SEEN,
    TV_TOLERANCE,
    StubCache,
    StubDraft,
    output_law,
    stub_pair,
    target_law,
    total_variation,
)
from tiny import make_draft, make_target
from torch import Tensor

from dgd_lightning.decode import drafter, verify
from dgd_lightning.decode.sampling import probabilities, sampling_params
from dgd_lightning.methods import speculative
from dgd_lightning.methods.autoregressive import autoregressive_generate
from dgd_lightning.methods.speculative import speculative_generate
from dgd_lightning.pair import Pair


@pytest.mark.parametrize(
    ("scheme", "vocab", "block_size", "tokens", "knobs"),
    [
        ("rejection", 6, 2, 4, {"temperature": 1.0}),
        ("rejection", 3, 3, 4, {"temperature": 0.7}),
        ("rejection", 4, 3, 3, {"temperature": 1.3, "top_p": 0.9}),
        ("rejection", 6, 4, 4, {"temperature": 1.0, "top_k": 2}),
        ("exact_match", 6, 2, 3, {"temperature": 1.0}),
        ("exact_match", 3, 2, 4, {"temperature": 0.7}),
        ("exact_match", 3, 3, 3, {"temperature": 1.0}),
        ("exact_match", 4, 3, 3, {"temperature": 1.3, "top_p": 0.9}),
        ("exact_match", 6, 4, 4, {"temperature": 1.0, "top_k": 2}),
    ],
)
def test_law_is_the_targets(scheme: str, vocab: int, block_size: int, tokens: int, knobs: dict) -> None:
    pair, prompt = stub_pair(vocab, block_size), [1, 0, 2]
    distribution = output_law(speculative_generate, pair, prompt, tokens, scheme=scheme, **knobs)
    assert total_variation(distribution, target_law(pair, prompt, tokens, **knobs)) <= TV_TOLERANCE
    assert sum(distribution.values()) == pytest.approx(1.0, abs=TV_TOLERANCE)


def test_law_of_the_plain_decoder_and_with_a_stop_token() -> None:
    pair, prompt = stub_pair(3, 3), [0, 1]
    expected = target_law(pair, prompt, 3, stops=(2,), temperature=1.0)
    for generate in (autoregressive_generate, speculative_generate):
        # One path to a batch: a row that has stopped draws on, unread, as long as its batch runs.
        distribution = output_law(generate, pair, prompt, 3, rows=1, temperature=1.0, stop_token_ids=[2])
        assert total_variation(distribution, expected) <= TV_TOLERANCE


@pytest.mark.parametrize("scheme", ["rejection", "exact_match"])
def test_law_of_a_real_pair(scheme: str) -> None:
    """The same over a real target and draft in fp64: caches, masks and features take part in the distribution."""
    target = make_target(vocab_size=4, hidden_size=16, intermediate_size=16)
    pair, prompt, tokens = Pair(target, make_draft(target, block_size=3), None), [1, 0, 2], 3
    distribution = output_law(speculative_generate, pair, prompt, tokens, scheme=scheme, temperature=0.8, top_k=3)
    expected = {(): 1.0}
    for _ in range(tokens):
        paths = list(expected)
        with torch.no_grad():
            logits = target.model(torch.tensor([[*prompt, *path] for path in paths])).logits[:, -1]
        rows = probabilities(logits, sampling_params(0.8, top_k=3)).tolist()
        expected = {
            (*path, token): expected[path] * mass
            for path, row in zip(paths, rows, strict=True)
            for token, mass in enumerate(row)
            if mass > 0
        }
    assert total_variation(distribution, expected) <= TV_TOLERANCE


def plant_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    """q is computed at another temperature than the proposals were drawn at."""
    propose = speculative.propose

    def warm(*arguments: Any) -> Any:
        proposal = propose(*arguments)
        wrong = proposal.q.log().div(1.5).softmax(-1)
        return proposal._replace(q=wrong)

    monkeypatch.setattr(speculative, "propose", warm)


def plant_unsubtracted(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a rejection the target's own distribution is drawn from."""
    monkeypatch.setattr(verify, "residual", lambda p, q: p)


def plant_unclipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The residual is renormalised without clipping what the draft liked more."""
    monkeypatch.setattr(verify, "residual", lambda p, q: (p - q).abs() / (p - q).abs().sum(-1, keepdim=True))


def plant_unnormalised(monkeypatch: pytest.MonkeyPatch) -> None:
    """The residual keeps its mass below one, so that what is missing falls to the last token."""

    def rest(p: Tensor, q: Tensor) -> Tensor:
        kept = (p - q).clamp(min=0)
        return torch.cat([kept[..., :-1], 1 - kept[..., :-1].sum(-1, keepdim=True)], dim=-1)

    monkeypatch.setattr(verify, "residual", rest)


def plant_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rejected draft token is committed after all."""
    verify_rejection = verify.verify_rejection

    def reuse(proposals: Tensor, q: Tensor, p: Tensor, random_source: Any, positions: Tensor) -> verify.Verdict:
        tokens, lengths = verify_rejection(proposals, q, p, random_source, positions)
        rejected = (lengths <= proposals.shape[1])[:, None]
        kept = torch.cat([proposals, tokens[:, -1:]], dim=1)
        return verify.Verdict(torch.where(rejected, kept, tokens), lengths)

    monkeypatch.setattr(drafter, "verify_rejection", reuse)


def plant_shared_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draft and verifier read the same uniforms."""
    monkeypatch.setattr(verify, "TARGET", 0)


def plant_stale_anchor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proposals are drawn for one anchor and judged by the q of another."""
    propose = speculative.propose

    def stale(*arguments: Any) -> Any:
        proposal = propose(*arguments)
        return proposal._replace(q=proposal.q.roll(1, dims=1))

    monkeypatch.setattr(speculative, "propose", stale)


@pytest.mark.parametrize(
    "plant",
    [
        plant_temperature,
        plant_unsubtracted,
        plant_unclipped,
        plant_unnormalised,
        plant_reused,
        plant_shared_noise,
        plant_stale_anchor,
    ],
)
def test_planted_bugs_are_seen(plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    pair, prompt = stub_pair(3, 3), [1, 0, 2]
    distribution = output_law(speculative_generate, pair, prompt, 3, temperature=1.0)
    assert total_variation(distribution, target_law(pair, prompt, 3, temperature=1.0)) > BUG_IS_SEEN


class ChainDraft(StubDraft):
    """Proposes the target's own greedy chain; ``wrong(anchor, slot)`` says where it errs instead."""

    def __init__(self, pair: Any, block_size: int, texts: list[list[int]], wrong: Any) -> None:
        super().__init__(pair.target.vocab_size, block_size, 0)
        self.texts, self.wrong = texts, wrong

    def block(self, cache: StubCache, embeddings: Tensor, anchors: Tensor, *, longest_anchor: int) -> Tensor:
        logits = torch.zeros(*embeddings.shape[:2], self.table.shape[-1], dtype=torch.float64)
        for b, anchor in enumerate(anchors[:, 0].tolist()):
            text = next(t for t in self.texts if len(t) > anchor and t[anchor] == int(embeddings[b, 0, 0]))
            for slot in range(1, embeddings.shape[1]):
                token = text[anchor + slot] if anchor + slot < len(text) else 0
                logits[b, slot, (token + self.wrong(anchor, slot)) % logits.shape[-1]] = 1.0
        return logits


@pytest.mark.parametrize(
    ("wrong", "verified"),
    [
        pytest.param(lambda anchor, slot: 0, [4, 4, 4], id="always"),
        pytest.param(lambda anchor, slot: 1, [1] * 11, id="never"),
        pytest.param(lambda anchor, slot: slot == 2, [2] * 6, id="second-is-wrong"),
    ],
)
def test_stub_drafts(wrong: Any, verified: list[int]) -> None:
    pair = stub_pair(5, 4)
    prompt = torch.tensor([1, 2, 3])
    plain = autoregressive_generate(pair, [prompt], max_new_tokens=20)[0].tokens.tolist()
    pair.draft = ChainDraft(pair, 4, [[*prompt.tolist(), *plain]], wrong)
    output = speculative_generate(pair, [prompt], max_new_tokens=12)[0]
    assert output.tokens.tolist() == plain[:12]
    assert output.trace.verified_lengths == verified
    assert sum(output.acceptance_lengths) == 11
    assert output.trace.target_forwards == output.trace.draft_forwards == len(verified)
