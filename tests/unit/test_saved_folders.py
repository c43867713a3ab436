"""Pairs as they lie on disk, in every spelling that is published: loaded, and decoded both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from decode_tools import random_prompts, tokens_of
from safetensors.torch import load_file, save_file
from tiny import make_draft, make_target

from dgd_lightning.draft.checkpoint import save_draft
from dgd_lightning.methods.autoregressive import autoregressive_generate
from dgd_lightning.methods.speculative import speculative_generate
from dgd_lightning.pair import Pair, load_pair

THETA = 5e5
VOCABULARY = 8  # so few that a random draft is often right
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": THETA}}


def pair_of(family: str, draft: dict[str, Any], **changes: Any) -> Pair:
    target = make_target(family, vocab_size=VOCABULARY, **changes)
    return Pair(target, make_draft(target, **draft), None)


def save(pair: Pair, folder: Path, shard: str = "1GB") -> tuple[Path, Path]:
    assert pair.draft is not None
    pair.target.model.save_pretrained(folder / "target", max_shard_size=shard)
    return folder / "target", save_draft(pair.draft, folder / "draft")


def respell(folder: Path, old: bool) -> None:
    """Write the rope of a config.json as transformers 4.x or 5.x spells it."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for key in ("rope_theta", "rope_scaling", "rope_parameters"):
        config.pop(key, None)
    file.write_text(json.dumps(config | ({"rope_theta": THETA, "rope_scaling": None} if old else ROPE)))


def as_specforge(target: Path, draft: Path) -> None:
    """A wrapper's prefix on every name, and frozen copies of the target's tables beside them."""
    tables = load_file(target / "model.safetensors")
    state = load_file(draft / "model.safetensors")
    state |= {"embed_tokens.weight": tables["model.embed_tokens.weight"], "lm_head.weight": tables["lm_head.weight"]}
    save_file({f"draft_model.{key}": value for key, value in state.items()}, draft / "model.safetensors")


@pytest.mark.parametrize(
    "kind", ["sharded", "tied-llama", "mqa", "rope-4.x", "rope-5.x", "specforge", "bf16", "qwen2", "qwen3_moe"]
)
def test_loads_and_decodes(kind: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "tied-llama": {"tie_word_embeddings": True},
        "mqa": {"num_key_value_heads": 1},
        "rope-4.x": ROPE,
        "rope-5.x": ROPE,
    }.get(kind, {})
    draft = {"mqa": {"num_kv_heads": 1}, "rope-4.x": {"rope_theta": THETA}, "rope-5.x": {"rope_theta": THETA}}
    family = {"tied-llama": "llama", "qwen2": "qwen2", "qwen3_moe": "qwen3_moe"}.get(kind, "qwen3")
    made = pair_of(family, draft.get(kind, {}), **changes)
    assert made.draft is not None
    if kind == "bf16":
        for part in (made.target.model, made.draft):
            part.bfloat16()
    folders = save(made, tmp_path, "20KB" if kind == "sharded" else "1GB")
    if kind == "sharded":
        assert (folders[0] / "model.safetensors.index.json").is_file()
    elif kind.startswith("rope"):
        for folder in folders:
            respell(folder, old=kind == "rope-4.x")
    elif kind == "specforge":
        as_specforge(*folders)
    elif kind == "bf16":
        assert load_pair(*folders, device="cpu").target.dtype == torch.bfloat16
        for part in (made.target.model, made.draft):
            part.double()

    loaded = load_pair(*folders, dtype="float64", device="cpu")
    prompts, new = random_prompts(3, seed=4, vocab=VOCABULARY), 24
    plain = autoregressive_generate(loaded, prompts, max_new_tokens=new)
    fast = speculative_generate(loaded, prompts, max_new_tokens=new)
    wanted = speculative_generate(made, prompts, max_new_tokens=new)
    assert tokens_of(fast) == tokens_of(plain) == tokens_of(wanted)
    # the draft is the one that was saved: its proposals are accepted where they were
    verified = [output.trace.verified_lengths for output in fast]
    assert verified == [output.trace.verified_lengths for output in wanted]
    assert max(map(max, verified)) > 1
    if kind.startswith("rope"):
        assert loaded.draft is not None
        other = pair_of("qwen3", {}).target.model
        state = loaded.target.model.state_dict()
        other.load_state_dict(state)
        ids = torch.tensor([[1, 2, 3]])
        with torch.no_grad():  # the base of the angles does something
            assert not torch.allclose(other(ids).logits, loaded.target.model(ids).logits)
        assert loaded.draft.config.rope_theta == THETA
