"""Target: chunks, ragged rows, positions, masks, and what it must not do (wait for the device, keep layers, train)."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
from tiny import hf_model, make_target
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dgd_lightning.errors import InputError
from dgd_lightning.target.model import Target, position_mask

# fp64 sums in another order
EXACT = {"atol": 1e-11, "rtol": 1e-11}
# fp32 through six random layers, another attention kernel
SINGLE = {"atol": 2e-4, "rtol": 1e-4}


def prompts(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 63, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chunk_size", [1, 4, 11, 64])
def test_ragged_chunked_prefill_is_each_row_alone(target: Target, chunk_size: int) -> None:
    ids, lengths = prompts(3, 19), [19, 1, 8]
    cache = target.new_cache(3, 24)
    seen: list[tuple[Tensor, Tensor]] = []
    read = target.prefill(
        ids,
        lengths,
        cache,
        layer_ids=(1, 3),
        chunk_size=chunk_size,
        on_features=lambda f, p: seen.append((f, p)),
        keep_features=True,
    )
    assert read.features is not None
    torch.testing.assert_close(torch.cat([f for f, _ in seen], dim=1), read.features, rtol=0, atol=0)
    assert torch.equal(torch.cat([p for _, p in seen], dim=1), torch.arange(19).expand(3, -1))
    for row, length in enumerate(lengths):
        with torch.no_grad():
            alone = target.model(ids[row : row + 1, :length], output_hidden_states=True)
        wanted = torch.cat([alone.hidden_states[2], alone.hidden_states[4]], dim=-1)[0]
        torch.testing.assert_close(read.features[row, :length], wanted, **EXACT)
        torch.testing.assert_close(read.logits[row], alone.logits[0, -1], **EXACT)


def test_rows_advance_by_different_amounts(target: Target) -> None:
    """Rejected slots stay in the buffers; a later step neither sees them nor is disturbed by dropped rows."""
    ids, lengths = prompts(3, 40), torch.tensor([9, 4, 6])
    cache = target.new_cache(3, 48)
    target.prefill(ids[:, :9], lengths, cache)
    rows = torch.arange(3)
    for accepted, dropped in (([3, 1, 2], None), ([1, 4, 2], None), ([2, 2, 2], [2, 0]), ([1, 3], None)):
        positions = lengths[:, None] + torch.arange(4)
        block = ids[rows[:, None], positions]
        kept = torch.arange(4) < torch.tensor(accepted)[:, None]
        step = target.step(torch.where(kept, block, 0), positions, cache, max_length=int(lengths.max()) + 4)
        assert step.logits is not None
        for b, row in enumerate(rows.tolist()):
            end = int(lengths[b]) + accepted[b]
            with torch.no_grad():
                wanted = target.model(ids[row : row + 1, :end]).logits[0, int(lengths[b]) :]
            torch.testing.assert_close(step.logits[b, : accepted[b]], wanted, **EXACT)
        lengths = lengths + torch.tensor(accepted)
        if dropped is not None:
            cache.select(dropped)
            rows, lengths = rows[dropped], lengths[dropped]


def test_a_step_answers_where_ids_go_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a device_map the last layer may be on another GPU than the embedding; all that comes out is moved."""
    target = make_target()
    elsewhere = torch.device("meta")  # in place of the embedding's device: the layers are on another
    monkeypatch.setattr(Target, "device", property(lambda self: elsewhere))
    step = target.step(prompts(1, 3), torch.arange(3)[None], target.new_cache(1, 3), max_length=3, layer_ids=(2,))
    assert step.logits is not None
    assert step.features is not None
    assert step.logits.device == step.features.device == target.device


def test_a_head_that_accelerate_moves_is_left_to_it() -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    target = make_target()
    hidden = torch.randn(2, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = target.lm_head(hidden)
    head = target.model.get_output_embeddings()
    add_hook_to_module(head, AlignDevicesHook(execution_device="cpu", offload=True))
    assert head.weight.is_meta  # it computes elsewhere
    assert torch.equal(target.lm_head(hidden), wanted)


@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen3_moe", "qwen2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_fp32_is_transformers_untouched(family: str, attention: str) -> None:
    model = hf_model(family, dtype=torch.float32)
    ids = prompts(2, 21)
    with torch.no_grad():
        wanted = model(ids).logits
    model.set_attn_implementation(attention)
    target = Target(model)
    read = target.prefill(ids, [21, 21], target.new_cache(2, 32), chunk_size=8)
    torch.testing.assert_close(read.logits, wanted[:, -1], **SINGLE)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 4}),
    ],
)
def test_sliding_window_layers(family: str, changes: dict[str, int]) -> None:
    target = make_target(family, **changes)
    ids = prompts(2, 17)
    with torch.no_grad():
        wanted = target.model(ids).logits[:, -1]
    read = target.prefill(ids, [17, 17], target.new_cache(2, 17), chunk_size=6)
    torch.testing.assert_close(read.logits, wanted, **EXACT)
    full = make_target(family)
    other = full.prefill(ids, [17, 17], full.new_cache(2, 17)).logits
    assert not torch.allclose(other, wanted)  # the window does something


