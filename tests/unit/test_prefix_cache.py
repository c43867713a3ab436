"""Beginnings that are read once: every decoder gives the tokens that it gives when it reads whole prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from decode_tools import tokens_of
from guided_tools import READOUTS, readout_of
from tiny import make_pair
from torch import Tensor

from dgd_lightning import TTTConfig
from dgd_lightning.decode import prefix_cache as prefix_module
from dgd_lightning.decode.blending import Blend
from dgd_lightning.decode.prefix_cache import PrefixCache, make_prefix_cache
from dgd_lightning.draft.lora import DraftLora
from dgd_lightning.errors import InputError
from dgd_lightning.methods.autoregressive import autoregressive_generate
from dgd_lightning.methods.guided import Guidance, guided_generate, guided_sweep
from dgd_lightning.methods.rerank import rerank_generate
from dgd_lightning.methods.speculative import speculative_generate
from dgd_lightning.pair import Pair
from dgd_lightning.target.model import Target
from dgd_lightning.ttt.online import OnlineTTT

NEW = 14


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pair() -> Pair:
    return make_pair()


def draw(length: int, seed: int) -> Tensor:
    return torch.randint(60, (length,), generator=torch.Generator().manual_seed(seed))


def prompts_of(*shapes: tuple[int, int, int]) -> list[Tensor]:
    """Prompts of (number of a context, its length, length of the own part)."""
    return [torch.cat([draw(context, number), draw(own, 50 + at)]) for at, (number, context, own) in enumerate(shapes)]


# Rows of one context; of two, whose beginnings differ in length by more than a chunk; with one that shares nothing.
ONE = prompts_of((1, 30, 3), (1, 30, 9), (1, 30, 1))
MIXED = prompts_of((1, 30, 2), (2, 11, 25), (3, 0, 6), (1, 30, 8), (2, 11, 1))
KNOWN = {3: (30, 30, 30), 5: (30, 11, 0, 30, 11)}


def read(pair: Pair, prompts: Sequence[Tensor], layer_ids: Sequence[int]) -> list[PrefixCache | None]:
    """What the prompts share: each context is read once."""
    made: dict[int, PrefixCache] = {}
    lengths = KNOWN[len(prompts)]
    for prompt, known in zip(prompts, lengths, strict=True):
        if known and known not in made:
            made[known] = make_prefix_cache(pair.target, prompt[:known], layer_ids)
    return [made.get(known) for known in lengths]


@pytest.fixture(params=[(ONE, 4096), (MIXED, 8)], ids=["one context", "several, in chunks"])
def prompts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    prompts, chunk = request.param
    monkeypatch.setattr(prefix_module, "CHUNK", chunk)
    return list(prompts)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("decoder", [autoregressive_generate, speculative_generate])
def test_lossless_decoders(pair: Pair, prompts: list[Tensor], temperature: float, decoder: Any) -> None:
    assert pair.draft is not None
    options: dict[str, Any] = {"max_new_tokens": NEW, "temperature": temperature, "seed": 5}
    whole = decoder(pair, prompts, **options)
    prefixes = read(pair, prompts, pair.draft.config.target_layer_ids)
    for _ in range(2):  # a prefix is as good as new after a batch
        again = decoder(pair, prompts, prefixes=prefixes, **options)
        assert tokens_of(again) == tokens_of(whole)
        assert [one.acceptance_lengths for one in again] == [one.acceptance_lengths for one in whole]
    several = decoder(pair, prompts, prefixes=prefixes, **options, num_return_sequences=2)
    assert tokens_of(several) == tokens_of(decoder(pair, prompts, **options, num_return_sequences=2))


@pytest.mark.parametrize("name", [*READOUTS])
def test_every_readout(pair: Pair, prompts: list[Tensor], name: str) -> None:
    readout = readout_of(name, pair, prompts)
    layers = tuple(range(pair.target.num_layers))  # more than any of them needs
    prefixes = read(pair, prompts, layers)
    options: dict[str, Any] = {"max_new_tokens": 8, "beta": 0.4, "readout": readout, "temperature": 0.7, "seed": 3}
    for speculative in (True, False) if name == "draft" else (True,):
        whole = guided_generate(pair, prompts, speculative=speculative, **options)
        again = guided_generate(pair, prompts, speculative=speculative, prefixes=prefixes, **options)
        assert tokens_of(again) == tokens_of(whole)


def test_a_readout_would_tell_if_the_prefix_were_another(pair: Pair) -> None:
    """The twin of the test above: features of other tokens give other answers."""
    layers = tuple(range(pair.target.num_layers))
    right = make_prefix_cache(pair.target, ONE[0][:30], layers)
    wrong = right._replace(features=make_prefix_cache(pair.target, draw(30, 9), layers).features)
    outputs = [guided_generate(pair, ONE, max_new_tokens=NEW, beta=0.9, prefixes=[one] * 3) for one in (right, wrong)]
    assert tokens_of(outputs[0]) != tokens_of(outputs[1])


def test_ways_of_one_prompt_and_reranking(pair: Pair) -> None:
    prefixes = read(pair, MIXED, tuple(range(pair.target.num_layers)))
    ways = [Guidance(Blend(0.0)), Guidance(Blend(0.3)), Guidance(Blend(0.3), readout_of("shuffled", pair, MIXED))]
    whole = guided_sweep(pair, MIXED, ways, max_new_tokens=NEW)
    again = guided_sweep(pair, MIXED, ways, max_new_tokens=NEW, prefixes=prefixes)
    assert list(map(tokens_of, again)) == list(map(tokens_of, whole))
    options: dict[str, Any] = {"max_new_tokens": 5, "num_answers": 2, "seed": 1}
    best = rerank_generate(pair, MIXED, prefixes=prefixes, **options)
    assert tokens_of(best) == tokens_of(rerank_generate(pair, MIXED, **options))


def test_an_adapter_makes_its_own_keys_of_the_features(pair: Pair) -> None:
    """One prefix serves the plain draft and an adapted one: it holds nothing that depends on an adapter."""
    assert pair.draft is not None
    prefixes = read(pair, MIXED, pair.draft.config.target_layer_ids)
    plain = speculative_generate(pair, MIXED, max_new_tokens=NEW)
    lora = DraftLora(pair.draft, rank=2, alpha=2.0, modules=("fc", "k_proj", "v_proj"), seed=0)
    try:
        with torch.no_grad():
            for weight in lora.parameters():
                weight.normal_(std=0.5, generator=torch.Generator().manual_seed(1))
        whole = speculative_generate(pair, MIXED, max_new_tokens=NEW)
        again = speculative_generate(pair, MIXED, max_new_tokens=NEW, prefixes=prefixes)
    finally:
        lora.remove()
    lengths = [[one.acceptance_lengths for one in outputs] for outputs in (plain, whole, again)]
    assert lengths[2] == lengths[1] != lengths[0]
    after = speculative_generate(pair, MIXED, max_new_tokens=NEW, prefixes=prefixes)
    assert [one.acceptance_lengths for one in after] == lengths[0]


def test_online_adaptation_sees_the_prefix(pair: Pair) -> None:
    assert pair.draft is not None
    layers = (*pair.draft.config.target_layer_ids, pair.target.num_layers - 1)
    known = make_prefix_cache(pair.target, ONE[1][:30], layers)
    online = OnlineTTT(every=4, config=TTTConfig(steps=2, lr=0.05, rank=2, anchors_per_step=4))
    whole = speculative_generate(pair, ONE[1:2], max_new_tokens=24, online=online)
    again = speculative_generate(pair, ONE[1:2], max_new_tokens=24, online=online, prefixes=[known])
    plain = speculative_generate(pair, ONE[1:2], max_new_tokens=24)
    assert tokens_of(again) == tokens_of(whole) == tokens_of(plain)
    assert again[0].acceptance_lengths == whole[0].acceptance_lengths


def test_only_what_is_new_is_read(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    columns: list[tuple[int, int]] = []
    prefill = Target.prefill

    def counted(self: Target, ids: Tensor, *args: Any, **options: Any) -> Any:
        columns.append(tuple(ids.shape))  # type: ignore[arg-type]
        return prefill(self, ids, *args, **options)

    monkeypatch.setattr(Target, "prefill", counted)
    prefixes = read(pair, ONE, ())
    autoregressive_generate(pair, ONE, max_new_tokens=2, prefixes=prefixes)
    assert columns == [(1, 30), (3, 9)]
    columns.clear()
    autoregressive_generate(pair, ONE, max_new_tokens=2)
    assert columns == [(3, 39)]


def test_prefixes_that_do_not_fit_are_told(pair: Pair) -> None:
    known = make_prefix_cache(pair.target, ONE[0][:30])
    with pytest.raises(InputError, match="prefixes: expected one per prompt, 3"):
        autoregressive_generate(pair, ONE, max_new_tokens=2, prefixes=[known])
    for prompt in (known.ids, ONE[0][:20], draw(40, 8)):
        with pytest.raises(InputError, match=r"prefixes\[0\]: expected a prompt that begins with these 30 tokens"):
            autoregressive_generate(pair, [prompt], max_new_tokens=2, prefixes=[known])
    for layer_ids in ((), (0,)):
        with pytest.raises(
            InputError, match=r"prefixes: expected features of layers \d.*received (none|those of layers 0)"
        ):
            speculative_generate(
                pair, ONE, max_new_tokens=2, prefixes=[make_prefix_cache(pair.target, known.ids, layer_ids)] * 3
            )
    assert pair.draft is not None
    written_on = known._replace(draft_cache=pair.draft.new_cache(1, 60))
    for prompts, more in ((ONE[:2], {}), (ONE[:1], {"num_return_sequences": 2})):
        with pytest.raises(InputError, match=r"prefixes\[0\]: expected a single row"):
            autoregressive_generate(pair, prompts, max_new_tokens=2, prefixes=[written_on] * len(prompts), **more)
