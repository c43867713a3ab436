"""What ``top_p`` and ``top_k`` cost: of the distribution alone, and of a speculative batch. Alternating in one run.

    python benchmarks/sampling.py [--target FOLDER [--draft FOLDER]] [--device cuda] [--threads 1]

Distributions are [16, 8, 49,152]: peaked ones, some flat ones among them, and flat ones only, whose nuclei have most of
the vocabulary. ``all sorted`` is how ``top_p`` was done before. A target without a draft gets a random one of three
layers: most of its proposals are wrong and flat, the worst case for ``top_p``. Times are CPU milliseconds (on another
device seconds of the clock), medians over the repeats. Prints tables and ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pairs import chosen_pair, lab_prompts, random_prompts
from torch import Tensor

from dgd_lightning.decode.sampling import SamplingParams, probabilities
from dgd_lightning.draft.model import DFlashDraft
from dgd_lightning.methods.speculative import speculative_generate
from dgd_lightning.modules.draft_training import new_draft_config
from dgd_lightning.pair import Pair
from dgd_lightning.target.load import load_target

SHAPE = (16, 8, 49_152)
KNOBS: dict[str, dict[str, Any]] = {
    "neither": {},
    "top_p": {"top_p": 0.95},
    "top_k": {"top_k": 50},
    "both": {"top_k": 50, "top_p": 0.95},
}


def all_sorted(logits: Tensor, params: SamplingParams) -> Tensor:
    """The distribution after ``top_p`` by a stable sort of the whole vocabulary, logits and result [.., V]."""
    scaled = (logits - logits.amax(-1, keepdim=True)) / params.temperature
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    mass = ordered.softmax(-1)
    dropped = torch.zeros_like(scaled, dtype=torch.bool).scatter_(-1, order, mass.cumsum(-1) - mass >= params.top_p)
    return scaled.masked_fill(dropped, -math.inf).softmax(-1)


def some_logits(device: str) -> dict[str, Tensor]:
    """Logits [16, 8, V] by what they are like."""
    generator = torch.Generator().manual_seed(0)
    flat, peaked = (scale * torch.randn(SHAPE, generator=generator) for scale in (1, 3))
    peaked[..., ::2500] += 18 * torch.rand(peaked[..., ::2500].shape, generator=generator)
    logits = {"peaked": peaked, "two of 16 flat": torch.cat([peaked[:14], flat[:2]]), "flat": flat}
    return {name: kind.to(device) for name, kind in logits.items()}


def medians(calls: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, float]:
    """Milliseconds of each call; they take turns, after a round that is not measured."""
    clock, cuda = (time.process_time, False) if device == "cpu" else (time.perf_counter, True)
    took: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            began = clock()
            call()
            if cuda:
                torch.cuda.synchronize()
            took[name] += [1e3 * (clock() - began)] * (repeat > 0)
    return {name: statistics.median(times) for name, times in took.items()}


def show(title: str, found: dict[str, float]) -> None:
    """One line for people: milliseconds, and the ratio to the first."""
    first = next(iter(found.values()))
    print(f"{title:>16}" + "".join(f"  {name} {ms:.1f} ms (× {ms / first:.2f})" for name, ms in found.items()))


def batch_pair(args: argparse.Namespace) -> tuple[Pair, str]:
    """The pair whose batches are timed; the target alone gets a random draft of blocks of 8."""
    if args.target is None or args.draft is not None:
        return chosen_pair(args.target, args.draft, args.dtype, args.device)
    target = load_target(args.target, dtype=args.dtype, device=args.device)
    torch.manual_seed(0)
    draft = DFlashDraft(new_draft_config(target, 3, 8, None, 0)).to(target.device, target.dtype).eval()
    return Pair(target, draft, None), args.target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="folder or Hub id; default: the bundled pair, or a random one of its size")
    parser.add_argument("--draft")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=16, help="rows decoded together")
    parser.add_argument("--new", type=int, default=8, help="tokens per row, stop tokens ignored")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"distributions {list(SHAPE)} and batches of {args.batch}, {args.device}, {args.threads} threads")
    results = {}
    for name, logits in some_logits(args.device).items():
        calls = {kind: partial(probabilities, logits, SamplingParams(0.8, **knobs)) for kind, knobs in KNOBS.items()}
        calls["all sorted"] = partial(all_sorted, logits, SamplingParams(0.8, top_p=0.95))
        results[name] = medians(calls, args.repeats, args.device)
        show(name, results[name])
    pair, name = batch_pair(args)
    prompts = (lab_prompts(pair, args.batch) or random_prompts(pair, args.batch, 128))[: args.batch]
    fixed = {"max_new_tokens": args.new, "stop_token_ids": [], "temperature": 1.0, "seed": 1}
    decode = partial(speculative_generate, pair, prompts, **fixed)
    results["batch"] = medians(
        {kind: partial(decode, **knobs) for kind, knobs in KNOBS.items()}, args.repeats, args.device
    )
    show(f"batch, {name}", results["batch"])
    print(json.dumps({"benchmark": "sampling", "pair": name, **vars(args), "results": results}))


if __name__ == "__main__":
    main()
