"""docs/method.py, step by step, against the package: features, a block, guidance, verification, adaptation."""

from __future__ import annotations

import importlib.util
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from decode_tools import random_prompts
from tiny import make_pair
from torch import Tensor

from dgd_lightning import TTTConfig, autoregressive_generate, guided_generate, speculative_generate, ttt_adapt
from dgd_lightning.decode.blending import Blend
from dgd_lightning.decode.random_source import ACCEPT, TARGET, RandomTable
from dgd_lightning.decode.verify import verify_rejection
from dgd_lightning.pair import Pair
from dgd_lightning.ttt.context import draw_blocks, split_context

FILE = Path(__file__).parents[2] / "docs" / "method.py"
ROUNDING = {"rtol": 1e-10, "atol": 1e-10}  # fp64; sums in another order
STEPPED = {"rtol": 1e-8, "atol": 1e-9}  # AdamW divides by the size of gradients, small ones and their rounding too


def load() -> Any:
    spec = importlib.util.spec_from_file_location("method", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


method = load()
PAIR = make_pair(block_size=5)
IDS = torch.randint(60, (40,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def models() -> Any:
    return method.Models(PAIR.target.model, dict(PAIR.draft.state_dict()), PAIR.draft.config)


def block_logits(pair: Pair, features: Tensor, anchors: Tensor) -> Tensor:
    """[N, K − 1, V] by the package's decoding path: the context is in the draft's cache."""
    draft, target = pair.draft, pair.target
    cache = draft.new_cache(1, len(IDS) + draft.config.block_size)
    draft.extend(cache, features[None], torch.arange(len(features))[None])
    blocks = torch.full((len(anchors), draft.config.block_size), draft.config.mask_token_id)
    blocks[:, 0] = IDS[anchors]
    embeddings = target.embed(blocks.flatten())[None]
    hidden = draft.block(cache, embeddings, anchors[None], longest_anchor=int(anchors.max()), keep_cache=True)
    return target.lm_head(hidden[0].unflatten(0, (len(anchors), -1))[:, 1:])


def test_it_is_short_and_reads_no_decoder_of_the_package() -> None:
    text = FILE.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    taken = [line for line in text.splitlines() if "dgd_lightning" in line and "import" in line]
    assert taken == ["from dgd_lightning import load_pair", "from dgd_lightning.lab.rows import eval_rows"]


def test_features_and_logits_of_a_prefill(models: Any) -> None:
    target, layers = PAIR.target, PAIR.draft.config.target_layer_ids
    theirs = target.prefill(
        IDS[None], [len(IDS)], target.new_cache(1, len(IDS)), layer_ids=layers, chunk_size=16, keep_features=True
    )
    ours = method.read(models, IDS)
    torch.testing.assert_close(ours.features, theirs.features[0], **ROUNDING)
    torch.testing.assert_close(ours.logits[-1], theirs.logits[0], **ROUNDING)


def test_a_block_and_the_guided_logits(models: Any) -> None:
    reading, anchors = method.read(models, IDS), torch.tensor([1, 7, 22, 39])
    theirs = block_logits(PAIR, reading.features, anchors)
    ours = method.draft_logits(models, IDS, reading.features, anchors)
    torch.testing.assert_close(ours, theirs, **ROUNDING)
    target = reading.logits[anchors]
    mixed = Blend(0.3).mix(
        target[None], theirs[None, :, 0], torch.tensor([0.3], dtype=torch.float64), torch.zeros(1, 4)
    )[0]
    torch.testing.assert_close(method.guided_logits(models, IDS, reading, anchors, 0.3), mixed, **ROUNDING)
    assert (mixed - target).abs().max() > 0.1


@pytest.mark.parametrize("prompt", random_prompts(2, seed=3, longest=20))
def test_decoding_commits_the_packages_tokens_cycle_by_cycle(models: Any, prompt: Tensor) -> None:
    alone = autoregressive_generate(PAIR, [prompt], max_new_tokens=30)[0].tokens
    for beta in (0.0, 0.6):
        if beta == 0:
            theirs = speculative_generate(PAIR, [prompt], max_new_tokens=30)[0]
        else:
            theirs = guided_generate(PAIR, [prompt], max_new_tokens=30, beta=beta)[0]
        tokens, lengths = method.decode(models, prompt, 30, beta)
        assert torch.equal(tokens, theirs.tokens)
        assert lengths == theirs.acceptance_lengths
        assert torch.equal(tokens, alone) == (beta == 0)


def test_rejection_sampling_commits_what_the_package_does() -> None:
    rows, size, vocabulary = 200, 5, 12
    draw = torch.Generator().manual_seed(0)
    q, p = (torch.randn(rows, n, vocabulary, generator=draw, dtype=torch.float64) for n in (size - 1, size))
    q, p = (2 * q).softmax(-1), (2 * q.new_zeros(p.shape) + p).softmax(-1)
    p[: rows // 2, :-1] = q[: rows // 2]  # accepted to the end: the bonus token
    proposals = torch.multinomial(q.flatten(0, 1), 1, generator=draw).view(rows, -1)
    table = torch.rand(rows, size, 3, generator=draw, dtype=torch.float64)
    positions = torch.arange(size).expand(rows, -1)
    theirs = verify_rejection(proposals, q, p, RandomTable(table, torch.zeros(rows, dtype=torch.long)), positions)
    uniform = table[..., [ACCEPT, TARGET]].mT  # [rows, 2, K]
    assert set(theirs.lengths.tolist()) == set(range(1, size + 1))
    for row in range(rows):
        ours = method.verify_sampled(proposals[row], q[row], p[row], uniform[row])
        assert ours.tolist() == theirs.tokens[row, : theirs.lengths[row]].tolist()


def test_five_steps_of_adaptation(models: Any) -> None:
    config = TTTConfig(
        steps=5, lr=1e-2, rank=3, anchors_per_step=8, validation_texts=0, holdout=0, clip=None, decay_gamma=2.0
    )
    theirs = ttt_adapt(PAIR, IDS, config)
    split = split_context(len(IDS), PAIR.draft.config.block_size, config)
    drawn = [draw_blocks(split, config, step, IDS.device) for step in range(config.steps)]
    steps = [blocks.anchors[0][blocks.keep[0]] for blocks in drawn]
    untrained = ttt_adapt(PAIR, IDS, TTTConfig(steps=0, rank=3, validation_texts=0, holdout=0)).adapter.weights
    names = {key.removesuffix(".lora_A.weight") for key in untrained if key.endswith(".lora_A.weight")}
    lora = {f"{n}.weight": tuple(untrained[f"{n}.lora_{part}.weight"].clone() for part in "AB") for n in names}
    losses = method.adapt(models, IDS, lora, steps, lr=config.lr, gamma=2.0)
    torch.testing.assert_close(losses, theirs.trace.losses, **STEPPED)
    for name, factors in lora.items():
        for part, ours in zip("AB", factors, strict=True):
            expected = theirs.adapter.weights[f"{name.removesuffix('.weight')}.lora_{part}.weight"]
            torch.testing.assert_close(ours.detach(), expected, **STEPPED)
            assert not torch.equal(expected, untrained[f"{name.removesuffix('.weight')}.lora_{part}.weight"])


@pytest.mark.slow
def test_it_runs_as_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(FILE), run_name="__main__")
    known, new = capsys.readouterr().out.split("ledger:")
    used = [[int(n) for n in re.findall(r"in (\d+) verifications", text)] for text in (known, new)]
    assert used[0][0] < 12 < used[0][1]  # adaptation to text that the draft knows makes it worse
    assert used[1][1] < used[1][0]  # and to text that is new to it better
