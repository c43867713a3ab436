"""The bundled pair keeps its promises: size, provenance, lossless decoding, solve rate, τ on long answers."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from dgd_lightning import Pair, autoregressive_generate, load_pair, speculative_generate
from dgd_lightning.lab.families import FAMILIES
from dgd_lightning.lab.grader import grade, reverted_to_prior
from dgd_lightning.lab.rows import eval_rows
from dgd_lightning.metrics.acceptance import tau

ASSETS = Path(str(files("dgd_lightning.lab").joinpath("assets")))
LONG = 64  # tokens of a long answer
BYTES = 16 * 2**20
TOKENS = 20_000


def prompts_of(pair: Pair, rows: list[dict]) -> list[torch.Tensor]:
    texts = [
        pair.tokenizer.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True) for row in rows
    ]
    return [torch.tensor(pair.tokenizer.encode(text, add_special_tokens=False)) for text in texts]


def family_of(row: dict) -> str:
    return row["metadata"]["context_id"].split("-")[1]


def test_size_and_provenance():
    sizes = [path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(sizes) <= BYTES
    assert {path.suffix for path in ASSETS.rglob("*") if path.is_file()} <= {".json", ".safetensors", ".jinja"}
    for part in ("target", "draft"):
        record = json.loads((ASSETS / part / "provenance.json").read_text())
        assert f"configs/lab/{part}.yaml" in record["sessions"][-1]["argv"]
        assert all(session["versions"]["torch"] and session["git"]["sha"] for session in record["sessions"])
        assert not re.search(r"(?<![\w.])/\w", json.dumps(record))  # no machine's paths


@pytest.mark.parametrize("block_size", [2, 5, 8])
def test_lossless_in_fp64(block_size: int):
    pair = load_pair(ASSETS / "target", ASSETS / "draft", dtype="float64", device="cpu")
    prompts = prompts_of(pair, eval_rows(1))[block_size::8]
    plain = autoregressive_generate(pair, prompts, max_new_tokens=80)
    fast = speculative_generate(pair, prompts, max_new_tokens=80, block_size=block_size)
    for a, b in zip(plain, fast, strict=True):
        assert torch.equal(a.tokens, b.tokens)
    assert sum(len(output.acceptance_lengths) for output in fast) < sum(len(output.tokens) for output in plain)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_greedy_ways_agree_over_20k_tokens():
    """The trained share of `test_decode.py`'s 100,000 tokens: real acceptance, all families, every block size."""
    pair = load_pair(ASSETS / "target", ASSETS / "draft", dtype="float64", device="cpu")
    rows = eval_rows(12)
    random.Random(0).shuffle(rows)
    prompts = prompts_of(pair, rows)
    total, start, number, seen, accepted = 0, 0, 0, Counter(), []
    while total < TOKENS:
        batch, block_size = 1 + number % 8, 2 + number % 7  # 56 batches until a pairing comes again
        chosen = [(start + i) % len(rows) for i in range(batch)]
        group = [prompts[i] for i in chosen]
        # One batch in three ends at its stop tokens; the others write on behind them.
        knobs = {"max_new_tokens": 160, **({} if number % 3 == 0 else {"stop_token_ids": []})}
        plain = autoregressive_generate(pair, group, **knobs)
        fast = speculative_generate(pair, group, block_size=block_size, **knobs)
        for i, a, b in zip(chosen, plain, fast, strict=True):
            assert a.tokens.tolist() == b.tokens.tolist(), (rows[i]["metadata"]["task_id"], block_size)
            assert a.stop_reason == b.stop_reason
            seen[family_of(rows[i]), block_size] += len(a.tokens)
            total += len(a.tokens)
            accepted += b.acceptance_lengths
        start, number = start + batch, number + 1
    per_size = {size: sum(n for (_, s), n in seen.items() if s == size) for size in range(2, 9)}
    per_family = {name: sum(n for (f, _), n in seen.items() if f == name) for name in FAMILIES}
    print(f"{total} tokens in {number} batches, all equal; τ {sum(accepted) / len(accepted):.2f}")
    print(f"by block size {per_size}; by family {per_family}")
    assert all(per_size.values())
    assert all(per_family.values())
    assert max(accepted) == 8  # whole blocks of the largest size were accepted


@pytest.mark.slow
def test_solve_rate_and_tau():
    pair = load_pair(ASSETS / "target", ASSETS / "draft", device="cpu")
    rows = eval_rows(12)
    prompts = prompts_of(pair, rows)
    solved, reverted, long = 0, 0, []
    for start in range(0, len(rows), 32):
        outputs = speculative_generate(pair, prompts[start : start + 32], max_new_tokens=192)
        for row, output in zip(rows[start : start + 32], outputs, strict=True):
            text = pair.tokenizer.decode(output.tokens, skip_special_tokens=True)
            solved += grade(row, text).value == 1.0
            reverted += reverted_to_prior(row, text)
            if len(output.tokens) >= LONG:
                long.append(output.acceptance_lengths)
    print(f"solved {solved}/{len(rows)}, reverted {reverted}, τ on {len(long)} long answers {tau(long).micro:.2f}")
    assert 0.3 <= solved / len(rows) <= 0.7
    assert reverted > 0
    assert tau(long).micro >= 3.0
