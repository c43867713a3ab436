"""Test-time training: what it must not change, that it does change what it should; its loss is in test_ttt_loss."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fork_server import launched
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from tiny import make_pair
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from ttt_tools import config, context

from dgd_lightning import InputError, Pair, TTTConfig, load_adapter, save_adapter, speculative_generate, ttt_adapt
from dgd_lightning.decode.prefix_cache import make_prefix_cache
from dgd_lightning.draft.config import DraftConfig
from dgd_lightning.draft.lora import DraftLora, LoraLinear, base_digest, with_adapter
from dgd_lightning.draft.model import DFlashDraft
from dgd_lightning.draft.objective import block_ids, decay_weights, slot_scores
from dgd_lightning.modules import prompts as run_prompts
from dgd_lightning.modules.adaptation import ContextAdapter
from dgd_lightning.modules.prompts import PrefixStore
from dgd_lightning.ttt import adapt
from dgd_lightning.ttt.adapt import gather
from dgd_lightning.ttt.context import draw_blocks, held_out_blocks, split_context
from dgd_lightning.ttt.objective import accepted_slots, dpace_weights
from dgd_lightning.types import Task

SUMS = 1e-12  # fp64 sums in another order
ROUNDED = 1e-2  # gradients that are rounded to bf16, which has 8 bits


def draft_logits(pair: Pair, ids: Tensor, *, seed: int = 3) -> Tensor:
    """Logits [N·K, V] of a few blocks over a context, by the draft as it is now."""
    assert pair.draft is not None
    draft, target = pair.draft, pair.target
    anchors = torch.tensor([[5, 20, 41]])
    cache = target.new_cache(1, len(ids))
    features = target.prefill(
        ids[None], [len(ids)], cache, layer_ids=draft.config.target_layer_ids, keep_features=True
    ).features
    blocks = block_ids(ids[None], anchors, draft.config.block_size, draft.config.mask_token_id)
    with torch.no_grad():
        return target.lm_head(draft.multi_anchor(features, target.embed(blocks), anchors))[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{"steps": 0}, {"lr": 0.0}, {"lr": 0.0, "holdout": 0.0}])
def test_no_step_and_no_rate_change_no_bit(changes: dict, dtype: torch.dtype) -> None:
    pair, ids = make_pair(dtype=dtype), context()
    before = draft_logits(pair, ids)
    result = ttt_adapt(pair, ids, config(**changes))
    assert torch.equal(draft_logits(pair, ids), before)
    with pair.adapter(result):
        assert torch.equal(draft_logits(pair, ids), before)


def test_adaptation_changes_the_draft_and_leaves_the_pair_alone() -> None:
    pair, ids = make_pair(), context()
    names, digest = list(pair.draft.state_dict()), base_digest(pair.draft)
    required = [weight.requires_grad for weight in pair.draft.parameters()]
    before = draft_logits(pair, ids)
    result = ttt_adapt(pair, ids, config())
    assert result.kept
    assert result.trace.losses[-1] < result.trace.losses[0]
    assert result.trace.parameters == result.adapter.parameters > 0
    assert list(pair.draft.state_dict()) == names
    assert [weight.requires_grad for weight in pair.draft.parameters()] == required
    assert torch.equal(draft_logits(pair, ids), before)
    with pair.adapter(result):
        assert base_digest(pair.draft) == digest
        assert not torch.allclose(draft_logits(pair, ids), before)
    assert torch.equal(draft_logits(pair, ids), before)


def test_an_adapted_draft_decodes_the_same_tokens() -> None:
    pair, ids = make_pair(), context()
    plain = speculative_generate(pair, [ids], max_new_tokens=40)[0]
    with pair.adapter(ttt_adapt(pair, ids, config(steps=120, lr=3e-2, holdout=0.0, labels="target", loss="argmax"))):
        adapted = speculative_generate(pair, [ids], max_new_tokens=40)[0]
    assert torch.equal(plain.tokens, adapted.tokens)
    assert plain.trace.verified_lengths != adapted.trace.verified_lengths


def test_removed_reset_and_loaded_in_place() -> None:
    pair, ids = make_pair(), context()
    before = draft_logits(pair, ids)
    result = ttt_adapt(pair, ids, config())
    adapter = result.adapter
    lora = DraftLora(pair.draft, rank=adapter.rank, alpha=adapter.alpha, modules=adapter.modules, seed=0)
    assert torch.equal(draft_logits(pair, ids), before)  # zero-init
    lora.load(adapter.weights)
    after = draft_logits(pair, ids)
    assert not torch.equal(after, before)
    lora.remove()
    assert torch.equal(draft_logits(pair, ids), before)
    lora = with_adapter(pair.draft, adapter)
    assert torch.equal(draft_logits(pair, ids), after)
    lora.reset(0)
    assert torch.equal(draft_logits(pair, ids), before)
    lora.remove()
    assert torch.equal(draft_logits(pair, ids), before)


def test_a_second_context_is_adapted_as_in_a_fresh_process(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from test_ttt import config, context\nfrom tiny import make_pair\n"
        "from dgd_lightning import save_adapter, ttt_adapt\n"
        "save_adapter(ttt_adapt(make_pair(), context(seed=2), config()).adapter, sys.argv[1])\n"
    )
    pair = make_pair()
    ttt_adapt(pair, context(seed=1), config(seed=9))
    torch.manual_seed(1234)  # the global generator plays no part
    second = ttt_adapt(pair, context(seed=2), config()).adapter
    launched(tmp_path, code=script).check_returncode()
    fresh = load_adapter(tmp_path)
    assert second.weights.keys() == fresh.weights.keys()
    for key, weight in second.weights.items():
        assert torch.equal(weight, fresh.weights[key]), key


def test_saved_adapters_give_equal_logits_here_and_in_peft(tmp_path: Path) -> None:
    pair, ids = make_pair(), context()
    result = ttt_adapt(pair, ids, config(alpha=3.0))
    save_adapter(result.adapter, tmp_path / "adapters" / "one")
    loaded = load_adapter(tmp_path / "adapters" / "one")
    with pair.adapter(result):
        expected = draft_logits(pair, ids)
    with pair.adapter(loaded):
        assert torch.equal(draft_logits(pair, ids), expected)
    peft = PeftModel.from_pretrained(copy.deepcopy(pair.draft), str(tmp_path / "adapters" / "one"))
    inside = Pair(pair.target, peft.get_base_model().double(), None)
    assert torch.allclose(draft_logits(inside, ids), expected, atol=1e-6)  # PEFT casts saved weights to fp32


@pytest.mark.parametrize(
    ("dtype", "autocast", "near"),
    [(torch.float64, False, SUMS), (torch.bfloat16, False, ROUNDED), (torch.float32, True, ROUNDED)],
)
def test_a_lora_layer_is_pefts(
    dtype: torch.dtype, autocast: bool, near: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit forward; gradients are sums in another order, of bf16 numbers under autocast and in bf16."""
    monkeypatch.setattr("dgd_lightning.draft.model.CONTEXT_PIECE", 16)
    draw = torch.Generator().manual_seed(0)
    base = torch.nn.Linear(9, 7, dtype=dtype)
    first, second = torch.randn(4, 9, generator=draw), torch.randn(7, 4, generator=draw)
    x, found = torch.randn(2, 30, 9, generator=draw).to(dtype), []
    for own in (True, False):
        layer = LoraLinear(base, 4, 0.5) if own else torch.nn.Sequential(copy.deepcopy(base))
        if not own:
            inject_adapter_in_model(LoraConfig(r=4, lora_alpha=2, target_modules=["0"]), layer, adapter_name="one")
        pair = [layer.lora_A, layer.lora_B] if own else [layer[0].lora_A.one, layer[0].lora_B.one]
        weights = [part if own else part.to(torch.promote_types(dtype, torch.float32)).weight for part in pair]
        for weight, value in zip(weights, (first, second), strict=True):
            weight.data.copy_(value)
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = layer(given)
        out.sin().sum().backward()
        gradients = [given.grad, *[weight.grad for weight in weights]]
        assert [one.dtype for one in gradients] == [dtype, weights[0].dtype, weights[1].dtype]
        found.append((out.detach(), *gradients))
    ours, peft = found
    assert torch.equal(ours[0], peft[0])
    for one, other in zip(ours[1:], peft[1:], strict=True):
        torch.testing.assert_close(one, other, atol=near * float(other.abs().max()), rtol=0)


