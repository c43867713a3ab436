"""What test-time training costs: seconds per step against the prefill, and peak memory, as the context grows.

    python benchmarks/ttt.py [--lengths 1024 4096 16384] [--device cuda --dtype bfloat16 --shape qwen3-8b]

Two arms, alternating in one run: *naive* keeps all hidden states of one transformers forward, computes ``fc`` over the
whole context, attends under one dense mask and makes all logits of a step's slots at once; *ours* is ``ttt_adapt``.
Both make the same steps on the same blocks. Steps are set against the arm's own prefill and against one transformers
forward. A second table (``--whole-lengths``) has whole adaptations, validation texts and their scores with them, by
default and in the lab's settings. Prints tables and ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
import yaml
from pairs import chosen_pair, random_pair
from peak import peak_bytes
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dgd_lightning.draft.config import DraftConfig
from dgd_lightning.draft.lora import DraftLora
from dgd_lightning.draft.model import CONTEXT_PIECE, DFlashDraft
from dgd_lightning.draft.objective import block_ids, default_gamma
from dgd_lightning.draft.tiles import KEPT, width_of
from dgd_lightning.lab.families import FAMILIES
from dgd_lightning.lab.rows import make_context
from dgd_lightning.pair import Pair
from dgd_lightning.target.model import Target
from dgd_lightning.ttt.adapt import Material, fit_to, gather, ttt_adapt
from dgd_lightning.ttt.config import TTTConfig
from dgd_lightning.ttt.context import Split, draw_blocks
from dgd_lightning.ttt.problem import AdaptProblem

STEPS = 10
ARMS = ("ours", "naive")
LAB = Path(__file__).parents[1] / "configs/ttt/predict_lab.yaml"
TILE = 128  # query rows of a FlexAttention tile


class Cost(NamedTuple):
    """Seconds of one adaptation."""

    prefill: float
    fit: float  # all steps


def config(args: argparse.Namespace) -> TTTConfig:
    """Ten steps of 64 blocks, nothing held out: the fit alone is timed."""
    return TTTConfig(
        steps=STEPS,
        anchors_per_step=args.anchors,
        validation_texts=0,
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
        read = (features.to(draft.dtype), target.embed(inputs), blocks.anchors, blocks.keep)
        hidden = draft.multi_anchor(*read, attention="dense")
        logits = target.lm_head(hidden)[0].unflatten(0, (-1, size))[:, 1:].float()  # [N, K − 1, V]
        where = blocks.anchors[0][:, None] + slots  # [N, K − 1]
        inside = blocks.keep[0][:, None] & (where < len(ids))
        distribution = output.logits[0][(where - 1).clamp(max=len(ids) - 1)].float()
        divergence = F.kl_div(
            logits.log_softmax(-1), distribution.log_softmax(-1), reduction="none", log_target=True
        ).sum(-1)
        weights = torch.exp(-(slots - 1) / gamma) * inside
        loss = (divergence * weights).sum() / weights.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lora.parameters(), 1.0)
        optimizer.step()
    _wait(target)
    lora.remove()
    return Cost(prefilled - began, time.perf_counter() - prefilled)


def adaptation(pair: Pair, ids: Tensor, setup: TTTConfig) -> dict[str, Any]:
    """Seconds of a whole adaptation, part by part."""
    scoring, score = list[float](), AdaptProblem.score

    def clocked(self: AdaptProblem, step: int) -> Any:
        began = time.perf_counter()
        found = score(self, step)
        _wait(self.target)
        scoring.append(time.perf_counter() - began)
        return found

    with mock.patch.object(AdaptProblem, "score", clocked):
        trace = ttt_adapt(pair, ids, setup).trace
    return {
        "context_tokens": len(ids),
        "prefill_seconds": trace.prefill_seconds,
        "validation_seconds": trace.validation_seconds,
        "step_seconds": trace.fit_seconds - sum(scoring),
        "score_seconds": sum(scoring),
        "validation_texts": trace.validation_texts,
        "scores": len(scoring),
        "steps": len(trace.losses),
    }


def _wait(target: Target) -> None:
    if target.device.type == "cuda":
        torch.cuda.synchronize()


MARK = "\ue000"  # of private use: no text has it


def context(pair: Pair, length: int) -> Tensor:
    """``length`` tokens: the lab's contexts one after another, or random ones where the pair has no lab tokenizer."""
    if pair.tokenizer is None:
        return torch.randint(pair.target.vocab_size - 1, (length,), generator=torch.Generator().manual_seed(0))
    rng, ids = random.Random(0), list[int]()
    while len(ids) < length:
        made = make_context(
            rng.getrandbits(48), rng.choice(list(FAMILIES)), split="train", size=rng.randint(5, 14), contradict=0.02
        )
        ids += pair.tokenizer.encode(made.text + "\n", add_special_tokens=False)
    return torch.tensor(ids[:length])