def test_position_mask() -> None:
    mask = position_mask(torch.tensor([[2, 4]]), 6, window=2)
    assert mask[0, 0].int().tolist() == [[0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0]]


class Counting(TorchDispatchMode):
    """Counts operations that bring a value to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.name() in ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"):
            self.found.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_never_waits_for_the_device(family: str, dtype: torch.dtype) -> None:
    target = make_target(family, dtype=dtype)
    ids, positions, cache = prompts(2, 6), torch.arange(6).expand(2, -1), target.new_cache(2, 6)
    with Counting() as counting:
        target.step(ids, positions, cache, max_length=6, layer_ids=(0, 3))
        assert not counting.found
        ids.max().item()
        assert counting.found  # the counter counts


def test_capacity_and_rows_are_checked() -> None:
    target = make_target()
    cache = target.new_cache(2, 8)
    with pytest.raises(InputError, match="capacity of 8 positions, received 9"):
        target.step(prompts(2, 1), torch.tensor([[8], [8]]), cache, max_length=9)
    with pytest.raises(InputError, match="2 rows"):
        target.step(prompts(1, 1), torch.tensor([[0]]), cache, max_length=1)
    with pytest.raises(InputError, match="layer_ids: expected an integer from 0 to 3, received 4"):
        target.step(prompts(2, 1), torch.tensor([[0], [0]]), cache, max_length=1, layer_ids=(4,))


def test_frozen_and_always_in_eval_mode() -> None:
    target = make_target()
    assert not target.train().model.training
    assert not any(weight.requires_grad for weight in target.parameters())
    hidden = torch.zeros(1, 32, dtype=torch.float64, requires_grad=True)
    target.lm_head(hidden).sum().backward()
    assert hidden.grad is not None


def test_hooks_do_not_stay() -> None:
    target = make_target()
    target.step(prompts(1, 3), torch.arange(3)[None], target.new_cache(1, 3), max_length=3, layer_ids=(0, 3))
    assert not any(layer._forward_hooks for layer in target._layers)


def test_float64_stays_float64() -> None:
    """Batch rows differ from rows alone by fp64 rounding only; transformers' own norms would leave 1e-8 and more."""
    for family in ("qwen3", "llama", "qwen3_moe"):
        target = make_target(family)
        ids = prompts(8, 30)
        ids[1:] = ids[:1]
        ids[1:, -1] = torch.arange(7)
        positions = torch.arange(30).expand(8, -1)
        many = target.step(ids, positions, target.new_cache(8, 30), max_length=30).logits
        one = target.step(ids[:1], positions[:1], target.new_cache(1, 30), max_length=30).logits
        assert many is not None
        assert one is not None
        torch.testing.assert_close(many[0], one[0], atol=1e-12, rtol=1e-12)


def test_attention_without_a_mask_is_refused() -> None:
    model = hf_model()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(InputError, match="flash_attention_2"):
        Target(model)


@pytest.mark.parametrize("name", ["installed", "cache", "past_key_values"])
def test_the_cache_goes_by_the_name_that_the_decoder_has(name: str) -> None:
    """transformers 5.24 renamed it, and warns of the old name."""
    ids, model = prompts(1, 7), hf_model()
    expected = Target(model).model(ids).logits
    decoder = model.get_decoder()
    forward = decoder.forward
    installed = "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"

    def new(*, cache: Any, **knobs: Any) -> Any:
        return forward(**{installed: cache}, **knobs)

    def old(*, past_key_values: Any, **knobs: Any) -> Any:
        return forward(**{installed: past_key_values}, **knobs)

    if name != "installed":
        decoder.forward = new if name == "cache" else old
    target = Target(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step = target.step(ids, torch.arange(7)[None], target.new_cache(1, 7), max_length=7)
    torch.testing.assert_close(step.logits, expected, **EXACT)
