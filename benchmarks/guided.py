"""Speculative guided decoding against token by token, its cost model, and a sweep over β; alternating, in one run.

    python benchmarks/guided.py [--target FOLDER --draft FOLDER --device cuda --dtype bfloat16] [--threads 1]

The lab's long tasks are decoded until the pair's stop tokens, one prompt at a time. The cost model is that of a cycle's
forwards: τ tokens for T_d (a block is drafted) + T_t (the target reads it) + T_ma (the readout at all its positions),
where token by token one token takes target and readout at one position. ``of it`` is how much of the speed-up that
these measured times promise is there in wall time. The simpler formula τ·(T_t+T_d)/(T_t+T_d+T_ma) takes the block's
forwards for both loops; on a CPU, where a longer forward takes longer, it promises more than there is.
Prints tables and ends with one JSON line. Times are medians over the repeats, ratios medians of each repeat's own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from overhead import Clock, timed_cycles
from pairs import chosen_pair, lab_prompts, random_prompts
from torch import Tensor

from dgd_lightning.decode.batch import Batch
from dgd_lightning.decode.blending import Blend
from dgd_lightning.decode.drafter import Drafter
from dgd_lightning.decode.readouts.draft import DraftState
from dgd_lightning.methods.base import Guidance
from dgd_lightning.methods.guided import guided_generate, guided_sweep
from dgd_lightning.pair import Pair

BETAS = (0.1, 0.25, 0.5)
SWEEP = (-0.5, -0.25, -0.1, 0.1, 0.2, 0.3, 0.4, 0.5)
KINDS = ("draft", "target", "readout")
SEAMS = (
    (Drafter, "logits", "draft"),
    (Drafter, "extend", "draft"),
    (Batch, "step", "target"),
    (DraftState, "logits", "readout"),
    (DraftState, "extend", "readout"),
)


class WaitingClock(Clock):
    """On CUDA it waits for every forward, so the run's own wall time means nothing."""

    def timed(self, function: Callable[[], Any]) -> tuple[Any, Any]:
        began = self._now()
        result = function()
        return result, self._now() - began

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()


class Round(NamedTuple):
    """One pass of a loop over all prompts."""

    seconds: float  # of the decode loops, prefills excluded
    forwards: dict[str, float]  # ms per cycle, by kind


LOOPS = {"token by token": False, "speculative": True}


def alternate(pair: Pair, prompts: list[Tensor], knobs: dict[str, Any], clocked: bool) -> dict[str, Round]:
    """Both loops once over all prompts, taking turns at every prompt."""
    clocks = {name: WaitingClock() for name in LOOPS}
    seconds, cycles = dict.fromkeys(LOOPS, 0.0), dict.fromkeys(LOOPS, 0)
    for prompt in prompts:
        for name, speculative in LOOPS.items():
            with timed_cycles(clocks[name], SEAMS) if clocked else nullcontext():
                (output,) = guided_generate(pair, [prompt], speculative=speculative, **knobs)
            seconds[name] += output.trace.decode_seconds
            cycles[name] += output.trace.target_forwards
    return {
        name: Round(seconds[name], {kind: 1e3 * clocks[name].seconds(kind) / cycles[name] for kind in KINDS})
        for name in LOOPS
    }


def one_beta(pair: Pair, prompts: list[Tensor], beta: float, args: argparse.Namespace) -> dict[str, Any]:
    """Both loops at one β: tokens, forwards, seconds of their decode loops, and the cost model's."""
    cuda = pair.target.device.type == "cuda"
    knobs = {"beta": beta, "max_new_tokens": args.limit}
    outputs = {  # warms up too
        name: [guided_generate(pair, [prompt], speculative=variant, **knobs)[0] for prompt in prompts]
        for name, variant in LOOPS.items()
    }
    lengths = [n for row in outputs["speculative"] for n in row.acceptance_lengths]
    counts = {name: sum(len(row.tokens) - 1 for row in rows) for name, rows in outputs.items()}
    tau = sum(lengths) / len(lengths)
    speeds, models, simples, rounds = [], [], [], []
    for _ in range(args.repeats):
        clocked = alternate(pair, prompts, knobs, clocked=True)
        wall = alternate(pair, prompts, knobs, clocked=False) if cuda else clocked  # a clock on CUDA waits
        slow, fast = (clocked[name].forwards for name in LOOPS)
        cycle = fast["draft"] + fast["target"] + fast["readout"]
        rates = {name: counts[name] / wall[name].seconds for name in LOOPS}
        speeds.append(rates["speculative"] / rates["token by token"])
        models.append(tau * (slow["target"] + slow["readout"]) / cycle)
        simples.append(tau * (fast["target"] + fast["draft"]) / cycle)
        rounds.append((rates, slow, fast))
    middle = statistics.median
    return {
        "beta": beta,
        "rows": len(prompts),
        "tokens": {name: sum(len(row.tokens) for row in rows) for name, rows in outputs.items()},
        "equal_rows": sum(a.tokens.equal(b.tokens) for a, b in zip(*outputs.values(), strict=True)) / len(prompts),
        "tau": tau,
        "forwards": {
            name: {
                "target": sum(row.trace.target_forwards for row in rows),
                "draft": sum(row.trace.draft_forwards for row in rows),
            }
            for name, rows in outputs.items()
        },
        "tokens_per_second": {name: middle(rates[name] for rates, _, _ in rounds) for name in LOOPS},
        "ms_per_cycle": {
            name: {kind: middle(one[at][kind] for one in rounds) for kind in rounds[0][1]}
            for at, name in enumerate(LOOPS, 1)
        },
        "speed_up": middle(speeds),
        "model": middle(models),
        "of_model": middle(speed / model for speed, model in zip(speeds, models, strict=True)),
        "simple_model": middle(simples),
        "of_simple_model": middle(speed / model for speed, model in zip(speeds, simples, strict=True)),
    }


