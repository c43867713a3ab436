"""What test-time training costs: seconds per step against the prefill, and peak memory, as the context grows.

    python benchmarks/ttt.py [--lengths 1024 4096 16384] [--device cuda --dtype bfloat16 --shape qwen3-8b]

Two arms, alternating in one run: *naive* keeps all hidden states of one transformers forward, computes ``fc`` over the
whole context and all logits of a step's slots at once; *ours* is ``ttt_adapt``. Both make the same steps on the same
blocks. Peak memory is measured in a process per arm. Prints tables and ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import time
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pairs import chosen_pair, random_pair
from torch import Tensor

from dgd_lightning.draft.config import DraftConfig
from dgd_lightning.draft.model import DFlashDraft
from dgd_lightning.draft.objective import block_ids, default_gamma
from dgd_lightning.lab.families import FAMILIES
from dgd_lightning.lab.rows import make_context
from dgd_lightning.pair import Pair
from dgd_lightning.target.model import Target
from dgd_lightning.ttt.adapt import ttt_adapt
from dgd_lightning.ttt.config import TTTConfig
from dgd_lightning.ttt.context import Split, draw_blocks
from dgd_lightning.ttt.lora import DraftLora

STEPS = 10
ARMS = ("ours", "naive")


class Cost(NamedTuple):
    """Seconds of one adaptation."""

    prefill: float
    fit: float  # all steps


def config(args: argparse.Namespace) -> TTTConfig:
    """Ten steps of 64 blocks, nothing held out: the fit alone is timed."""
    return TTTConfig(
        steps=STEPS,
        anchors_per_step=args.anchors,
        holdout=0.0,
        labels="target",
        rank=args.rank,
        query_only=args.query_only,
        gradient_checkpointing=args.checkpointing,
    )


def ours(pair: Pair, ids: Tensor, setup: TTTConfig) -> Cost:
    """The library."""
    trace = ttt_adapt(pair, ids, setup).trace
    return Cost(trace.prefill_seconds, trace.fit_seconds)


def naive(pair: Pair, ids: Tensor, setup: TTTConfig) -> Cost:
    """The obvious way, with the same blocks and the same loss."""
    target, draft = pair.target, pair.draft
    assert draft is not None
    began = time.perf_counter()
    with torch.no_grad():
        output = target.model(ids[None].to(target.device), output_hidden_states=True, use_cache=True)
    _wait(target)
    prefilled = time.perf_counter()
    lora = DraftLora(draft, rank=setup.rank, alpha=setup.rank, modules=setup.modules, seed=0)
    optimizer = torch.optim.AdamW(lora.parameters(), lr=setup.lr, weight_decay=0.0)
    size, split = draft.config.block_size, Split(len(ids), len(ids))
    slots = torch.arange(1, size, device=target.device)
    gamma = default_gamma(size)
    for step in range(setup.steps):
        blocks = draw_blocks(split, setup, step, target.device)
        features = torch.cat([output.hidden_states[i + 1] for i in draft.config.target_layer_ids], dim=-1)
        inputs = block_ids(ids[None].to(target.device), blocks.anchors, size, draft.config.mask_token_id)
        hidden = draft.multi_anchor(features.to(draft.dtype), target.embed(inputs), blocks.anchors, blocks.keep)
        logits = target.lm_head(hidden)[0].unflatten(0, (-1, size))[:, 1:].float()  # [N, K − 1, V]
        where = blocks.anchors[0][:, None] + slots  # [N, K − 1]
        inside = blocks.keep[0][:, None] & (where < len(ids))
        law = output.logits[0][(where - 1).clamp(max=len(ids) - 1)].float()
        divergence = F.kl_div(logits.log_softmax(-1), law.log_softmax(-1), reduction="none", log_target=True).sum(-1)
        weights = torch.exp(-(slots - 1) / gamma) * inside
        loss = (divergence * weights).sum() / weights.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lora.parameters(), 1.0)
        optimizer.step()
    _wait(target)
    lora.remove()
    return Cost(prefilled - began, time.perf_counter() - prefilled)


def _wait(target: Target) -> None:
    if target.device.type == "cuda":
        torch.cuda.synchronize()


def context(pair: Pair, length: int) -> Tensor:
    """``length`` tokens: the lab's contexts one after another, or random ones where the pair has no lab tokenizer."""
    if pair.tokenizer is None:
        return torch.randint(pair.target.vocab_size - 1, (length,), generator=torch.Generator().manual_seed(0))
    rng, ids = random.Random(0), []
    while len(ids) < length:
        made = make_context(
            rng.getrandbits(48), rng.choice(list(FAMILIES)), split="train", size=rng.randint(5, 14), contradict=0.02
        )
        ids += pair.tokenizer.encode(made.text + "\n", add_special_tokens=False)
    return torch.tensor(ids[:length])


