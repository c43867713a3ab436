"""Autoregressive, speculative and transformers' decoding, alternating in one run; the loop's overhead; prefill memory.

    python benchmarks/decode.py [--target FOLDER --draft FOLDER --device cuda --dtype bfloat16] [--new 128] [--batch 1]

Prints tables and ends with one JSON line. Times are medians over the repeats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from dialled import DialledDraft
from memory import ARMS, compare, peak_bytes
from pairs import chosen_pair, chosen_prompts, random_pair
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dgd_lightning.decode import autoregressive_generate, engine, speculative, speculative_generate
from dgd_lightning.pair import Pair
from dgd_lightning.types import DecodeOutput

Outputs = list[DecodeOutput]


class Clock:
    """Seconds inside the two forwards of a cycle, and between; on CUDA by events, which do not hold the loop up."""

    def __init__(self, cuda: bool) -> None:
        self.cuda, self.on = cuda, False
        self.spans: dict[str, list[Any]] = {"draft": [], "verify": []}

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed while the clock is on."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self.on:
                return function(*args, **kwargs)
            began = self._now()
            result = function(*args, **kwargs)
            self.spans[name].append((began, self._now()))
            return result

        return timed

    def seconds(self, name: str) -> float:
        """Total of a span."""
        if self.cuda:
            torch.cuda.synchronize()
            return sum(began.elapsed_time(ended) for began, ended in self.spans[name]) / 1000
        return sum(ended - began for began, ended in self.spans[name])


@contextmanager
def timed_cycles(cuda: bool) -> Iterator[Clock]:
    """Time the drafting and verifying of every cycle, the prefill excluded."""
    clock = Clock(cuda)
    seams = [
        (speculative.Drafter, "logits", "draft"),
        (speculative.Drafter, "extend", "draft"),
        (engine.Batch, "step", "verify"),
    ]
    originals = [getattr(owner, method) for owner, method, _ in seams]
    start = engine.Batch.__init__

    def started(*args: Any, **kwargs: Any) -> None:
        clock.on = False  # the prefill extends the draft's cache too
        start(*args, **kwargs)
        clock.on = True

    for (owner, method, name), original in zip(seams, originals, strict=True):
        setattr(owner, method, clock.wrap(name, original))
    engine.Batch.__init__ = started  # type: ignore[method-assign]
    try:
        yield clock
    finally:
        engine.Batch.__init__ = start  # type: ignore[method-assign]
        for (owner, method, _), original in zip(seams, originals, strict=True):
            setattr(owner, method, original)


@torch.no_grad()
def transformers_generate(pair: Pair, prompts: list[Tensor], new: int) -> None:
    """The library's own greedy loop on the same batch, padded on the left as it wants it."""
    ids = pad_sequence([p.flip(0) for p in prompts], batch_first=True).flip(1).to(pair.target.device)  # [B, S]
    mask = pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True).flip(1).to(ids.device)
    pair.target.model.generate(
        ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
    )


def wall(function: Callable[[], Any], cuda: bool) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    function()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def tau(outputs: Outputs) -> float:
    """Tokens committed per verification, pooled."""
    lengths = [length for output in outputs for length in output.acceptance_lengths]
    return sum(lengths) / max(len(lengths), 1)


