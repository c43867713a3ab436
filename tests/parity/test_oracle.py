"""Target and draft against transformers and against a second, naive DFlash, in fp64 on random tiny models."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from oracle import naive_anchors, naive_block, naive_loss
from tiny import make_draft, make_pair
from torch import Tensor

from dgd_lightning.draft.model import DFlashDraft
from dgd_lightning.draft.objective import Anchors, block_ids, block_loss, decay_weights, sample_anchors, slot_scores
from dgd_lightning.modules.draft_training import DraftTraining
from dgd_lightning.target.model import Target

# fp64 sums in another order; six layers of width 32
EXACT = {"atol": 1e-11, "rtol": 1e-11}
TRAINING = {"atol": 1e-10, "rtol": 1e-10}  # the same with another order of the softmax's sums


def features_of(target: Target, draft: DFlashDraft, ids: Tensor) -> Tensor:
    """[B, S, F·H], as transformers gives them: hidden_states[id + 1]."""
    with torch.no_grad():
        states = target.model(ids, output_hidden_states=True).hidden_states
    return torch.cat([states[i + 1] for i in draft.config.target_layer_ids], dim=-1)


@pytest.mark.parametrize("layer_ids", [(0,), (1, 3), (3, 0, 2)], ids=str)
def test_features_are_transformers_hidden_states(target: Target, layer_ids: tuple[int, ...]) -> None:
    ids = torch.randint(0, 63, (2, 17), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        states = target.model(ids, output_hidden_states=True)
    wanted = torch.cat([states.hidden_states[i + 1] for i in layer_ids], dim=-1)
    cache = target.new_cache(2, 17)
    read = target.prefill(ids, [17, 17], cache, layer_ids=layer_ids, chunk_size=5, keep_features=True)
    torch.testing.assert_close(read.features, wanted, **EXACT)
    torch.testing.assert_close(read.logits, states.logits[:, -1], **EXACT)
    ran = list[int]()
    handles = [layer.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, layer in enumerate(target._layers)]
    torch.testing.assert_close(target.features(ids, layer_ids), wanted, **EXACT)
    assert ran == list(range(max(layer_ids) + 1))
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("layers", [1, 2])
def test_draft_forward_is_the_naive_one(family: str, layers: int) -> None:
    pair = make_pair(family, num_layers=layers, block_size=4)
    target, draft = pair.target, pair.draft
    assert draft is not None
    length, size = 13, 4
    ids = torch.randint(0, 63, (2, length), generator=torch.Generator().manual_seed(5))
    features = features_of(target, draft, ids)
    anchors = torch.tensor([[1, 4, 4, 12], [0, 2, 9, 13]])
    tokens = torch.full((2, 4 * size), draft.config.mask_token_id)
    tokens[:, ::size] = torch.randint(0, 63, (2, 4), generator=torch.Generator().manual_seed(6))
    embeddings = target.embed(tokens)
    weights = draft.state_dict()
    wanted = torch.stack(
        [
            torch.cat(
                [
                    naive_block(
                        draft.config,
                        weights,
                        features[b, :anchor],
                        embeddings[b, n * size : (n + 1) * size],
                        int(anchor),
                    )
                    for n, anchor in enumerate(anchors[b])
                ]
            )
            for b in range(2)
        ]
    )
    with torch.no_grad():
        torch.testing.assert_close(draft.multi_anchor(features, embeddings, anchors), wanted, **EXACT)

        cache = draft.new_cache(2, length + size)
        positions = torch.arange(length).expand(2, -1)
        draft.extend(cache, features[:, :7], positions[:, :7])
        draft.extend(cache, features[:, 7:], positions[:, 7:])
        many = draft.block(cache, embeddings, anchors, longest_anchor=length)
        torch.testing.assert_close(many, wanted, **EXACT)
        # one block a row, last anchors first: the block's own keys overwrite the cache from its anchor on
        for n in (3, 2, 1, 0):
            one = draft.block(cache, embeddings[:, n * size :][:, :size], anchors[:, n : n + 1], longest_anchor=length)
            torch.testing.assert_close(one, wanted[:, n * size : (n + 1) * size], **EXACT)


def test_decoding_pattern_of_writes() -> None:
    """Blocks written in place, features of rejected slots written too: the next block sees committed context only."""
    pair = make_pair()
    target, draft = pair.target, pair.draft
    assert draft is not None
    ids = torch.randint(0, 63, (2, 20), generator=torch.Generator().manual_seed(7))
    features = features_of(target, draft, ids)
    weights = draft.state_dict()
    cache = draft.new_cache(2, 32)
    draft.extend(cache, features[:, :5], torch.arange(5).expand(2, -1))
    starts = torch.tensor([5, 5])
    for accepted in ([1, 3], [4, 2], [2, 4]):
        block = target.embed(torch.randint(0, 63, (2, 4), generator=torch.Generator().manual_seed(8)))
        with torch.no_grad():
            hidden = draft.block(cache, block, starts[:, None], longest_anchor=int(starts.max()))
        for b in range(2):
            start = int(starts[b])
            wanted = naive_block(draft.config, weights, features[b, :start], block[b], start)
            torch.testing.assert_close(hidden[b], wanted, **EXACT)
        # true features for what is committed, rubbish for what is rejected
        positions = starts[:, None] + torch.arange(4)
        fresh = features[torch.arange(2)[:, None], positions]
        kept = torch.arange(4) < torch.tensor(accepted)[:, None]
        with torch.no_grad():
            draft.extend(cache, torch.where(kept[..., None], fresh, 1e3), positions)
        starts = starts + torch.tensor(accepted)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_loss_and_gradients_are_the_naive_ones(chunk: int) -> None:
    pair = make_pair()
    target, draft = pair.target, pair.draft
    assert draft is not None
    size, gamma = 4, 2.5
    ids = torch.randint(0, 63, (2, 16), generator=torch.Generator().manual_seed(9))
    loss_mask = torch.ones(2, 16)
    loss_mask[0, :6] = 0
    loss_mask[1, 10] = 0
    anchors, keep = sample_anchors(loss_mask, 12, torch.Generator().manual_seed(1))
    assert keep[0].sum() == 9
    assert not keep.all()
    features = features_of(target, draft, ids)
    embeddings = target.embed(block_ids(ids, anchors, size, draft.config.mask_token_id))

    def run(naive: bool) -> tuple[Tensor, float, dict[str, Tensor]]:
        draft.zero_grad()
        hidden = draft.multi_anchor(features, embeddings, anchors, keep)
        if naive:
            logits = target.lm_head(hidden).unflatten(1, (-1, size))
            loss, accuracy = naive_loss(logits, ids, loss_mask, anchors, keep, gamma)
        else:
            result = block_loss(
                hidden, target.lm_head, ids, loss_mask, anchors, keep, block_size=size, gamma=gamma, chunk=chunk
            )
            loss, accuracy = result.loss, result.accuracy.item()
        loss.backward()
        return loss.detach(), accuracy, {n: w.grad.clone() for n, w in draft.named_parameters() if w.grad is not None}

    wanted, got = run(naive=True), run(naive=False)
    torch.testing.assert_close(got[0], wanted[0], **EXACT)
    assert got[1] == pytest.approx(wanted[1], abs=1e-6)
    assert got[2].keys() == {name for name, _ in draft.named_parameters()}
    for name, gradient in wanted[2].items():
        torch.testing.assert_close(got[2][name], gradient, **EXACT)


def cut(anchors: Anchors) -> Anchors:
    """Without the last block of every row."""
    return Anchors(anchors.anchors[:, :-1], anchors.keep[:, :-1])


FAULTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "a dropped slot": (
        "dgd_lightning.draft.objective.slot_scores",
        lambda states, head, tokens, inside, **more: slot_scores(
            states, head, tokens, inside & (inside.flatten().cumsum(0).view_as(inside) != 5), **more
        ),
    ),
    "a wrong weight": (
        "dgd_lightning.draft.objective.decay_weights",
        lambda inside, gamma, dtype: decay_weights(inside, gamma * 1.000001, dtype),
    ),
    "an anchor cut off": (
        "dgd_lightning.modules.draft_training.sample_anchors",
        lambda *given: cut(sample_anchors(*given)),
    ),
}


@pytest.mark.parametrize("attention", ["tiles", "sdpa"])
@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_a_training_step_is_the_dense_one(fault: str | None, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the head, the blocks and the softmax leave out has no weight; a fault of a millionth shows."""
    pair = make_pair()
    target, draft = pair.target, pair.draft
    assert draft is not None
    size, many = draft.config.block_size, 12
    ids = torch.randint(0, 63, (3, 20), generator=torch.Generator().manual_seed(9))
    loss_mask = torch.zeros(3, 20, dtype=torch.bool)
    loss_mask[0, 5:18] = loss_mask[1, 2:7] = loss_mask[1, 10:12] = True  # and nothing in the last row

    anchors, keep = naive_anchors(loss_mask, many, torch.Generator().manual_seed(1))
    assert keep.sum(1).tolist() == [12, 5, 0]
    embeddings = target.embed(block_ids(ids, anchors, size, draft.config.mask_token_id))
    hidden = draft.multi_anchor(features_of(target, draft, ids), embeddings, anchors, keep, attention="dense")
    logits = target.lm_head(hidden).unflatten(1, (-1, size))
    dense, accuracy = naive_loss(logits, ids, loss_mask, anchors, keep, gamma=size / 2)
    wanted = torch.autograd.grad(dense, list(draft.parameters()))

    if fault is not None:
        monkeypatch.setattr(*FAULTS[fault])
    step = DraftTraining("the pair below", num_anchors=many)
    step.pair, step.draft, step.attends = pair, draft, attention
    with nullcontext() if fault is None else pytest.raises(AssertionError, match="not close"):
        result = step(ids, loss_mask, torch.Generator().manual_seed(1))
        found = torch.autograd.grad(result.loss, list(draft.parameters()))
        torch.testing.assert_close([result.loss, *found], [dense, *wanted], **TRAINING)
        assert result.accuracy.item() == pytest.approx(accuracy, abs=1e-6)


