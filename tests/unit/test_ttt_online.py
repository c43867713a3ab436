"""Adaptation during decoding: lossless, forgotten at the end, and what a round reads is what the target said."""

from __future__ import annotations

import pytest
import torch
from tiny import make_pair
from torch import Tensor

from dgd_lightning import InputError, OnlineTTT, TTTConfig, autoregressive_generate, speculative_generate, ttt_adapt
from dgd_lightning.draft.lora import base_digest
from dgd_lightning.draft.model import DFlashDraft
from dgd_lightning.target.cache import PositionCache
from dgd_lightning.ttt import online as online_module
from dgd_lightning.ttt.context import read_context, split_context

CLOSE = 1e-9  # fp64 hidden states of a prefill against those of single blocks


def prompt(length: int = 30) -> Tensor:
    return torch.randint(0, 60, (length,), generator=torch.Generator().manual_seed(0))


def online(every: int = 8, **changes: object) -> OnlineTTT:
    knobs = {"steps": 3, "lr": 3e-2, "anchors_per_step": 8, "holdout": 0.0, "loss": "argmax", **changes}
    return OnlineTTT(every, TTTConfig(**knobs))  # type: ignore[arg-type]


ALL = ["fc", "q_proj", "k_proj", "v_proj"]


@pytest.mark.parametrize(
    ("temperature", "modules"),
    [
        (0.0, ALL),
        (0.8, ["q_proj"]),
        pytest.param(0.0, ["q_proj"], marks=pytest.mark.slow),
        pytest.param(0.8, ALL, marks=pytest.mark.slow),
    ],
)
def test_output_is_the_targets_and_the_draft_is_given_back(temperature: float, modules: list[str]) -> None:
    pair, ids = make_pair(), prompt()
    knobs = {"max_new_tokens": 80, "temperature": temperature, "seed": 3}
    digest, names = base_digest(pair.draft), list(pair.draft.state_dict())
    adapted = speculative_generate(pair, [ids], online=online(modules=modules), scheme="exact_match", **knobs)[0]
    plain = autoregressive_generate(pair, [ids], **knobs)[0]
    assert torch.equal(adapted.tokens, plain.tokens)
    assert base_digest(pair.draft) == digest
    assert list(pair.draft.state_dict()) == names
    before = speculative_generate(pair, [ids], scheme="exact_match", **knobs)[0]
    assert adapted.trace.verified_lengths != before.trace.verified_lengths  # it did learn something
    again = speculative_generate(pair, [ids], online=online(modules=modules), scheme="exact_match", **knobs)[0]
    assert again.trace.verified_lengths == adapted.trace.verified_lengths


def test_a_round_reads_what_a_prefill_of_the_same_text_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, ids = make_pair(), prompt()
    rounds: list[tuple[Tensor, Tensor, Tensor]] = []
    adapt = online_module.OnlineFit.adapt

    def spy(self: online_module.OnlineFit, text: Tensor, length: int) -> Tensor:
        features = adapt(self, text, length)
        rounds.append((text.clone(), features.clone(), self.states[:, : len(text)].clone()))
        return features

    monkeypatch.setattr(online_module.OnlineFit, "adapt", spy)
    output = speculative_generate(pair, [ids], max_new_tokens=40, online=online())[0]
    assert len(rounds) >= 4
    whole = torch.cat([ids, output.tokens])
    for text, features, states in rounds:
        assert torch.equal(text, whole[: len(text)])
        config = TTTConfig(labels="target")
        read = read_context(pair, text, config, split_context(len(text), 4, config))
        assert torch.allclose(features, read.features, atol=CLOSE)
        assert torch.allclose(states, read.states, atol=CLOSE)


def test_the_context_is_made_again_after_a_round() -> None:
    """With rounds that change nothing, decoding is what it was; the draft cache that a round rewrites is the same."""
    pair, ids = make_pair(), prompt()
    plain = speculative_generate(pair, [ids], max_new_tokens=40)[0]
    still = speculative_generate(pair, [ids], max_new_tokens=40, online=online(lr=0.0))[0]
    assert still.trace.verified_lengths == plain.trace.verified_lengths


