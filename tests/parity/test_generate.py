"""The original implementation's greedy runs on a trained pair: tokens and acceptance lengths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_decoding import reference_speculative

from dgd_lightning.methods.autoregressive import autoregressive_generate
from dgd_lightning.methods.speculative import speculative_generate
from dgd_lightning.pair import Pair, load_pair


@pytest.fixture
def loaded(conformance: Path) -> Pair:
    return load_pair(conformance / "pack-a" / "target", conformance / "pack-a" / "draft", device="cpu")


@pytest.fixture
def runs(conformance: Path) -> list[dict[str, Any]]:
    return json.loads((conformance / "pack-a" / "expected.json").read_text())["generate"]


def original_lengths(run: dict[str, Any]) -> list[int]:
    """Verifications up to the last that can add a token.

    The original counts its prompt's first token apart from the limit, so it verifies once more where a block ends one
    token before its own end of text, and then throws that block away.
    """
    lengths, left = [], run["max_new_tokens"] - 1
    for length in run["acceptance_lengths"]:
        if left <= 0:
            break
        lengths.append(length)
        left -= length
    return lengths


@pytest.mark.parametrize("together", [True, False])
def test_original_runs(loaded: Pair, runs: list[dict[str, Any]], together: bool) -> None:
    prompts = [torch.tensor(run["prompt_ids"]) for run in runs]
    new = runs[0]["max_new_tokens"]
    assert all(run["max_new_tokens"] == new for run in runs)
    if together:
        outputs = speculative_generate(loaded, prompts, max_new_tokens=new)
    else:
        outputs = [speculative_generate(loaded, [prompt], max_new_tokens=new)[0] for prompt in prompts]
    for run, output in zip(runs, outputs, strict=True):
        assert output.tokens.tolist() == run["output_ids"][len(run["prompt_ids"]) :]
        lengths = original_lengths(run)
        assert output.trace.verified_lengths == lengths
        assert output.acceptance_lengths == [*lengths[:-1], new - 1 - sum(lengths[:-1])]


def test_plain_and_slow_decoders_agree(loaded: Pair, runs: list[dict[str, Any]]) -> None:
    prompts = [torch.tensor(run["prompt_ids"]) for run in runs]
    outputs = autoregressive_generate(loaded, prompts, max_new_tokens=runs[0]["max_new_tokens"])
    for run, output in zip(runs, outputs, strict=True):
        assert output.tokens.tolist() == run["output_ids"][len(run["prompt_ids"]) :]
    slow = reference_speculative(loaded, prompts[-1], max_new_tokens=runs[-1]["max_new_tokens"], block_size=8)
    assert slow.tokens == runs[-1]["output_ids"][len(runs[-1]["prompt_ids"]) :]
    assert slow.verified_lengths == original_lengths(runs[-1])
