"""What only a CUDA device shows: bf16 decoding, FlexAttention, a spread target, noise; a CPU case of each always runs.

pytest -m gpu tests/gpu
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from tiny import make_draft, make_target
from torch import Tensor

from dgd_lightning import Pair, autoregressive_generate, load_pair, speculative_generate
from dgd_lightning.decode.readouts.noise import KEY_STEPS, MULTIPLIERS, normals
from dgd_lightning.draft.attention import Attention
from dgd_lightning.draft.model import DFlashDraft
from dgd_lightning.lab.rows import eval_rows

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
# The lab's logits reach 16 … 32, where bf16 knows steps of 1/8. Forwards of other shapes sum in another order, so two
# logits a step or so apart may change places (on a CPU: up to 1/16 over 2,304 tokens); a wrong token is units off.
NEAR_TIE = 0.5
# fp32 sums in another order, TF32 off, against fp64, as a share of the largest entry. On a CPU 2e-6; FlexAttention's
# base-2 exponentials are approximate. bf16 gives 4e-2.
FP32 = 1e-4


def prompts_of(pair: Pair, number: int) -> list[Tensor]:
    """Prompts of one evaluation context per family, evenly chosen."""
    rows = eval_rows(1)
    assert pair.tokenizer is not None
    texts = [
        pair.tokenizer.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True)
        for row in rows[:: len(rows) // number][:number]
    ]
    return [torch.tensor(pair.tokenizer.encode(text, add_special_tokens=False)) for text in texts]


def replayed(pair: Pair, prompt: Tensor, tokens: Tensor) -> Tensor:
    """Logits [T, V] of the target at each new token, all of them read in one forward: no draft, no loop.

    Args:
        pair: whose target reads.
        prompt: [S].
        tokens: [T].
    """
    ids = torch.cat([prompt, tokens])[None, :-1].to(pair.target.device)  # [1, S + T - 1]
    length = ids.shape[1]
    positions = torch.arange(length, device=ids.device)[None]
    step = pair.target.step(ids, positions, pair.target.new_cache(1, length), max_length=length)
    assert step.logits is not None
    return step.logits[0, len(prompt) - 1 :].float().cpu()


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_bf16_greedy_differs_at_near_ties_only(device: str) -> None:
    """Teacher-forced, every token of either way is the best or a near-tie; where both are sure, they are the same."""
    pair = load_pair("lab", "lab", dtype="bfloat16", device=device)
    short = device == "cpu"  # where bf16 is slow
    prompts = prompts_of(pair, 4 if short else 24)
    knobs: dict[str, Any] = {"max_new_tokens": 24 if short else 48, "stop_token_ids": []}
    plain = autoregressive_generate(pair, prompts, **knobs)
    fast = speculative_generate(pair, prompts, **knobs)
    equal = 0
    for prompt, a, b in zip(prompts, plain, fast, strict=True):
        margins = []
        for tokens in (a.tokens, b.tokens):
            logits = replayed(pair, prompt, tokens)  # [T, V]
            chosen = logits.gather(1, tokens[:, None])[:, 0]
            assert (logits.amax(1) - chosen).max() <= NEAR_TIE
            best = logits.topk(2).values
            margins.append(best[:, 0] - best[:, 1])
        differ = (a.tokens != b.tokens).nonzero().flatten().tolist()
        equal += not differ
        if differ:  # up to here both read the same; a clear winner can't have been missed by one of them
            assert margins[0][differ[0]] <= NEAR_TIE
            assert margins[1][differ[0]] <= NEAR_TIE
    assert equal >= len(prompts) // 2  # else the target is unsure everywhere, and this shows little
    assert max(length for output in fast for length in output.acceptance_lengths) > 2


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_a_wrong_token_is_no_near_tie(device: str) -> None:
    """The twin: the second best token is usually far from the best, so the test above can fail."""
    pair = load_pair("lab", None, dtype="bfloat16", device=device)
    (prompt,) = prompts_of(pair, 1)
    (output,) = autoregressive_generate(pair, [prompt], max_new_tokens=24)
    best = replayed(pair, prompt, output.tokens).topk(2).values  # [T, 2]
    assert (best[:, 0] - best[:, 1] > NEAR_TIE).float().mean() > 0.5


class Blocks(NamedTuple):
    """Inputs of `DFlashDraft.multi_anchor`, fp64 on the CPU."""

    features: Tensor  # [B, S, F·H]
    embeddings: Tensor  # [B, N·K, H]
    anchors: Tensor  # [B, N]
    keep: Tensor  # [B, N]


def blocks_of(draft: DFlashDraft, batch: int = 2, length: int = 201, number: int = 37) -> Blocks:
    """Random inputs of sizes that no tile divides; the first block of all and one with no context are among them."""
    draw = torch.Generator().manual_seed(0)
    size, hidden = draft.config.block_size, draft.config.hidden_size
    anchors = torch.randint(1, length, (batch, number), generator=draw)
    anchors[:, 0], anchors[0, 1] = 1, 0
    return Blocks(
        torch.randn(batch, length, draft.config.num_features, generator=draw, dtype=torch.float64),
        torch.randn(batch, number * size, hidden, generator=draw, dtype=torch.float64),
        anchors,
        torch.rand(batch, number, generator=draw) > 0.2,
    )


def value_and_gradients(blocks: Blocks, device: str, dtype: torch.dtype, attention: Attention) -> dict[str, Tensor]:
    """Hidden states of the kept blocks and all gradients of a loss on them, fp64 on the CPU."""
    draft = make_draft(make_target(), head_dim=16).to(device, dtype)  # FlexAttention wants heads of 16 and more
    features, embeddings = (x.detach().to(device, dtype).requires_grad_() for x in (blocks.features, blocks.embeddings))
    keep = blocks.keep.to(device)
    hidden = draft.multi_anchor(features, embeddings, blocks.anchors.to(device), keep, attention=attention)
    kept = hidden[keep.repeat_interleave(draft.config.block_size, dim=1)]  # [kept blocks · K, H]
    kept.square().mean().backward()
    found = {"value": kept.detach(), "features": features.grad, "embeddings": embeddings.grad}
    found |= {name: weight.grad for name, weight in draft.named_parameters()}
    return {name: value.double().cpu() for name, value in found.items() if value is not None}


@pytest.mark.parametrize(
    ("device", "attention"),
    [("cpu", "sdpa"), *(pytest.param("cuda", kind, marks=pytest.mark.gpu) for kind in ("sdpa", "flex"))],
)
def test_multi_anchor_is_the_dense_one_in_fp64(device: str, attention: Attention) -> None:
    blocks = blocks_of(make_draft(make_target(), head_dim=16))
    dense = value_and_gradients(blocks, "cpu", torch.float64, "dense")
    found = value_and_gradients(blocks, device, torch.float32, attention)
    assert (
        set(found) == set(dense) >= {"value", "features", "embeddings", "fc.weight", "layers.0.self_attn.k_proj.weight"}
    )
    for name, value in dense.items():
        scale = value.abs().max()
        assert scale > 0, name
        assert (found[name] - value).abs().max() <= FP32 * scale, name


@pytest.mark.parametrize(
    "spread", [pytest.param({"": "cpu"}, id="cpu"), pytest.param("balanced", marks=pytest.mark.gpu)]
)
def test_spread_target_gives_the_same_tokens(spread: Any) -> None:
    """``model.device_map: auto`` loads as "balanced", over as many GPUs as there are; in fp64 nothing is a tie."""
    whole = load_pair("lab", "lab", dtype="float64", device="cpu")
    pair = load_pair("lab", "lab", dtype="float64", device=spread)
    assert pair.draft is not None
    assert pair.draft.device == pair.target.device
    if spread == "balanced":
        places = {str(weight.device) for weight in pair.target.model.parameters()}
        assert all(place.startswith("cuda:") for place in places)
        assert len(places) == min(torch.cuda.device_count(), pair.target.num_layers)
    prompts = prompts_of(whole, 4)
    expected = autoregressive_generate(whole, prompts, max_new_tokens=32)
    found = speculative_generate(pair, prompts, max_new_tokens=32)
    assert [output.tokens.tolist() for output in found] == [output.tokens.tolist() for output in expected]


def plain_normals(key: list[int], position: int, width: int) -> list[float]:
    """`normals` of one position in Python's own integers, which have no width."""
    found: list[float] = []
    for block in range(-(-width // 4)):
        c, k = [block, position, 0, 0], list(key)
        for _ in range(10):
            high, low = zip(
                *(divmod(word * by, 2**32) for word, by in zip(c[::2], MULTIPLIERS, strict=True)), strict=True
            )
            c = [high[1] ^ c[1] ^ k[0], low[1], high[0] ^ c[3] ^ k[1], low[0]]
            k = [(word + step) % 2**32 for word, step in zip(k, KEY_STEPS, strict=True)]
        for first, second in (c[:2], c[2:]):
            radius, angle = math.sqrt(-2 * math.log((first + 0.5) / 2**32)), 2 * math.pi * second / 2**32
            found += [radius * math.cos(angle), radius * math.sin(angle)]
    return found[:width]


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_noise_is_the_same_on_every_device(device: str) -> None:
    keys, positions = torch.tensor([[1, 2**32 - 1], [2**31, 7]]), torch.tensor([[0, 5, 131_071], [3, 4, 2**32 - 1]])
    found = normals(keys.to(device), positions.to(device), 1001).cpu()
    expected = [
        [plain_normals(k, p, 1001) for p in row] for k, row in zip(keys.tolist(), positions.tolist(), strict=True)
    ]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)
