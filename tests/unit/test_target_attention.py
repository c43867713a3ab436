"""Attention with folded query groups: transformers' own numbers, no copied keys, and its name saved nowhere."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import hf_model, make_target
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dgd_lightning.errors import InputError
from dgd_lightning.target import model as target_model
from dgd_lightning.target.model import FOLD_ROWS, FOLDED_SDPA, Target, folded_sdpa, position_mask

EXACT = {"atol": 1e-13, "rtol": 1e-13}  # fp64 sums in another order


def layer(groups: int) -> Any:
    """What the attention function reads of its layer."""
    return SimpleNamespace(num_key_value_groups=groups, is_causal=True, training=False)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("queries", [1, 7, FOLD_ROWS // 2 + 1])
@pytest.mark.parametrize("rows", [1, 2])  # of the mask: prefill gives one for the whole batch
@pytest.mark.parametrize("boolean", [True, False])
def test_numbers_are_transformers_own(groups: int, queries: int, rows: int, boolean: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(2, 2 * groups, queries, 6, generator=draw, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, 150, 6, generator=draw, dtype=torch.float64).unbind(0)
    positions = torch.tensor([[3], [20]])[:rows] + torch.arange(queries)
    mask = position_mask(positions, 150)
    if not boolean:
        mask = torch.zeros_like(mask, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    mixed, weights = folded_sdpa(layer(groups), query, key, value, mask, scaling=0.3)
    wanted, _ = sdpa_attention_forward(layer(groups), query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(mixed, wanted, **EXACT)
    assert weights is None
    assert mixed.shape == (2, queries, 2 * groups, 6)


def test_a_verification_copies_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    def watched(module: Any, query: Tensor, *arguments: Any, **kwargs: Any) -> Any:
        lengths.append(query.shape[2])
        return sdpa_attention_forward(module, query, *arguments, **kwargs)

    monkeypatch.setattr(target_model, "sdpa_attention_forward", watched)
    target = make_target()  # two heads to a key head
    cache = target.new_cache(1, 300)
    target.prefill(torch.zeros(1, 200, dtype=torch.long), [200], cache)
    assert lengths == [200] * target.num_layers  # many queries: the keys are the smaller part
    for queries in (1, 8):
        ids, positions = torch.zeros(1, queries, dtype=torch.long), torch.arange(200, 200 + queries)[None]
        target.step(ids, positions, cache, max_length=200 + queries)
    assert len(lengths) == target.num_layers


@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen3_moe", "qwen2"])
def test_the_model_itself_is_as_before(family: str) -> None:
    """Masks that transformers makes (none for a whole text, one for padding) are made for our name as for its own."""
    model = hf_model(family, dtype=torch.float32)
    ids = torch.randint(0, 63, (2, 9), generator=torch.Generator().manual_seed(0))
    padding = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])
    with torch.no_grad():
        wanted = [model(ids).logits, model(ids, attention_mask=padding).logits]
        Target(model)
        found = [model(ids).logits, model(ids, attention_mask=padding).logits]
    assert model.config._attn_implementation == FOLDED_SDPA
    assert torch.equal(found[0], wanted[0])
    torch.testing.assert_close(found[1][padding.bool()], wanted[1][padding.bool()], atol=2e-5, rtol=2e-5)
    assert not torch.allclose(found[1][0, 3:], found[0][0, 3:])  # the padding does something


def test_the_name_stays_inside(tmp_path: Path) -> None:
    model = hf_model()
    target = Target(model)
    model.save_pretrained(tmp_path)
    for file in tmp_path.glob("*.json"):
        assert FOLDED_SDPA not in file.read_text()
    assert FOLDED_SDPA not in json.dumps(model.config.to_dict(), default=str)
    assert Target(target.model).model is model  # a model may be wrapped twice
    eager = hf_model()
    eager.set_attn_implementation("eager")
    assert Target(eager).model.config._attn_implementation == "eager"
    other = hf_model()
    other.config._attn_implementation = "flex_attention"
    with pytest.raises(InputError, match=r"expected sdpa or eager, received 'flex_attention'") as caught:
        Target(other)
    assert FOLDED_SDPA not in str(caught.value)