class Widened(TorchDispatchMode):
    """The most rows of fp32 tensors with so many columns."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.rows = columns, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.float32 and out.shape[-1:] == (self.columns,):
            self.rows = max(self.rows, out.numel() // self.columns)
        return out


@pytest.mark.parametrize("draft_dtype", [torch.bfloat16, torch.float32])
def test_features_in_half_precision_are_never_widened_whole(
    draft_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dgd_lightning.draft.model.CONTEXT_PIECE", 16)
    pair = make_pair(dtype=torch.bfloat16, layer_ids=(1, 2, 3))  # no other tensor has as many columns as features
    pair.draft.to(draft_dtype)
    with Widened(pair.draft.config.num_features) as seen:
        ttt_adapt(pair, context(), config(steps=2, eval_every=1, validation_texts=1, validation_tokens=8))
    assert 0 < seen.rows <= pair.target.hidden_size < len(context())  # fc's weight, and pieces of 16 rows


def test_what_waits_for_the_backward_pass_is_not_widened_for_lora() -> None:
    """Of all that a step keeps, only the norm behind ``fc`` has the context's hidden states in fp32."""
    pair, ids = make_pair(dtype=torch.bfloat16), context()
    setup, kept = config(), dict[int, Tensor]()
    material = gather(pair, ids, setup)
    lora = DraftLora(pair.draft, rank=4, alpha=8, modules=setup.modules, seed=0)
    problem = material.problem(pair, setup, lora)

    def keep(saved: Tensor) -> Tensor:
        kept[saved.untyped_storage().data_ptr()] = saved
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        problem.loss(0)
    width, length = pair.target.hidden_size, problem.split.train_end
    wide = [one for one in kept.values() if one.dtype == torch.float32 and one.numel() == length * width]
    assert len(wide) == 1