def test_after_a_round_the_cache_is_that_of_the_changed_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, ids = make_pair(), prompt()
    seen: list[tuple[Tensor, Tensor]] = []
    extend = DFlashDraft.extend

    def spy(self: DFlashDraft, cache: PositionCache, features: Tensor, positions: Tensor) -> None:
        extend(self, cache, features, positions)
        if features.shape[1] > 4 and positions[0, -1] >= len(
            ids
        ):  # what a round writes again, not a block nor the prompt
            fresh = self.new_cache(1, cache.capacity)
            extend(self, fresh, features, positions)
            end = features.shape[1]
            seen.append((cache.buffers[0].keys[:, :, :end].clone(), fresh.buffers[0].keys[:, :, :end].clone()))

    monkeypatch.setattr(DFlashDraft, "extend", spy)
    speculative_generate(pair, [ids], max_new_tokens=40, online=online())
    assert len(seen) >= 3
    assert all(torch.equal(ours, fresh) for ours, fresh in seen)
    assert not torch.equal(seen[0][0], seen[1][0][:, :, : seen[0][0].shape[2]])  # the draft did change between rounds


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_round_that_breaks_the_draft_is_taken_back() -> None:
    pair, ids = make_pair(dtype=torch.float32), prompt()
    knobs = {"max_new_tokens": 40, "temperature": 1.0, "seed": 3}
    plain = autoregressive_generate(pair, [ids], **knobs)[0]
    with pytest.warns(UserWarning, match="online adaptation ended"):
        broken = speculative_generate(pair, [ids], online=online(4, lr=1e37, clip=None), scheme="exact_match", **knobs)[
            0
        ]
    assert torch.equal(broken.tokens, plain.tokens)
    with pytest.warns(UserWarning, match="online adaptation ended"):
        drawn = speculative_generate(pair, [ids], online=online(4, lr=1e37, clip=None), **knobs)[0]
    assert len(drawn.tokens) == 40


def test_it_starts_from_the_contexts_adapter() -> None:
    pair, ids = make_pair(), prompt(60)
    result = ttt_adapt(pair, ids, TTTConfig(steps=60, lr=3e-2, loss="argmax", holdout=0.0))
    with pair.adapter(result):
        expected = speculative_generate(pair, [ids], max_new_tokens=30)[0]
    still = TTTConfig(steps=1, lr=0.0, holdout=0.0)
    ours = speculative_generate(pair, [ids], max_new_tokens=30, online=OnlineTTT(8, still, result.adapter))[0]
    assert ours.trace.verified_lengths == expected.trace.verified_lengths


def test_rows_adapt_one_after_the_other_and_forget() -> None:
    pair, ids = make_pair(), prompt()
    (alone,) = speculative_generate(pair, [ids], max_new_tokens=24, online=online())
    for row in speculative_generate(pair, [ids, ids], max_new_tokens=24, online=online()):
        assert torch.equal(row.tokens, alone.tokens)
        assert row.acceptance_lengths == alone.acceptance_lengths


def test_bad_uses_are_refused() -> None:
    pair, ids = make_pair(), prompt()
    with pytest.raises(InputError, match=r"online\.every"):
        OnlineTTT(0)
    foreign = ttt_adapt(pair, ids, TTTConfig(steps=1)).adapter
    foreign = foreign._replace(base=None, weights={k: v for k, v in foreign.weights.items() if "layers.0" not in k})
    with pytest.raises(InputError, match="weights that differ"):
        speculative_generate(pair, [ids], max_new_tokens=8, online=OnlineTTT(8, TTTConfig(), foreign))
    other = ttt_adapt(make_pair(seed=5), ids, TTTConfig(steps=1)).adapter
    with pytest.raises(InputError, match="one of this draft"):
        speculative_generate(pair, [ids], max_new_tokens=8, online=OnlineTTT(8, TTTConfig(), other))
    assert speculative_generate(pair, [ids], max_new_tokens=8)[0].tokens.numel() == 8  # nothing was left behind
