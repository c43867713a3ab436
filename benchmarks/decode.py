"""Autoregressive, speculative and transformers' decoding, alternating in one run; the loop's overhead; prefill memory.

    python benchmarks/decode.py [--target FOLDER --draft FOLDER --device cuda --dtype bfloat16] [--batch 1]

The pair's own draft decodes the lab's long tasks in groups of ``--batch`` rows until the pair's stop tokens; the tokens
counted are those emitted. Drafts of dialled acceptance decode one group at the fixed length ``--new``.
Prints tables and ends with one JSON line. Times are medians over the repeats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from dialled import DialledDraft
from memory import compare
from overhead import overhead
from pairs import chosen_pair, lab_prompts, random_pair, random_prompts
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dgd_lightning.methods.autoregressive import autoregressive_generate
from dgd_lightning.methods.speculative import speculative_generate
from dgd_lightning.pair import Pair
from dgd_lightning.types import DecodeOutput

Outputs = list[DecodeOutput]
Decoder = Callable[[list[Tensor]], list[Any]]


class Work(NamedTuple):
    """What every decoder decodes: prompts in groups of the batch size, how many tokens at most, and what ends a row."""

    groups: list[list[Tensor]]
    limit: int
    stops: list[int]  # empty: every row has ``limit`` tokens

    @property
    def knobs(self) -> dict[str, Any]:
        """For this project's decoders."""
        return {"max_new_tokens": self.limit, "stop_token_ids": self.stops}


@torch.no_grad()
def transformers_generate(pair: Pair, prompts: list[Tensor], work: Work) -> list[Tensor]:
    """New tokens of each row by the library's own greedy loop on the same batch, padded on the left as it wants it."""
    ids = pad_sequence([p.flip(0) for p in prompts], batch_first=True).flip(1).to(pair.target.device)  # [B, S]
    mask = pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True).flip(1).to(ids.device)
    ending: dict[str, Any] = {"eos_token_id": work.stops} if work.stops else {"min_new_tokens": work.limit}
    output = pair.target.model.generate(
        ids, attention_mask=mask, max_new_tokens=work.limit, do_sample=False, pad_token_id=0, **ending
    )
    return [_emitted(row, work.stops) for row in output[:, ids.shape[1] :].cpu()]


def _emitted(tokens: Tensor, stops: list[int]) -> Tensor:
    """A row [T] up to its first stop token: what follows is padding, until the batch's last row is done."""
    found = torch.isin(tokens, torch.tensor(stops, dtype=tokens.dtype)).nonzero()
    return tokens[: int(found[0]) + 1] if len(found) else tokens


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


def side_by_side(
    decoders: dict[str, Decoder], groups: list[list[Tensor]], repeats: int, cuda: bool
) -> dict[str, float]:
    """Median over the repeats of each decoder's seconds for all groups; the decoders take turns at every group."""
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(repeats):
        totals = dict.fromkeys(decoders, 0.0)
        for group in groups:
            for name, decoder in decoders.items():
                totals[name] += wall(partial(decoder, group), cuda)
        for name, total in totals.items():
            seconds[name].append(total)
    return {name: statistics.median(took) for name, took in seconds.items()}


def equal_share(ones: list[Tensor], others: list[Tensor]) -> float:
    """Share of rows with the same tokens."""
    return sum(a.equal(b) for a, b in zip(ones, others, strict=True)) / len(ones)


def record(name: str, drafted: Pair, work: Work, repeats: int) -> dict[str, Any]:
    """One draft's numbers: tokens really emitted and seconds by each decoder, and where its cycles' time goes."""
    cuda = drafted.target.device.type == "cuda"
    decoders: dict[str, Decoder] = {
        "autoregressive": lambda group: autoregressive_generate(drafted, group, **work.knobs),
        "speculative": lambda group: speculative_generate(drafted, group, **work.knobs),
        "transformers": lambda group: transformers_generate(drafted, group, work),
    }
    # The tokens come from an unmeasured round, which also warms every decoder up on every shape.
    outputs = {kind: [row for group in work.groups for row in decoders[kind](group)] for kind in decoders}
    tokens = {kind: [getattr(row, "tokens", row) for row in rows] for kind, rows in outputs.items()}
    counts = {kind: sum(map(len, rows)) for kind, rows in tokens.items()}
    seconds = side_by_side(decoders, work.groups, repeats, cuda)
    rates = {kind: counts[kind] / seconds[kind] for kind in decoders}
    return {
        "draft": name,
        "rows": len(tokens["speculative"]),
        "stop_tokens": work.stops,
        "limit": work.limit,
        "tau": tau(outputs["speculative"]),
        "tokens": counts,
        "equal_rows": equal_share(tokens["autoregressive"], tokens["speculative"]),
        # Without stop tokens the library is kept from ending by a mask on them, which changes its tokens.
        "equal_rows_transformers": equal_share(tokens["autoregressive"], tokens["transformers"])
        if work.stops
        else None,
        "seconds": seconds,
        "tokens_per_second": rates,
        "speedup": rates["speculative"] / rates["autoregressive"],
        "speedup_over_transformers": rates["speculative"] / rates["transformers"],
        **overhead(lambda: [decoders["speculative"](group) for group in work.groups], repeats, cuda),
    }