def test_parameter_count_of_the_published_draft() -> None:
    with torch.device("meta"):
        draft = DFlashDraft(
            DraftConfig(
                hidden_size=4096, intermediate_size=12288, num_layers=5, num_heads=32, num_kv_heads=8, head_dim=128,
                vocab_size=151936, block_size=16, mask_token_id=151669, target_layer_ids=(1, 9, 17, 25, 33),
                num_target_layers=36,
            )
        )  # fmt: skip
    rank, heads, kv = 2, 32 * 128, 8 * 128
    shapes = [(5 * 4096, 4096), *[(4096, out) for _ in range(5) for out in (heads, kv, kv)]]
    linear = [
        draft.fc,
        *[getattr(layer.self_attn, n) for layer in draft.layers for n in ("q_proj", "k_proj", "v_proj")],
    ]
    assert [(layer.in_features, layer.out_features) for layer in linear] == shapes
    assert sum(rank * (a + b) for a, b in shapes) == 116_736 * rank
    small = make_pair()
    assert small.draft is not None
    own = [
        small.draft.fc,
        *[getattr(x.self_attn, n) for x in small.draft.layers for n in ("q_proj", "k_proj", "v_proj")],
    ]
    lora = DraftLora(small.draft, rank=3, alpha=3, modules=TTTConfig().modules, seed=0)
    assert sum(w.numel() for w in lora.parameters()) == sum(3 * (m.in_features + m.out_features) for m in own)


def test_dpace_weights_are_the_closed_form() -> None:
    inside = torch.tensor([[True, True, True], [True, True, False]])
    q = torch.tensor([[0.2, 0.6, 0.9], [0.5, 0.1, 0.7]], dtype=torch.float64)
    weights = dpace_weights(q, inside, 0.5)
    a, b, c = 0.6, 0.8, 0.95
    first, second = [a + a * b + a * b * c, a * b + a * b * c, a * b * c], [0.75 + 0.75 * 0.55, 0.75 * 0.55, 0.0]
    assert torch.allclose(weights, torch.tensor([first, second], dtype=torch.float64), rtol=SUMS)
    assert torch.equal(dpace_weights(q, inside, 1.0)[0], torch.tensor([3.0, 2.0, 1.0]).double())
    assert decay_weights(inside, 4.0)[1].tolist() == pytest.approx([1.0, 0.7788008, 0.0])


def test_acceptance_ends_at_a_disagreement_and_where_the_context_leaves_the_target() -> None:
    choice = torch.tensor([[1, 2, 3, 4], [1, 9, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4]])
    target = torch.tensor([[1, 2, 3, 4]] * 4)
    tokens = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4], [1, 7, 3, 4], [1, 2, 3, 4]])
    inside = torch.ones(4, 4, dtype=torch.bool)
    inside[3, 2:] = False
    accepted = accepted_slots(choice, target, tokens, inside)
    assert accepted.sum(1).tolist() == [4, 1, 2, 2]