def chat(pair: Pair, length: int) -> Tensor:
    """About ``length`` tokens up to where a user would speak, as contexts of tasks end."""
    assert pair.tokenizer is not None
    text = pair.tokenizer.decode(context(pair, length))
    turns = [{"role": "system", "content": text}, {"role": "user", "content": MARK}]
    whole = pair.tokenizer.apply_chat_template(turns, tokenize=False)
    return torch.tensor(pair.tokenizer.encode(whole[: whole.rindex(MARK)], add_special_tokens=False))


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


class Memory(NamedTuple):
    """The memory model: bytes beyond weights, by what holds them."""

    prefill: dict[str, int]
    steps: dict[str, int]


def predicted(pair: Pair, length: int, setup: TTTConfig, *, flex: bool) -> Memory:
    """What ``ttt_adapt`` holds at the worst moment of its prefill and of its steps.

    S positions, H width, N·K slots, b bytes of the dtype, w bytes of LoRA's and the norms' (4 at least). ``flex``: by
    FlexAttention, which reads the keys of context and blocks joined; else by tiles, which read them where they are and
    keep a number for each query and each key that it sees, while there is room.
    """
    assert pair.draft is not None
    c, b = pair.draft.config, torch.finfo(pair.target.dtype).bits // 8
    w, half = max(b, 4), b < 4
    width, keys, queries = c.hidden_size, c.num_kv_heads * c.head_dim, c.num_heads * c.head_dim
    slots = setup.anchors_per_step * c.block_size
    target = pair.target.model.config
    chunk = min(1024, length)  # of the target's prefill
    features, states = length * c.num_features * b, length * width * b
    prefill = {
        "features": features,
        "target states": states,
        "target cache": 2 * target.num_hidden_layers * target.num_key_value_heads * target.head_dim * length * b,
        "a layer's keys, repeated": 2 * target.num_attention_heads * target.head_dim * length * b,  # for its groups
        "a chunk's mask": 2 * chunk * length * b,
        "a chunk's activations": chunk * b * (2 * c.num_features + 3 * target.intermediate_size),
    }
    piece = min(length, CONTEXT_PIECE) if setup.gradient_checkpointing else length
    adapts_fc, adapts_keys = "fc" in setup.modules, bool({"fc", "k_proj", "v_proj"} & set(setup.modules))
    # Rows of fc: the sum with the update, which the norm's backward needs, and the update; half precision makes updates
    # piece by piece, and the norm widens the sum.
    fc_rows = piece * width * (b + w if half else 2 * w) if adapts_fc else 0
    # Rows of a layer's keys: the norm's input; half precision adds it rounded.
    key_rows = piece * keys * (w + b * half) if adapts_keys else 0
    kept = 2 * length * keys * b  # a layer's keys and values
    terms = min(KEPT, round(_share_seen(pair, length, setup, None) * length * slots * c.num_heads * w))
    seen = kept if flex else terms + kept * adapts_keys  # flex: joined to the block's
    block = slots * b * (8 * width + 4 * c.intermediate_size + 6 * queries)
    layers = 1 if setup.gradient_checkpointing else c.num_layers
    return Memory(
        prefill,
        {
            "features": features,
            "target states": states,
            "fc's own product": length * width * b if adapts_fc else 0,
            "context": length * width * b * (2 if adapts_keys else 1),  # with its gradient
            "rows of fc": fc_rows,
            "keys and values for all steps": 0 if adapts_keys else c.num_layers * kept,
            "layers' keys and values": layers * (key_rows + seen),
            "gradients of one layer's": 2 * kept if flex else kept * adapts_keys,  # flex: joined, and apart
            "layers' blocks": layers * block + c.num_layers * slots * width * b,
            "mask": slots * (length + slots) if flex else 0,
            "logits": 6 * min(setup.chunk, slots) * c.vocab_size * 4,
        },
    )