def qwen3_8b(dtype: torch.dtype, device: str) -> Pair:
    """A pair of the published shape with random weights: Qwen3-8B and its DFlash draft of block size 16."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    shape: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 12288, "head_dim": 128}
    made = Qwen3Config(
        vocab_size=151936, **shape, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
        max_position_embeddings=40960, tie_word_embeddings=False, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    with torch.device(device):
        torch.set_default_dtype(dtype)
        target = Target(AutoModelForCausalLM.from_config(made, attn_implementation="sdpa"))
        draft = DFlashDraft(
            DraftConfig(
                **shape, num_layers=5, num_heads=32, num_kv_heads=8, vocab_size=151936, block_size=16,
                mask_token_id=151669, target_layer_ids=(1, 9, 17, 25, 33), num_target_layers=36, rope_theta=1e6,
            )
        )  # fmt: skip
        torch.set_default_dtype(torch.float32)
    return Pair(target, draft.to(device, dtype).eval(), None)


def make_pair(args: argparse.Namespace) -> Pair:
    """The pair to measure."""
    dtype = getattr(torch, args.dtype)
    if args.shape == "qwen3-8b":
        return qwen3_8b(dtype, args.device)
    if args.shape == "wide":  # where hidden states matter on a CPU
        return random_pair(dtype, args.device, layers=24, width=256)
    return chosen_pair(args.target, args.draft, args.dtype, args.device)[0]


def predicted_bytes(pair: Pair, length: int, setup: TTTConfig) -> dict[str, int]:
    """Extra memory of ``ttt_adapt`` beyond weights, by what holds it: the memory model.

    S positions, H width, F taps, G the width of keys, A the width of queries, N·K slots, b bytes of the dtype. Half
    precision counts fp32 copies where the norms and LoRA make them.
    """
    assert pair.draft is not None
    c, b = pair.draft.config, torch.finfo(pair.target.dtype).bits // 8
    width, keys, queries = c.hidden_size, c.num_kv_heads * c.head_dim, c.num_heads * c.head_dim
    slots, wide = setup.anchors_per_step * c.block_size, max(b, 4)
    target = pair.target.model.config
    cache = 2 * target.num_hidden_layers * target.num_key_value_heads * target.head_dim * length * b
    adapts_context = not set(setup.modules) <= {"q_proj"}
    layers = 1 if setup.gradient_checkpointing else c.num_layers
    # fc: low-rank part and its sum in fp32, the norm's square and its result
    context = length * width * (3 * wide + 2 * b) if "fc" in setup.modules else 0
    # per layer: keys before and after norm and rotation (fp32 inside), values, both joined to the block's, repeated
    # for grouped queries
    per_layer = length * (keys * (3 * wide + 4 * b) + 2 * queries * b) if adapts_context else 2 * length * queries * b
    block_layer = slots * b * (6 * width + 3 * c.intermediate_size + 4 * queries)
    logits = 6 * setup.chunk * c.vocab_size * 4
    return {
        "target cache (freed before the steps)": cache,
        "features": length * c.num_features * b,
        "target states": length * width * b,
        "fc base": length * width * b if "fc" in setup.modules else 0,
        "context": context,
        "layers": layers * (per_layer + block_layer) + 2 * per_layer,  # gradients of one layer's keys and values too
        "mask": slots * (length + slots),
        "logits": logits,
    }


def total(parts: dict[str, int]) -> int:
    """The peak: the prefill and the steps do not meet."""
    steps = sum(value for name, value in parts.items() if not name.startswith("target cache"))
    prefill = sum(
        parts[name] for name in parts if name.startswith("target cache") or name in ("features", "target states")
    )
    return max(steps, prefill)


def peak_bytes(pair: Pair, arm: str, length: int, setup: TTTConfig) -> int:
    """Bytes by which this process's peak grows in one adaptation."""
    run = ours if arm == "ours" else naive
    run(pair, context(pair, 256), setup)  # libraries allocate their own on first use
    ids = context(pair, length)
    if pair.target.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(pair, ids, setup)
        return torch.cuda.max_memory_allocated() - before
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(pair, ids, setup)
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def measured_apart(argv: list[str], arm: str, length: int) -> int:
    """An arm's peak in a process of its own."""
    command = [sys.executable, __file__, *argv, "--memory-arm", arm, "--memory-length", str(length)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(json.loads(out.splitlines()[-1])["peak_bytes"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 4096, 16384, 32768])
    parser.add_argument("--shape", choices=("bundled", "wide", "qwen3-8b"), default="bundled")
    parser.add_argument("--target", help="folder or Hub id; default: the bundled pair")
    parser.add_argument("--draft")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--anchors", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--query-only", action="store_true")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--memory-arm", choices=ARMS, help="measure this arm only (for the script itself)")
    parser.add_argument("--memory-length", type=int, default=4096)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pair, setup = make_pair(args), config(args)
    if args.memory_arm:
        print(json.dumps({"peak_bytes": peak_bytes(pair, args.memory_arm, args.memory_length, setup)}))
        return
    where = f"{args.device}, {args.dtype}, {args.threads} threads"
    print(f"{args.shape} pair, {where}; {STEPS} steps of {args.anchors} blocks, modules {', '.join(setup.modules)}")
    head = ("tokens", "arm", "prefill s", "step s", "10 steps / prefill", "peak MiB", "model MiB")
    print("".join(f"{title:>20}" for title in head))
    records = []
    for length in args.lengths:
        ids = context(pair, length)
        costs: dict[str, list[Cost]] = {arm: [] for arm in ARMS}
        for repeat in range(args.repeats + 1):
            for arm, run in (("ours", ours), ("naive", naive)):
                cost = run(pair, ids, setup)
                if repeat > 0 or args.repeats == 0:
                    costs[arm].append(cost)
        for arm in ARMS:
            prefill = statistics.median(cost.prefill for cost in costs[arm])
            step = statistics.median(cost.fit for cost in costs[arm]) / STEPS
            peak = None if args.no_memory else measured_apart(sys.argv[1:], arm, length)
            model = total(predicted_bytes(pair, length, setup)) if arm == "ours" else None
            record = {"tokens": length, "arm": arm, "prefill_seconds": prefill, "step_seconds": step,
                      "ratio": STEPS * step / prefill, "peak_bytes": peak, "model_bytes": model}  # fmt: skip
            records.append(record)
            sizes = [f"{value / 2**20:.0f}" if value is not None else "–" for value in (peak, model)]
            cells = [length, arm, f"{prefill:.3f}", f"{step:.4f}", f"{record['ratio']:.2f}", *sizes]
            print("".join(f"{cell!s:>20}" for cell in cells), flush=True)
    with torch.device("meta"):
        big = qwen3_8b(torch.bfloat16, "meta")
    plan = TTTConfig(steps=STEPS, holdout=0.0, rank=43, gradient_checkpointing=True)
    parts = predicted_bytes(big, 32768, plan)
    print(f"memory model, Qwen3-8B shape, bf16, 32,768 tokens: {total(parts) / 2**30:.2f} GiB")
    for name, value in parts.items():
        print(f"  {name:<40}{value / 2**30:8.2f} GiB")
    settings = {key: value for key, value in vars(args).items() if not key.startswith("memory_")}
    print(json.dumps({"benchmark": "ttt", **settings, "records": records, "model_8b_32k": parts}))


if __name__ == "__main__":
    main()
