"""Power sampling: what its chain costs in five ways, beside one answer at temperature 1; alternating, in one run.

    python benchmarks/power.py [--lengths 0 4096] [--blocks 1] [--target FOLDER --draft FOLDER --device cuda]

``answer`` decodes token by token at temperature 1. ``read again`` is what public code does: plain proposals, each of
them a call that reads prompt and prefix anew. ``rewound`` goes back in the caches, ``drafted`` draws proposals in
blocks besides, ``smc`` is a population of 12. All chains have the same α, steps, lengths and prompts; they draw
different tokens, so times are also given per token drawn. A length of 0 takes the lab's long tasks as they are; else
other contexts of the lab stand before them.
Prints a table and ends with one JSON line. Ratios are medians of each repeat's own.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pairs import chosen_pair, lab_prompts, random_prompts
from torch import Tensor
from ttt import context

from dgd_lightning.methods.autoregressive import autoregressive_generate
from dgd_lightning.methods.power import power_generate
from dgd_lightning.pair import Pair


class Run(NamedTuple):
    """One way over all prompts."""

    seconds: float
    drawn: int  # tokens
    answers: int  # tokens of the answers


def read_again(pair: Pair, prompt: Tensor, seed: int, args: argparse.Namespace) -> tuple[int, int]:
    """The chain of public code, proposals from a call each: tokens drawn, and those of the answer."""
    dice = random.Random(seed)

    def proposal(prefix: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        text = torch.cat([prompt, prefix])
        (output,) = autoregressive_generate(
            pair,
            [text],
            max_new_tokens=limit - len(prefix),
            temperature=1 / args.alpha,
            seed=dice.randrange(2**32),
            log_probs=True,
        )
        assert output.trace.log_normalisers is not None
        return torch.cat([prefix, output.tokens]), output.trace.log_normalisers

    answer, weights, drawn = prompt[:0], torch.zeros(0, dtype=torch.float64), 0
    for block in range(1, args.blocks + 1):
        limit = -(-args.limit * block // args.blocks)
        before = len(answer)
        answer, new = proposal(answer, limit)
        weights, drawn = torch.cat([weights, new]), drawn + len(answer) - before
        ended = len(answer) < limit
        for _ in range(args.steps):
            cut = dice.randrange(len(answer))
            other, new = proposal(answer[:cut], args.limit if ended else limit)
            drawn += len(other) - cut
            ratio = float(new.sum() - weights[cut:].sum()) + math.log(len(answer) / len(other))
            if dice.random() < math.exp(min(0.0, ratio)):
                answer, weights = other, torch.cat([weights[:cut], new])
        if ended:
            break
    return drawn, len(answer)


def chain(pair: Pair, prompt: Tensor, seed: int, args: argparse.Namespace, **knobs: Any) -> tuple[int, int]:
    given = {"alpha": args.alpha, "blocks": args.blocks, "seed": [seed], "steps": args.steps} | knobs
    (output,) = power_generate(pair, [prompt], max_new_tokens=args.limit, **given)
    assert output.trace.details is not None
    return output.trace.details["tokens_drawn"], len(output.tokens)


def answer(pair: Pair, prompt: Tensor, seed: int, args: argparse.Namespace) -> tuple[int, int]:
    (output,) = autoregressive_generate(pair, [prompt], max_new_tokens=args.limit, temperature=1.0, seed=[seed])
    return len(output.tokens), len(output.tokens)


WAYS: dict[str, Callable[..., tuple[int, int]]] = {
    "answer": answer,
    "read again": read_again,
    "rewound": lambda *given: chain(*given, speculative=False),
    "drafted": chain,
    "smc": lambda *given: chain(*given, mode="smc", particles=12, blocks=8, steps=10),
}


def prompts_of(pair: Pair, length: int, count: int) -> list[Tensor]:
    """The lab's long tasks, behind so many tokens of other contexts; random ones where the pair has no tokenizer."""
    tasks = lab_prompts(pair, 1)
    if tasks is None:
        return random_prompts(pair, count, length or 256)
    tasks = tasks[:count]
    return [torch.cat([context(pair, length), task]) if length else task for task in tasks]


def measure(pair: Pair, prompts: list[Tensor], seed: int, args: argparse.Namespace) -> dict[str, Run]:
    """All ways once over all prompts, taking turns at every prompt."""
    sums = {way: [0.0, 0, 0] for way in WAYS}
    for number, prompt in enumerate(prompts):
        for way, function in WAYS.items():
            began = time.perf_counter()
            drawn, length = function(pair, prompt, seed * 1000 + number, args)
            if pair.target.device.type == "cuda":
                torch.cuda.synchronize()
            for at, value in enumerate((time.perf_counter() - began, drawn, length)):
                sums[way][at] += value
    return {way: Run(*values) for way, values in sums.items()}  # type: ignore[arg-type]


def of_length(pair: Pair, length: int, args: argparse.Namespace) -> dict[str, Any]:
    prompts = prompts_of(pair, length, args.prompts)
    for function in WAYS.values():  # warms up
        function(pair, prompts[0], 0, args)
    rounds = [measure(pair, prompts, seed, args) for seed in range(args.repeats)]
    middle = statistics.median
    record: dict[str, Any] = {"prompt_tokens": statistics.fmean(map(len, prompts)), "ways": {}}
    for way in WAYS:
        own = [one[way] for one in rounds]
        record["ways"][way] = {
            "seconds": middle(run.seconds for run in own) / len(prompts),
            "tokens": middle(run.answers for run in own) / len(prompts),
            "drawn": middle(run.drawn for run in own) / len(prompts),
            "ms_per_drawn": middle(1e3 * run.seconds / run.drawn for run in own),
            "over_answer": middle(one[way].seconds / one["answer"].seconds for one in rounds),
            "times_read_again": middle(
                (one["read again"].seconds / one["read again"].drawn) / (one[way].seconds / one[way].drawn)
                for one in rounds
            ),
        }
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target")
    parser.add_argument("--draft")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lengths", type=int, nargs="+", default=[0, 4096])
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--limit", type=int, default=80, help="new tokens")
    parser.add_argument("--alpha", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pair, name = chosen_pair(args.target, args.draft, args.dtype, args.device)
    print(f"pair {name}; α {args.alpha:g}, {args.steps} steps at {args.blocks} lengths up to {args.limit} tokens")
    records = []
    for length in args.lengths:
        record = of_length(pair, length, args)
        records.append(record)
        print(f"\nprompts of {record['prompt_tokens']:.0f} tokens, {args.prompts} of them, batch 1")
        titles = ("s an answer", "tokens", "drawn", "ms a token drawn", "× answer", "speed-up a token drawn")
        print(f"{'':12}" + "".join(f"{title:>24}" for title in titles))
        for way, found in record["ways"].items():
            cells = (f"{found['seconds']:.3f}", f"{found['tokens']:.1f}", f"{found['drawn']:.1f}")
            cells += (f"{found['ms_per_drawn']:.2f}", f"{found['over_answer']:.2f}", f"{found['times_read_again']:.2f}")
            print(f"{way:12}" + "".join(f"{cell:>24}" for cell in cells))
    settings = {name: getattr(args, name) for name in ("limit", "alpha", "steps", "blocks", "prompts", "repeats")}
    print(json.dumps({"benchmark": "power", "pair": name, **settings, "lengths": records}))


if __name__ == "__main__":
    main()