class Work(NamedTuple):
    """Floating-point operations, two per multiplication and addition."""

    prefill: float
    step: float


def _share_seen(pair: Pair, length: int, setup: TTTConfig, at_once: int | None) -> float:
    """Of the context, in the mean over blocks whose anchors are drawn evenly.

    ``at_once`` neighbouring blocks read up to the last anchor among them; None: each to the end of its tile of keys.
    """
    assert pair.draft is not None
    c = pair.draft.config
    if at_once is not None:
        groups = math.ceil(setup.anchors_per_step / at_once)
        return (groups + 1) / (2 * groups)
    return min(1.0, 0.5 + width_of(setup.anchors_per_step * c.block_size * c.num_heads) / (2 * length))


def arithmetic(pair: Pair, length: int, setup: TTTConfig, *, at_once: int | None = None) -> Work:
    """What the matrix products of a prefill and of a step come to; frozen weights need no gradients of their own.

    ``at_once`` blocks read the context up to the last anchor among them, and one another; None: by tiles.
    """
    assert pair.draft is not None
    c, target = pair.draft.config, pair.target.model.config
    theirs = target.num_attention_heads * target.head_dim
    layer = _weights(target.hidden_size, theirs, target.num_key_value_heads * target.head_dim, target.intermediate_size)
    chunks = range(0, length, 1024)
    pairs_of_positions = sum(min(1024, length - start) * min(start + 1024, length) for start in chunks)
    prefill = target.num_hidden_layers * (2 * length * layer + 4 * pairs_of_positions * theirs)
    width, keys, queries = c.hidden_size, c.num_kv_heads * c.head_dim, c.num_heads * c.head_dim
    slots, again = setup.anchors_per_step * c.block_size, int(setup.gradient_checkpointing)
    adapts = set(setup.modules) & {"fc", "k_proj", "v_proj"}
    blocks = 2 * slots * _weights(width, queries, keys, c.intermediate_size) * (2 + again)
    context = 2 * length * 2 * width * keys * (2 + again) if adapts else 0
    beside = c.block_size * (at_once or 1)  # slots that it attends to
    passes = 3 + again - (at_once is None and not adapts)  # tiles make no gradients that nobody wants
    attention = 4 * slots * (length * _share_seen(pair, length, setup, at_once) + beside) * queries * passes
    inner = sum({"q_proj": width + queries, "k_proj": 0, "v_proj": 0}.get(name, 0) for name in setup.modules)
    outer = (width + keys) * len(set(setup.modules) & {"k_proj", "v_proj"})
    lora = 2 * setup.rank * (slots * inner + (length + slots) * outer) * (3 + again)
    fc = 2 * setup.rank * length * (c.num_features + width) * (2 + again) if "fc" in setup.modules else 0
    labelled = setup.anchors_per_step * (c.block_size - 1)
    head = 2 * labelled * width * c.vocab_size * 3  # the draft's logits and their gradient, the target's
    return Work(prefill, c.num_layers * (blocks + context + attention + lora) + fc + head)


def _weights(width: int, queries: int, keys: int, inner: int) -> int:
    """Of a layer's matrices."""
    return width * (2 * queries + 2 * keys + 3 * inner)