def test_chunks_change_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(11, 6, generator=generator, dtype=torch.float64)
    states, theirs = (torch.randn(13, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    tokens = torch.randint(11, (13,), generator=generator)
    whole, pieces = (
        slot_scores(states, lambda x: x @ head.T, tokens, tokens != 3, theirs, kind="kl", soft=True, chunk=chunk)
        for chunk in (99, 4)
    )
    for a, b in zip(whole, pieces, strict=True):
        assert torch.allclose(a, b, rtol=SUMS)


def test_held_out_labels_are_never_trained_on() -> None:
    setup = config(holdout=0.25, anchors_per_step=200)
    split = split_context(60, 4, setup)
    assert split.train_end == 45
    for step in range(5):
        blocks = draw_blocks(split, setup, step, torch.device("cpu"))
        anchors = blocks.anchors[blocks.keep]
        assert blocks.end == 45
        assert anchors.min() >= 1
        assert anchors.max() <= 43  # one label at least lies before the held-out span
    (held,) = held_out_blocks(split, setup, torch.device("cpu"))
    assert held.anchors.min() == 45
    assert held.anchors.max() == 58


def test_repeated_contexts_train_on_the_last_reading() -> None:
    setup = config(repeats=3, holdout=0.25, anchors_per_step=200)
    split = split_context(60, 4, setup)
    assert split == (180, 165, 120)
    anchors = torch.cat(
        [(b := draw_blocks(split, setup, step, torch.device("cpu"))).anchors[b.keep] for step in range(3)]
    )
    assert anchors.min() >= 120
    assert anchors.max() <= 163
    pair, ids = make_pair(), context()
    assert ttt_adapt(pair, ids, config(repeats=2)).trace.context_tokens == 120
    with pytest.raises(InputError, match="read 9 times"):
        ttt_adapt(pair, ids, config(repeats=9))


def test_bad_fits_are_rolled_back() -> None:
    pair, ids = make_pair(), context()
    broken = make_pair()
    with torch.no_grad():
        broken.draft.norm.weight[0] = float("inf")
    result = ttt_adapt(broken, ids, config())
    assert not result.kept
    assert "loss of step" in result.trace.stopped
    # Random tokens teach nothing about those to come.
    worse = ttt_adapt(pair, ids, config(labels="context", modules=["k_proj"], steps=9, patience=9))
    assert not worse.kept
    assert worse.trace.best_step == 0
    assert worse.trace.stopped == "done"
    before = draft_logits(pair, ids)
    with pair.adapter(worse):
        assert torch.equal(draft_logits(pair, ids), before)
    assert all((weight == 0).all() for key, weight in result.adapter.weights.items() if "lora_B" in key)


def test_no_gradients_under_inference_mode_is_said() -> None:
    pair = make_pair()
    with torch.inference_mode(), pytest.raises(InputError, match="inference_mode: false"):
        ttt_adapt(pair, context(), config())
    with torch.no_grad():
        assert ttt_adapt(pair, context(), config()).kept


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"rank": 0}, "ttt.rank"),
        ({"rank": True}, "ttt.rank"),
        ({"steps": -1}, "ttt.steps"),
        ({"lr": float("nan")}, "ttt.lr"),
        ({"modules": ["qproj"]}, "ttt.modules"),
        ({"modules": []}, "ttt.modules"),
        ({"holdout": 1.0}, "ttt.holdout"),
        ({"labels": "teacher"}, "ttt.labels"),
        ({"labels": "context", "loss": "kl"}, "ttt.loss"),
        ({"dpace_alpha": 0.0}, "ttt.dpace_alpha"),
        ({"clip": 0.0}, "ttt.clip"),
    ],
)
def test_bad_configs_name_the_field(changes: dict, word: str) -> None:
    with pytest.raises(InputError, match=word):
        config(**changes)


