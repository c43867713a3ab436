"""Prefix reuse: several tasks of a context, decoded by several arms, with their common prefix read once or every time.

    python benchmarks/eval.py [--target FOLDER --draft FOLDER --device cuda --dtype bfloat16] [--lengths 512 1024]

Tasks are the lab's, behind contexts that are lengthened with further text of the lab; each context's tasks are a batch,
decoded by a plain, a speculative and a guided arm, one context with and without reuse before the next.
Prints a table and ends with one JSON line. Seconds are medians over the repeats, the ratio is the median of each
repeat's own. ``equal`` counts the answers that are the same token for token; in fp32 and below near-ties may part them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pairs import chosen_pair
from torch import Tensor

from dgd_lightning.data.chat import prompt_ids
from dgd_lightning.data.one_context import common_prefix
from dgd_lightning.decode.prefix_cache import make_prefix_cache
from dgd_lightning.lab.rows import eval_rows
from dgd_lightning.methods.autoregressive import autoregressive_generate
from dgd_lightning.methods.guided import guided_generate
from dgd_lightning.methods.speculative import speculative_generate
from dgd_lightning.pair import Pair
from dgd_lightning.types import DecodeOutput, Task

ARMS: dict[str, Callable[..., list[DecodeOutput]]] = {
    "autoregressive": autoregressive_generate,
    "speculative": speculative_generate,
    "guided": lambda *args, **knobs: guided_generate(*args, beta=0.1, **knobs),
}


def lab_contexts(pair: Pair, count: int, tasks: int, length: int) -> list[list[Tensor]]:
    """Prompts of so many tasks of each context, which begin with the same ``length`` tokens and more."""
    contexts: dict[str, list[Tensor]] = {}
    for row in eval_rows(count):
        task = Task(row["metadata"]["task_id"], row["messages"], None, row)
        prompt = prompt_ids(pair.tokenizer, task, enable_thinking=False)
        contexts.setdefault(row["metadata"]["context_id"], []).append(prompt)
    several = [prompts[:tasks] for prompts in contexts.values() if len(prompts) >= tasks][:count]
    more = torch.cat([prompt for prompts in contexts.values() for prompt in prompts])
    more = more.repeat(1 + length // len(more))
    return [[torch.cat([more[:length].roll(number), prompt]) for prompt in one] for number, one in enumerate(several)]


def seconds(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def decoded(pair: Pair, prompts: Sequence[Tensor], tokens: int, reuse: bool) -> tuple[float, int, list[list[int]]]:
    """Seconds of all prefills, prompt tokens read, and the answers of all arms."""
    assert pair.draft is not None
    began, prefixes, read = seconds(pair.target.device), None, 0
    if reuse:
        ids = common_prefix(prompts)[: min(map(len, prompts)) - 1]
        prefixes = [make_prefix_cache(pair.target, ids, pair.draft.config.target_layer_ids)] * len(prompts)
        read = len(ids)
    spent, answers = seconds(pair.target.device) - began, []
    for arm in ARMS.values():
        outputs = arm(pair, prompts, max_new_tokens=tokens, prefixes=prefixes)
        spent += outputs[0].trace.prefill_seconds
        read += sum(len(prompt) - (len(ids) if reuse else 0) for prompt in prompts)
        answers += [output.tokens.tolist() for output in outputs]
    return spent, read, answers


def measure(pair: Pair, contexts: list[list[Tensor]], tokens: int, repeats: int) -> dict[str, Any]:
    """One line of the table."""
    rounds: list[tuple[float, float]] = []
    for _ in range(repeats):
        spent, read, same, answers = [0.0, 0.0], [0, 0], 0, 0
        for prompts in contexts:
            found = []
            for reuse in (False, True):
                took, count, own = decoded(pair, prompts, tokens, reuse)
                spent[reuse] += took
                read[reuse] += count
                found.append(own)
            same += sum(one == other for one, other in zip(*found, strict=True))
            answers += len(found[0])
        rounds.append((spent[0], spent[1]))
    return {
        "tokens_read": read[0],
        "tokens_read_with_reuse": read[1],
        "tokens_saved": 1 - read[1] / read[0],
        "seconds": statistics.median(one for one, _ in rounds),
        "seconds_with_reuse": statistics.median(other for _, other in rounds),
        "ratio": statistics.median(one / other for one, other in rounds),
        "equal": f"{same}/{answers}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=None)
    parser.add_argument("--draft", default=None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024], help="shared tokens to add")
    parser.add_argument("--contexts", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=4, help="of each context; CL-bench has 3.8")
    parser.add_argument("--tokens", type=int, default=8, help="new ones per answer: what is timed is the prefill")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pair, name = chosen_pair(args.target, args.draft, args.dtype, args.device)
    lines = {}
    print(f"{name}, {args.device}, {args.dtype}; {args.contexts} contexts of {args.tasks} tasks, {len(ARMS)} arms")
    print("added tokens   prompt tokens read → with reuse   saved   prefill s → with reuse   ratio   equal")
    for length in args.lengths:
        contexts = lab_contexts(pair, args.contexts, args.tasks, length)
        decoded(pair, contexts[0], 2, True)  # warm up
        line = lines[length] = measure(pair, contexts, args.tokens, args.repeats)
        print(
            f"{length:12,}   {line['tokens_read']:18,} → {line['tokens_read_with_reuse']:10,}   "
            f"{line['tokens_saved']:5.0%}   {line['seconds']:9.2f} → {line['seconds_with_reuse']:10.2f}   "
            f"{line['ratio']:5.2f}   {line['equal']}",
            flush=True,
        )
    print(json.dumps({"benchmark": "eval", "pair": name, **vars(args), "by_added_tokens": lines}))


if __name__ == "__main__":
    main()