def counted(pair: Pair, length: int, setup: TTTConfig) -> Work:
    """The same, counted by torch while it runs."""
    gathered: list[Material] = []
    with FlopCounterMode(display=False) as prefill:
        gathered.append(gather(pair, context(pair, length), setup))
    with FlopCounterMode(display=False) as once:
        fit_to(pair, gathered[0], replace(setup, steps=1))
    with FlopCounterMode(display=False) as thrice:
        fit_to(pair, gathered[0], replace(setup, steps=3))
    return Work(prefill.get_total_flops(), (thrice.get_total_flops() - once.get_total_flops()) / 2)


class Peak(NamedTuple):
    """Bytes at the worst moment, beyond weights, of the prefill and of the steps."""

    prefill: int
    steps: int


def peak_of(pair: Pair, arm: str, length: int, setup: TTTConfig) -> Peak:
    """Measured on two steps, since every step holds the same; the naive way keeps all of its prefill anyway."""
    setup, device = replace(setup, steps=2), pair.target.device
    run = ours if arm == "ours" else naive
    run(pair, context(pair, 256), setup)  # libraries allocate their own on first use
    ids = context(pair, length)
    if arm == "naive":
        whole = peak_bytes(lambda: run(pair, ids, setup), device)
        return Peak(whole, whole)
    gathered: list[Material] = []
    prefill = peak_bytes(lambda: gathered.append(gather(pair, ids, setup)), device)
    read = gathered[0].read
    held = sum(x.numel() * x.element_size() for x in (read.ids, read.features, read.states))
    return Peak(prefill, held + peak_bytes(lambda: fit_to(pair, gathered[0], setup), device))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 4096, 16384, 32768])
    parser.add_argument("--whole-lengths", type=int, nargs="*", default=[], help="of whole adaptations; lab pairs")
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
    parser.add_argument("--cpu-seconds", action="store_true", help="not the clock's: on a crowded CPU, with one thread")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-times", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.cpu_seconds:
        time.perf_counter = time.process_time
    pair, setup = make_pair(args), config(args)
    where = f"{args.device}, {args.dtype}, {args.threads} threads" + ", CPU seconds" * args.cpu_seconds
    print(f"{args.shape} pair, {where}; {STEPS} steps of {args.anchors} blocks, modules {', '.join(setup.modules)}")
    records: list[dict[str, Any]] = []
    if not args.no_times:
        titles = ("tokens", "arm", "prefill s", "step s", "10 steps / prefill", "/ one forward")
        print("".join(f"{title:>20}" for title in titles))
        for length in args.lengths:
            records += times(pair, length, setup, args.repeats)
    for length in args.whole_lengths:
        records += adaptations(pair, length)
    if not args.no_memory:
        print("".join(f"{title:>20}" for title in ("tokens", "arm", "phase", "peak MiB", "model MiB", "model / peak")))
        for length in args.lengths:
            records += memory(pair, length, setup)
    first = min(args.lengths)
    own, torchs = arithmetic(pair, first, setup), counted(pair, first, setup)
    print(f"\narithmetic against torch's count at {first} tokens: prefill {own.prefill / torchs.prefill:.3f}, ", end="")
    print(f"step {own.step / torchs.step:.3f}")
    with torch.device("meta"):
        big = qwen3_8b(torch.bfloat16, "meta")
    plan = TTTConfig(steps=STEPS, validation_texts=0, holdout=0.0, rank=43, gradient_checkpointing=True)
    assert big.draft is not None
    print(f"Qwen3-8B's shape, {STEPS} steps of {plan.anchors_per_step} blocks, operations against the prefill's:")
    shares = {}
    for length in (4096, 8192, 16384, 32768):
        plans = plan, replace(plan, gradient_checkpointing=False)
        work = [arithmetic(big, length, one, at_once=TILE // big.draft.config.block_size) for one in plans]
        shares[length] = [STEPS * one.step / one.prefill for one in work]
        print(f"  {length:>6} tokens {shares[length][1]:.2f}, with checkpointing {shares[length][0]:.2f}")
    model = predicted(big, 32768, plan, flex=True)
    extra = max(sum(model.steps.values()), model.prefill["features"] + model.prefill["target states"])
    print(f"its memory in bf16 at 32,768 tokens with checkpointing: {extra / 2**30:.2f} GiB beside weights and the")
    print("target's cache, which decoding needs too and which is freed before the steps. By what holds it:")
    for phase, parts in model._asdict().items():
        for name, value in parts.items():
            print(f"  {phase:<8} {name:<30}{value / 2**30:8.2f} GiB")
    found = {"records": records, "arithmetic_8b": shares, "model_8b_32k": model._asdict()}
    print(json.dumps({"benchmark": "ttt", **vars(args), **found}))


def times(pair: Pair, length: int, setup: TTTConfig, repeats: int) -> list[dict[str, Any]]:
    """Medians of both arms, alternating; the first round warms up where there are more."""
    ids = context(pair, length)
    costs: dict[str, list[Cost]] = {arm: [] for arm in ARMS}
    for repeat in range(repeats + 1):
        for arm, run in (("ours", ours), ("naive", naive)):
            cost = run(pair, ids, setup)
            if repeat > 0 or repeats == 0:
                costs[arm].append(cost)
    records = []
    for arm in ARMS:
        prefill = statistics.median(cost.prefill for cost in costs[arm])
        step = statistics.median(cost.fit for cost in costs[arm]) / STEPS
        ratio, forward = STEPS * step / prefill, statistics.median(cost.prefill for cost in costs["naive"])
        record = {"tokens": length, "arm": arm, "prefill_seconds": prefill, "step_seconds": step, "ratio": ratio}
        records.append({**record, "ratio_to_one_forward": STEPS * step / forward})
        cells = (length, arm, f"{prefill:.3f}", f"{step:.4f}", f"{ratio:.2f}", f"{STEPS * step / forward:.2f}")
        print("".join(f"{cell!s:>20}" for cell in cells), flush=True)
    return records


def adaptations(pair: Pair, length: int) -> list[dict[str, Any]]:
    """Whole adaptations, set against reading the context once."""
    lab = yaml.safe_load(LAB.read_text(encoding="utf-8"))["model"]["init_args"]["ttt"]
    ids, once, records = chat(pair, length), 0.0, []
    parts = ("prefill", "validation texts", "step", "score")
    print(
        "".join(f"{title:>20}" for title in ("tokens", "settings", *(f"{part} s" for part in parts), "all / one read"))
    )
    for name, setup in (("defaults", TTTConfig()), (LAB.name, TTTConfig(**lab))):
        record = adaptation(pair, ids, setup)
        seconds = [record[f"{part}_seconds"] for part in parts]
        once = once or seconds[0]  # the first settings read the context once
        record |= {"settings": name, "ratio_to_one_read": sum(seconds) / once}
        records.append(record)
        cells = (len(ids), name, *(f"{one:.2f}" for one in seconds), f"{sum(seconds) / once:.1f}")
        print("".join(f"{cell!s:>20}" for cell in cells), end="")
        print(
            f"  ({record['steps']} steps, {record['scores']} scores of {record['validation_texts']} validation texts)",
            flush=True,
        )
    return records


def memory(pair: Pair, length: int, setup: TTTConfig) -> list[dict[str, Any]]:
    """Peaks of both arms, beside the model of ours."""
    model = predicted(pair, length, setup, flex=pair.target.device.type == "cuda")
    records = []
    for arm in ARMS:
        for phase, peak in peak_of(pair, arm, length, setup)._asdict().items():
            guess = sum(getattr(model, phase).values()) if arm == "ours" else None
            records.append({"tokens": length, "arm": arm, "phase": phase, "peak_bytes": peak, "model_bytes": guess})
            sizes = (f"{peak / 2**20:.0f}", *([f"{guess / 2**20:.0f}", f"{guess / peak:.2f}"] if guess else ["–", "–"]))
            print("".join(f"{cell!s:>20}" for cell in (length, arm, phase, *sizes)), flush=True)
    return records


if __name__ == "__main__":
    main()
