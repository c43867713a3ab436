"""Reranking: several answers per prompt, and the one that target or blend finds likeliest.

The fallback of guided decoding: where blending token by token gains nothing, choosing among whole distinct may.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from dgd_lightning.decode.autoregressive import autoregressive_generate
from dgd_lightning.decode.blending import Blend
from dgd_lightning.decode.engine import OnProgress
from dgd_lightning.decode.guided import Guidance, as_readout, guided_sweep
from dgd_lightning.decode.nested import of_prompt
from dgd_lightning.decode.prefix import PrefixCache
from dgd_lightning.decode.readouts import Readout, wide
from dgd_lightning.decode.replay import replays
from dgd_lightning.decode.speculative import speculative_generate
from dgd_lightning.errors import InputError
from dgd_lightning.seeds import mixed_seed
from dgd_lightning.types import DecodeOutput, RankedAnswer

if TYPE_CHECKING:
    from dgd_lightning.pair import Pair

RankBy = Literal["target", "blend", "likelihood"]


@torch.no_grad()
def rerank_generate(
    pair: Pair,
    prompts: Sequence[Tensor],
    *,
    max_new_tokens: int,
    rank_by: RankBy = "likelihood",
    num_answers: int = 8,
    betas: Sequence[float] | None = None,
    blend: Blend | None = None,
    readout: Readout | str = "draft",
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_token_ids: Sequence[int] | None = None,
    seed: int | Sequence[int] | None = None,
    block_size: int | None = None,
    on_progress: OnProgress | None = None,
    prefixes: Sequence[PrefixCache | None] | None = None,
) -> list[DecodeOutput]:
    """Decode several answers of every prompt, and return the best one of each.

    Args:
        pair, prompts, max_new_tokens, top_k, top_p, stop_token_ids, block_size, on_progress, prefixes:
            as in ``speculative_generate``. To rank, prompts are read whole.
        rank_by: ``target``: the log-probability that the target gives the whole answer; ``likelihood``: the same per
            token, which does not favour short distinct; ``blend``: per token, under the guided distribution of
            ``blend``.
        num_answers: drawn from the target per prompt, at ``temperature``; not used with ``betas``.
        betas: one answer for each β instead, decoded with guidance (0 is the target itself); at temperature 0 too.
        blend: of ``rank_by`` blend, and what but for β the answers of ``betas`` are decoded with.
        readout: what is blended with the target.
        temperature: of the answers; ranks are by the distributions at temperature 1, without filters.
        seed: one integer, or one per prompt.

    Returns:
        The best answer of every prompt, the first of equals; its ``trace.answers`` has all of them. Lengths and
        forwards are its own; ``decode_seconds`` are those of the batch with all answers of all prompts.

    Raises:
        InputError: an unusable argument, or answers that could not differ.
    """
    check_rerank(rank_by, num_answers, betas, blend, temperature)
    knobs: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "stop_token_ids": stop_token_ids,
        "seed": seed,
        "on_progress": on_progress,
        "prefixes": prefixes,
    }
    made, ranking = as_readout(readout), blend if rank_by == "blend" else None
    if betas is not None:
        blend = blend or Blend(0.0)
        variants = [Guidance(replace(blend, beta=float(beta)), made) for beta in betas]
        columns = guided_sweep(
            pair, prompts, variants, block_size=block_size, speculative=pair.draft is not None, **knobs
        )  # per β
        groups = [list(row) for row in zip(*columns, strict=True)]
    else:
        drawn = _draw(pair, prompts, num_answers, block_size, knobs)
        groups = [drawn[at : at + num_answers] for at in range(0, len(drawn), num_answers)]
    return [
        _best(pair, prompt, group, betas, rank_by, ranking, of_prompt(made, number) if ranking else None)
        for number, (prompt, group) in enumerate(zip(prompts, groups, strict=True))
    ]


def check_rerank(
    rank_by: str, num_answers: int, betas: Sequence[float] | None, blend: Blend | None, temperature: float
) -> None:
    """Raises:
    InputError: an unusable argument of :func:`rerank_generate`, or answers that could not differ.
    """
    if rank_by not in get_args(RankBy):
        raise InputError(
            "rank_by", expected=" or ".join(get_args(RankBy)), received=repr(rank_by), hint="use likelihood"
        )
    if rank_by == "blend" and blend is None:
        raise InputError("blend", expected="a Blend, which ranks", received="None", hint="use e.g. Blend(0.3)")
    if betas is None and temperature == 0:
        raise InputError(
            "temperature",
            expected="above 0: greedy answers are all the same",
            received=temperature,
            hint="use temperature=1.0, or one answer per β with betas",
        )
    if betas is None and (isinstance(num_answers, bool) or not isinstance(num_answers, int) or num_answers < 1):
        raise InputError(
            "num_answers", expected="an integer of at least 1", received=repr(num_answers), hint="use e.g. 8"
        )
    if betas is not None and not betas:
        raise InputError("betas", expected="at least one β, or None", received="[]", hint="use e.g. [0.0, 0.1, 0.3]")
    for beta in betas or ():
        try:
            replace(blend or Blend(0.0), beta=beta)
        except InputError as error:
            raise error.named("betas") if error.argument == "beta" else error from error


def _draw(
    pair: Pair, prompts: Sequence[Tensor], count: int, block_size: int | None, knobs: dict[str, Any]
) -> list[DecodeOutput]:
    """Answers of the target's own distribution; a prompt's own seed gives its answers theirs."""
    seed = knobs["seed"]
    if isinstance(seed, Sequence):
        seed = [mixed_seed(own, number) for own in seed for number in range(count)]
    knobs = {**knobs, "seed": seed, "num_return_sequences": count}
    if pair.draft is None:
        return autoregressive_generate(pair, prompts, **knobs)
    return speculative_generate(pair, prompts, block_size=block_size, **knobs)


def _best(
    pair: Pair,
    prompt: Tensor,
    group: list[DecodeOutput],
    betas: Sequence[float] | None,
    rank_by: RankBy,
    blend: Blend | None,
    readout: Readout | None,
) -> DecodeOutput:
    began = time.perf_counter()
    distinct: dict[tuple[int, ...], int] = {}  # equal answers are read once
    for output in group:
        distinct.setdefault(tuple(output.tokens.tolist()), len(distinct))
    totals = log_likelihoods(pair, prompt, [torch.tensor(answer) for answer in distinct], blend, readout)
    answers = []
    for number, output in enumerate(group):
        total = totals[distinct[tuple(output.tokens.tolist())]]
        score = total if rank_by == "target" else total / len(output.tokens)
        beta = None if betas is None else float(betas[number])
        answers.append(RankedAnswer(output.tokens, score, beta, output.trace.seed, output.stop_reason))
    best = group[best_of(answers)]
    seconds = time.perf_counter() - began
    return best._replace(trace=best.trace._replace(answers=answers, rank_seconds=seconds))


def best_of(answers: Sequence[RankedAnswer]) -> int:
    """Number of the answer that is chosen, the first of equals."""
    return max(range(len(answers)), key=lambda number: answers[number].score)


def log_likelihoods(
    pair: Pair, prompt: Tensor, distinct: Sequence[Tensor], blend: Blend | None, readout: Readout | None
) -> list[float]:
    """ln of the probability of whole distinct [T] behind a prompt [S], at temperature 1: the target's, or a blend's."""
    totals = [0.0] * len(distinct)
    for part in replays(pair, prompt, distinct, [] if readout is None else [readout]):
        logits = wide(part.target)  # [Q, V]
        if blend is not None:
            step = torch.arange(part.first, part.first + len(part.tokens), device=logits.device)[None]
            beta = torch.tensor(blend.betas(1), dtype=torch.float64, device=logits.device)
            logits = blend.mix(part.target[None], part.readouts[0][None], beta, step)[0]
        chosen = logits.log_softmax(-1).gather(1, part.tokens[:, None])  # [Q, 1]
        totals[part.answer] += float(chosen.double().sum())
    return totals