def side_by_side(ways: dict[str, Callable[[], Any]], repeats: int, cuda: bool) -> dict[str, float]:
    """Median seconds of each way, alternating, after one unmeasured round."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            took = wall(way, cuda)
            if repeat > 0:
                seconds[name].append(took)
    return {name: statistics.median(took) for name, took in seconds.items()}


def overhead(pair: Pair, prompts: list[Tensor], new: int, repeats: int, cuda: bool) -> dict[str, float]:
    """Where a speculative cycle's time goes: medians of the per-cycle milliseconds, and the loop's share."""
    rows = []
    for repeat in range(repeats + 1):
        with timed_cycles(cuda) as clock:
            outputs = speculative_generate(pair, prompts, max_new_tokens=new, stop_token_ids=[])
        cycles = max(output.trace.target_forwards for output in outputs)
        draft, verify = clock.seconds("draft"), clock.seconds("verify")
        if repeat > 0:
            rows.append([1e3 * s / cycles for s in (outputs[0].trace.decode_seconds, draft, verify)])
    cycle, draft_ms, verify_ms = (statistics.median(column) for column in zip(*rows, strict=True))
    share = statistics.median((c - d - v) / (d + v) for c, d, v in rows)
    return {"cycle_ms": cycle, "draft_ms": draft_ms, "verify_ms": verify_ms, "overhead": share}


def measure(pair: Pair, prompts: list[Tensor], args: argparse.Namespace) -> list[dict[str, Any]]:
    """One record per draft: the pair's own, then dialled ones."""
    cuda = pair.target.device.type == "cuda"
    knobs: dict[str, Any] = {"max_new_tokens": args.new, "stop_token_ids": []}
    plain = autoregressive_generate(pair, prompts, **knobs)
    texts = [[*prompt.tolist(), *output.tokens.tolist()] for prompt, output in zip(prompts, plain, strict=True)]
    assert pair.draft is not None
    drafts: dict[str, Any] = {"own": pair.draft}
    for acceptance in args.acceptance:
        drafts[f"dialled {acceptance:g}"] = DialledDraft(pair.draft, pair.target, texts, acceptance)
    records = []
    for name, draft in drafts.items():
        drafted = Pair(pair.target, draft, pair.tokenizer)
        outputs = speculative_generate(drafted, prompts, **knobs)
        pairs = zip(plain, outputs, strict=True)
        seconds = side_by_side(
            {
                "autoregressive": lambda: autoregressive_generate(pair, prompts, **knobs),
                "speculative": lambda d=drafted: speculative_generate(d, prompts, **knobs),  # type: ignore[misc]
                "transformers": lambda: transformers_generate(pair, prompts, args.new),
            },
            args.repeats,
            cuda,
        )
        records.append(
            {
                "draft": name,
                "tau": tau(outputs),
                "equal_rows": sum(a.tokens.equal(b.tokens) for a, b in pairs) / len(prompts),
                "seconds": seconds,
                "speedup": seconds["autoregressive"] / seconds["speculative"],
                "speedup_over_transformers": seconds["transformers"] / seconds["speculative"],
                **overhead(drafted, prompts, args.new, args.repeats, cuda),
            }
        )
    return records


def show(records: list[dict[str, Any]], tokens: int) -> None:
    """The table for people: tokens per second, τ, and where a cycle's time goes."""
    head = "draft", "τ", "AR tok/s", "spec tok/s", "HF tok/s", "× AR", "× HF", "cycle ms", "draft", "verify", "overhead"
    print("".join(f"{title:>12}" for title in head))
    for r in records:
        rates = [tokens / r["seconds"][way] for way in ("autoregressive", "speculative", "transformers")]
        cells = [r["draft"], f"{r['tau']:.2f}", *(f"{rate:.0f}" for rate in rates), f"{r['speedup']:.2f}"]
        numbers = (r[key] for key in ("speedup_over_transformers", "cycle_ms", "draft_ms", "verify_ms"))
        cells += [f"{number:.2f}" for number in numbers]
        print("".join(f"{cell:>12}" for cell in [*cells, f"{r['overhead']:.1%}"]))


def memory_pair(args: argparse.Namespace) -> Pair:
    """The pair whose prefill is measured: the one given, or a random one deep enough for hidden states to matter."""
    if args.target:
        return chosen_pair(args.target, args.draft, args.dtype, args.device)[0]
    return random_pair(getattr(torch, args.dtype), args.device, layers=24, width=256)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="folder or Hub id; default: the bundled pair, or a random one of its size")
    parser.add_argument("--draft")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--new", type=int, default=128, help="tokens per row; stop tokens are ignored")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt-length", type=int, default=128, help="of random prompts")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--acceptance", type=float, nargs="*", default=[0.0, 0.5, 0.8, 0.95])
    parser.add_argument("--memory-length", type=int, default=4096, help="tokens of the measured prefill")
    parser.add_argument("--memory-arm", choices=ARMS, help="measure this prefill only (for the script itself)")
    args = parser.parse_args()
    if (args.target is None) != (args.draft is None):
        parser.error("--target and --draft go together")
    if args.memory_arm:
        print(json.dumps({"peak_bytes": peak_bytes(memory_pair(args), args.memory_arm, args.memory_length)}))
        return
    pair, name = chosen_pair(args.target, args.draft, args.dtype, args.device)
    prompts = chosen_prompts(pair, name, args.batch, args.prompt_length)
    where = f"{args.device}, {args.dtype}, {torch.get_num_threads()} threads"
    print(f"{name} pair, {where}; {args.batch} rows of {args.new} tokens")
    records = measure(pair, prompts, args)
    show(records, args.batch * args.new)
    chosen = ["--target", args.target, "--draft", args.draft] if args.target else []
    memory = compare([*chosen, "--device", args.device, "--dtype", args.dtype], args.memory_length)
    print(
        f"prefill of {args.memory_length} tokens, peak: "
        + ", ".join(f"{k} {v / 2**20:.1f} MiB" for k, v in memory.items())
    )
    settings = {key: value for key, value in vars(args).items() if key != "memory_arm"}
    print(json.dumps({"benchmark": "decode", "pair": name, **settings, "records": records, "memory": memory}))


if __name__ == "__main__":
    main()