def test_gradient_checkpointing_changes_nothing() -> None:
    pair = make_pair()
    target, draft = pair.target, pair.draft
    assert draft is not None
    ids = torch.randint(0, 63, (1, 12), generator=torch.Generator().manual_seed(9))
    features, anchors = features_of(target, draft, ids), torch.tensor([[3, 8]])
    embeddings = target.embed(block_ids(ids, anchors, 4, 63))
    found = []
    for on in (False, True):
        draft.gradient_checkpointing = on
        draft.zero_grad()
        draft.multi_anchor(features, embeddings, anchors).square().sum().backward()
        found.append([w.grad.clone() for w in draft.parameters() if w.grad is not None])
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)


def test_a_draft_with_biases_and_scaled_rope_matches_transformers_angles() -> None:
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    target = make_pair().target
    for scaling in (
        None,
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ):
        draft = make_draft(target, rope_scaling=scaling, rope_theta=5e5, attention_bias=True)
        parameters = {"rope_theta": 5e5, "rope_type": "default", **(scaling or {})}
        config = Qwen3Config(head_dim=6, max_position_embeddings=512, rope_parameters=parameters)
        positions = torch.arange(300)[None]
        cos, sin = Qwen3RotaryEmbedding(config)(torch.zeros(1, dtype=torch.float64), positions)
        rotary = draft.rotary(positions, torch.float64)
        torch.testing.assert_close(rotary.cos[:, 0], cos, rtol=0, atol=0)
        torch.testing.assert_close(rotary.sin[:, 0], sin, rtol=0, atol=0)