def test_bad_contexts_and_adapters_are_refused() -> None:
    pair, ids = make_pair(), context()
    with pytest.raises(InputError, match="context_ids: expected a context of at least 9"):
        ttt_adapt(pair, ids[:8], config())
    with pytest.raises(InputError, match="context_ids"):
        ttt_adapt(pair, ids.float(), config())
    with pytest.raises(InputError, match="token ids"):
        ttt_adapt(pair, ids + 60, config())
    with pytest.raises(InputError, match="a target alone"):
        ttt_adapt(Pair(pair.target, None, None), ids, config())
    result = ttt_adapt(pair, ids, config())
    other = make_pair(seed=5)
    with pytest.raises(InputError, match="one of this draft"), other.adapter(result):
        pass
    with pair.adapter(result), pytest.raises(InputError, match="without an adapter"):
        ttt_adapt(pair, ids, config())
    with pytest.raises(InputError, match="load_adapter first"), pair.adapter("adapters/one"):
        pass
    with pytest.raises(InputError, match="adapter folder"):
        load_adapter("/nonexistent")


def test_a_runs_mistakes_stop_it_and_a_contexts_are_recorded() -> None:
    pair, ids = make_pair(), context()
    long, alike = context(600), torch.stack([ids, ids])
    alike[1, 0] += 1
    for prompts in ([ids[:6]], [long], list(alike)):  # too short, too long, nothing in common
        adapted = ContextAdapter(pair, config(), None)("one", lambda prompts=prompts: prompts)
        assert adapted.adapter is None
        assert "context_ids: expected" in adapted.record["error"]
    good = ContextAdapter(pair, config(), None)("one", lambda: [ids])
    assert good.record["kept"]
    assert good.record["attention"] == "tiles"
    for wrong, argument in ((config(window=3), "ttt.window"), (config(attention="flex"), "ttt.attention")):
        with pytest.raises(InputError, match=f"{argument}: "):
            ContextAdapter(pair, wrong, None)("one", lambda: [ids])
    with pytest.raises(InputError, match="token ids"):  # of another tokenizer
        ContextAdapter(pair, config(), None)("one", lambda: [ids + 60])


class OneContext:
    """Stands for `Prompts`: two tasks of one context."""

    limit = 200

    def __init__(self, ids: Tensor) -> None:
        self.tasks = [Task(str(i), None, str(i), {"metadata": {"context_id": "one"}}) for i in range(2)]
        self.prompts = [torch.cat([ids, torch.tensor([i, 7])]) for i in range(2)]

    def of(self, task: Task) -> Tensor:
        return self.prompts[int(task.idx)]


def test_what_was_read_for_a_fit_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, ids = make_pair(), context()
    layers = pair.draft.config.target_layer_ids
    setup = config(steps=1, validation_texts=2, validation_tokens=8)
    both = OneContext(ids)
    for batch in (1, None):  # texts written in the caches themselves, and in copies
        store = PrefixStore(pair, both, {"one": both.tasks}, layers)  # type: ignore[arg-type]
        adapter = ContextAdapter(pair, replace(setup, validation_batch=batch), None)
        record = adapter("one", lambda: both.prompts, prefixes=store).record
        assert record["prefix_kept"]
        with monkeypatch.context() as patched:
            patched.setattr(run_prompts, "make_prefix_cache", None)  # nothing is read
            stored = store.of(both.tasks, both.prompts, [True, True])
        assert stored.known == [len(ids), len(ids)]
        again = make_prefix_cache(pair.target, ids, layers)
        torch.testing.assert_close(stored.prefixes[0].features, again.features, atol=SUMS, rtol=SUMS)
        ahead, afresh = (
            speculative_generate(pair, both.prompts, max_new_tokens=12, prefixes=prefixes)
            for prefixes in (stored.prefixes, None)
        )
        for one, other in zip(ahead, afresh, strict=True):
            assert torch.equal(one.tokens, other.tokens)
            assert one.acceptance_lengths == other.acceptance_lengths
    monkeypatch.setattr(adapt, "DEVICE_MEMORY", 2**10)  # no room beside the fit
    store = PrefixStore(pair, both, {"one": both.tasks}, layers)  # type: ignore[arg-type]
    assert not ContextAdapter(pair, setup, None)("one", lambda: both.prompts, prefixes=store).record["prefix_kept"]
    assert not store.kept
    assert store.of(both.tasks, both.prompts, [True, True]).known == [len(ids), len(ids)]
    assert ttt_adapt(pair, ids, setup, prefix_layers=[0]).prefix is None  # the draft does not tap it
    assert ttt_adapt(pair, ids, setup).prefix is None
