"""The original implementation's numbers on a trained pair: features, draft states, logits, loss, gradient norms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dgd_lightning.draft.objective import block_ids, block_loss
from dgd_lightning.pair import Pair, load_pair

# The pack's own statement of what fp32 agrees to across versions of torch and transformers.
STATES = {"atol": 1e-4, "rtol": 0.0}
LOSS = {"atol": 0.0, "rtol": 1e-4}
GRADIENTS = {"atol": 0.0, "rtol": 1e-3}


@pytest.fixture
def pack(conformance: Path) -> Path:
    return conformance / "pack-a"


@pytest.fixture
def loaded(pack: Path) -> Pair:
    return load_pair(pack / "target", pack / "draft", device="cpu")


@pytest.fixture
def numbers(pack: Path) -> dict[str, torch.Tensor]:
    return load_file(pack / "tensors.safetensors")


@pytest.fixture
def expected(pack: Path) -> dict[str, Any]:
    return json.loads((pack / "expected.json").read_text())


@pytest.mark.parametrize("chunk_size", [7, 1024])
def test_forward(loaded: Pair, numbers: dict[str, torch.Tensor], chunk_size: int) -> None:
    target, draft = loaded.target, loaded.draft
    assert draft is not None
    ids = numbers["forward.prompt_ids"]
    length = ids.shape[1]
    cache = target.new_cache(1, length)
    taps = draft.config.target_layer_ids
    read = target.prefill(ids, [length], cache, layer_ids=taps, chunk_size=chunk_size, keep_features=True)
    torch.testing.assert_close(read.features, numbers["forward.target_features"], **STATES)
    torch.testing.assert_close(read.logits, numbers["forward.target_logits"][:, -1], **STATES)

    positions = torch.arange(length)[None]
    full = target.step(ids, positions, target.new_cache(1, length), max_length=length)
    torch.testing.assert_close(full.logits, numbers["forward.target_logits"], **STATES)

    block = numbers["forward.block_ids"]
    contexts = draft.new_cache(1, length + block.shape[1])
    assert read.features is not None
    draft.extend(contexts, read.features, positions)
    with torch.no_grad():
        hidden = draft.block(contexts, target.embed(block), torch.tensor([[length]]), longest_anchor=length)
    torch.testing.assert_close(hidden, numbers["forward.draft_hidden"], **STATES)
    torch.testing.assert_close(target.lm_head(hidden), numbers["forward.draft_logits"], **STATES)


def test_training(loaded: Pair, numbers: dict[str, torch.Tensor], expected: dict[str, Any]) -> None:
    target, draft = loaded.target, loaded.draft
    assert draft is not None
    size = draft.config.block_size
    ids, anchors, keep = numbers["train.input_ids"], numbers["train.anchors"], numbers["train.anchor_keep"]
    cache = target.new_cache(*ids.shape)
    read = target.prefill(ids, [ids.shape[1]] * 2, cache, layer_ids=draft.config.target_layer_ids, keep_features=True)
    torch.testing.assert_close(read.features, numbers["train.target_features"], **STATES)

    embeddings = target.embed(block_ids(ids, anchors, size, draft.config.mask_token_id))
    hidden = draft.multi_anchor(numbers["train.target_features"], embeddings, anchors, keep)
    kept = keep.repeat_interleave(size, dim=1)
    torch.testing.assert_close(hidden[kept], numbers["train.draft_hidden"][kept], **STATES)

    wanted = expected["train"]
    loss_mask = numbers["train.loss_mask"]
    loss = block_loss(
        hidden, target.lm_head, ids, loss_mask, anchors, keep, block_size=size, gamma=wanted["decay_gamma"], chunk=19
    )
    torch.testing.assert_close(loss.loss.item(), wanted["loss"], **LOSS)
    torch.testing.assert_close(loss.accuracy.item(), wanted["accuracy"], **LOSS)
    loss.loss.backward()
    norms = {name: weight.grad.norm().item() for name, weight in draft.named_parameters() if weight.grad is not None}
    assert norms.keys() == wanted["grad_norm"].keys()
    for name, norm in wanted["grad_norm"].items():
        torch.testing.assert_close(norms[name], norm, **GRADIENTS, msg=lambda m, name=name: f"{name}: {m}")
