"""Drafts on disk: round trips, shards, wrappers' prefixes, copies of the target's tables, and reports of bad keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_pair

from dgd_lightning.draft.checkpoint import load_draft, save_draft
from dgd_lightning.draft.model import DFlashDraft
from dgd_lightning.errors import InputError


@pytest.fixture
def draft() -> DFlashDraft:
    draft = make_pair(dtype=torch.float32).draft
    assert draft is not None
    return draft


@pytest.fixture
def folder(draft: DFlashDraft, tmp_path: Path) -> Path:
    return save_draft(draft, tmp_path / "draft")


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Add tensors, or drop those given as None (dots in names spelt as they are)."""
    state = load_file(folder / "model.safetensors") | changes
    save_file({k: v for k, v in state.items() if v is not None}, folder / "model.safetensors")


def test_round_trip(draft: DFlashDraft, folder: Path) -> None:
    again = load_draft(folder)
    assert again.config == draft.config
    assert not again.training
    for name, weight in draft.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    # saving what was loaded writes the same bytes
    save_draft(again, folder.parent / "again")
    for name in ("config.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (folder.parent / "again" / name).read_bytes()


def test_published_key_names(folder: Path) -> None:
    keys = set(load_file(folder / "model.safetensors"))
    per_layer = {f"self_attn.{n}.weight" for n in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")}
    per_layer |= {f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")}
    per_layer |= {"input_layernorm.weight", "post_attention_layernorm.weight"}
    wanted = {f"layers.{i}.{n}" for i in range(2) for n in per_layer}
    assert keys == wanted | {"norm.weight", "fc.weight", "hidden_norm.weight"}


def test_dtype_and_rope_frequencies(draft: DFlashDraft, folder: Path) -> None:
    half = load_draft(folder, dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    assert half.rotary.inv_freq.dtype == torch.float32
    assert torch.equal(half.rotary.inv_freq, draft.rotary.inv_freq)
    assert load_draft(save_draft(draft, folder, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_sharded_index(draft: DFlashDraft, folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    names = sorted(state)
    shards = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, keys in shards.items():
        save_file({k: state[k] for k in keys}, folder / file)
    index = {"weight_map": {k: file for file, keys in shards.items() for k in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    again = load_draft(folder)
    assert all(torch.equal(again.state_dict()[n], w) for n, w in draft.state_dict().items())
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match="model-00002-of-00002"):
        load_draft(folder)


@pytest.mark.parametrize("prefix", ["draft_model.", "model.", "module.draft_model."])
def test_wrappers_prefixes(draft: DFlashDraft, folder: Path, prefix: str) -> None:
    state = load_file(folder / "model.safetensors")
    save_file({prefix + k: v for k, v in state.items()}, folder / "model.safetensors")
    rewrite(folder, **{"rotary_emb.inv_freq": torch.ones(3)})
    assert torch.equal(load_draft(folder).fc.weight, draft.fc.weight)


def test_frozen_copy_of_the_targets_tables(draft: DFlashDraft, folder: Path) -> None:
    table = torch.randn(64, 32)
    rewrite(folder, **{"embed_tokens.weight": table})
    load_draft(folder, shared={"embed_tokens.weight": table.clone()})
    rewrite(folder, **{"embed_tokens.weight": table.bfloat16()})  # a narrow copy of an fp32 table
    load_draft(folder, shared={"embed_tokens.weight": table})
    for shared in ({}, {"embed_tokens.weight": table + 1}):
        with pytest.raises(InputError, match=r"its own embed_tokens\.weight"):
            load_draft(folder, shared=shared)


def test_own_vocabulary_is_refused(folder: Path) -> None:
    rewrite(folder, t2d=torch.ones(64), d2t=torch.ones(32), **{"lm_head.weight": torch.ones(32, 32)})
    with pytest.raises(InputError, match=r"its own d2t, lm_head\.weight, t2d"):
        load_draft(folder)


def test_bad_keys_are_reported(folder: Path) -> None:
    rewrite(
        folder,
        **{
            "norm.weight": None,
            "layers.1.mlp.up_proj.weight": None,
            "extra.weight": torch.ones(2),
            "fc.weight": torch.ones(32, 99),
        },
    )
    with pytest.raises(InputError) as caught:
        load_draft(folder)
    text = str(caught.value)
    assert "missing: layers.1.mlp.up_proj.weight, norm.weight" in text
    assert "unexpected: extra.weight" in text
    assert "misshapen: fc.weight [32, 99] for [32, 64]" in text


def test_unreadable_files(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs")
    with pytest.raises(InputError, match="readable safetensors"):
        load_draft(folder)
    (folder / "model.safetensors").unlink()
    (folder / "training_state.pt").touch()
    with pytest.raises(InputError, match="pickled weights are never loaded"):
        load_draft(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"JSON in config\.json"):
        load_draft(folder)


def test_unwritable_folder(draft: DFlashDraft, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="folder that can be written"):
        save_draft(draft, tmp_path / "file" / "draft")