def sweep(pair: Pair, prompts: list[Tensor], args: argparse.Namespace) -> dict[str, Any]:
    """Eight β of each prompt as rows of one batch, against one β, and against eight calls; whole calls, prefill too."""
    cuda = pair.target.device.type == "cuda"
    knobs = {"max_new_tokens": args.limit}
    variants: dict[str, Callable[[Tensor], Any]] = {
        "one β": lambda prompt: guided_generate(pair, [prompt], beta=0.3, **knobs),
        "eight β, one batch": lambda prompt: guided_sweep(pair, [prompt], [Guidance(Blend(b)) for b in SWEEP], **knobs),
        "eight β, eight calls": lambda prompt: [guided_generate(pair, [prompt], beta=b, **knobs) for b in SWEEP],
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for variant in variants.values():
        variant(prompts[0])
    for _ in range(args.repeats):
        totals = dict.fromkeys(variants, 0.0)
        for prompt in prompts:
            for name, variant in variants.items():
                began = time.perf_counter()
                variant(prompt)
                if cuda:
                    torch.cuda.synchronize()
                totals[name] += time.perf_counter() - began
        for name, total in totals.items():
            seconds[name].append(total)
    took = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "betas": SWEEP,
        "seconds": took,
        "over_one": took["eight β, one batch"] / took["one β"],
        "calls_over_batch": took["eight β, eight calls"] / took["eight β, one batch"],
    }


def show(records: list[dict[str, Any]]) -> None:
    """The table for people."""
    head = (
        "β",
        "tokens",
        "equal",
        "τ",
        "slow tok/s",
        "fast tok/s",
        "×",
        "model ×",
        "of it",
        "T_d ms",
        "T_t ms",
        "T_ma ms",
    )
    print("".join(f"{title:>11}" for title in head))
    for r in records:
        rates, fast = r["tokens_per_second"], r["ms_per_cycle"]["speculative"]
        cells = [f"{r['beta']:g}", str(r["tokens"]["speculative"]), f"{r['equal_rows']:.0%}", f"{r['tau']:.2f}"]
        cells += [f"{rates[name]:.0f}" for name in ("token by token", "speculative")]
        cells += [f"{r['speed_up']:.2f}", f"{r['model']:.2f}", f"{r['of_model']:.0%}"]
        cells += [f"{fast[kind]:.2f}" for kind in ("draft", "target", "readout")]
        print("".join(f"{cell:>11}" for cell in cells))
    for r in records:
        counts = ", ".join(
            f"{name}: {count['target']} target and {count['draft']} draft forwards"
            for name, count in r["forwards"].items()
        )
        print(f"β {r['beta']:g}  {counts}; {r['of_simple_model']:.0%} of τ·(T_t+T_d)/(T_t+T_d+T_ma)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="folder or Hub id; default: the bundled pair")
    parser.add_argument("--draft")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--contexts", type=int, default=2, help="lab contexts a family whose long task is decoded")
    parser.add_argument("--limit", type=int, default=192, help="most tokens per row; stop tokens end it earlier")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--betas", type=float, nargs="*", default=list(BETAS))
    args = parser.parse_args()
    if (args.target is None) != (args.draft is None):
        parser.error("--target and --draft go together")
    torch.set_num_threads(args.threads)
    pair, name = chosen_pair(args.target, args.draft, args.dtype, args.device)
    prompts = lab_prompts(pair, args.contexts) or random_prompts(pair, 4, 128)
    print(f"{name} pair, {args.device}, {args.dtype}, {args.threads} threads; {len(prompts)} prompts, one at a time")
    records = [one_beta(pair, prompts, beta, args) for beta in args.betas]
    show(records)
    swept = sweep(pair, prompts, args)
    print(f"eight β of a prompt in one batch: {swept['over_one']:.2f} × the time of one β; ", end="")
    print(f"eight calls take {swept['calls_over_batch']:.2f} × as long as the batch")
    print(json.dumps({"benchmark": "guided", "pair": name, **vars(args), "records": records, "sweep": swept}))


if __name__ == "__main__":
    main()