def own_work(pair: Pair, args: argparse.Namespace) -> Work:
    """The lab's long prompts until the pair's stop tokens; random tokens where the pair has no chat template."""
    prompts = lab_prompts(pair, args.contexts) or random_prompts(pair, args.batch, args.prompt_length)
    groups = [prompts[start : start + args.batch] for start in range(0, len(prompts), args.batch)]
    end = getattr(pair.tokenizer, "eos_token_id", None)  # as the decoders choose them
    return Work(groups, args.limit, list(pair.target.stop_token_ids) or ([] if end is None else [end]))


def measure(pair: Pair, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One record per draft: the pair's own on long prompts, then dialled ones on one group at a fixed length."""
    assert pair.draft is not None
    own = own_work(pair, args)
    records = [record("own", pair, own, args.repeats)]
    prompts = [own.groups[i % len(own.groups)][0] for i in range(args.batch)]
    fixed = Work([prompts], args.new, [])
    plain = autoregressive_generate(pair, prompts, **fixed.knobs)
    texts = [[*prompt.tolist(), *output.tokens.tolist()] for prompt, output in zip(prompts, plain, strict=True)]
    for acceptance in args.acceptance:
        draft: Any = DialledDraft(pair.draft, pair.target, texts, acceptance)
        dialled = Pair(pair.target, draft, pair.tokenizer)
        records.append(record(f"dialled {acceptance:g}", dialled, fixed, args.repeats))
    return records


def show(records: list[dict[str, Any]]) -> None:
    """The table for people: tokens per second, τ, and where a cycle's time goes."""
    head = (
        "draft",
        "tokens",
        "τ",
        "AR tok/s",
        "spec tok/s",
        "HF tok/s",
        "× AR",
        "× HF",
        "cycle ms",
        "draft",
        "verify",
        "overhead",
    )
    print("".join(f"{title:>12}" for title in head))
    for r in records:
        rates = [r["tokens_per_second"][kind] for kind in ("autoregressive", "speculative", "transformers")]
        cells = [r["draft"], str(r["tokens"]["speculative"]), f"{r['tau']:.2f}", *(f"{rate:.0f}" for rate in rates)]
        cells.append(f"{r['speedup']:.2f}")
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
    parser.add_argument("--contexts", type=int, default=2, help="lab contexts a family whose long task is decoded")
    parser.add_argument("--limit", type=int, default=192, help="most tokens per row; stop tokens end it earlier")
    parser.add_argument("--new", type=int, default=128, help="tokens per row of dialled drafts, stop tokens ignored")
    parser.add_argument("--batch", type=int, default=1, help="rows decoded together")
    parser.add_argument("--prompt-length", type=int, default=128, help="of random prompts")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--acceptance", type=float, nargs="*", default=[0.0, 0.5, 0.8, 0.95])
    parser.add_argument("--memory-length", type=int, default=4096, help="tokens of the measured prefill")
    args = parser.parse_args()
    if (args.target is None) != (args.draft is None):
        parser.error("--target and --draft go together")
    pair, name = chosen_pair(args.target, args.draft, args.dtype, args.device)
    where = f"{args.device}, {args.dtype}, {torch.get_num_threads()} threads"
    print(f"{name} pair, {where}; batches of {args.batch}")
    records = measure(pair, args)
    show(records)
    memory = compare(memory_pair(args), args.memory_length)
    print(
        f"prefill of {args.memory_length} tokens, peak: "
        + ", ".join(f"{k} {v / 2**20:.1f} MiB" for k, v in memory.items())
    )
    print(json.dumps({"benchmark": "decode", "pair": name, **vars(args), "records": records, "memory": memory}))


if __name__ == "__main__":
    main()
