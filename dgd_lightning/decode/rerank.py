"""Reranking: several candidates per prompt, and the one that target or blend finds likeliest.

The fallback of guided decoding: where blending token by token gains nothing, choosing among whole answers may.
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
from dgd_lightning.decode.prefix import SharedPrefix
from dgd_lightning.decode.readouts import Readout, wide
from dgd_lightning.decode.replay import replays
from dgd_lightning.decode.speculative import speculative_generate
from dgd_lightning.errors import InputError
from dgd_lightning.seeds import mixed_seed
from dgd_lightning.types import Candidate, DecodeOutput

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
    num_candidates: int = 8,
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
    prefixes: Sequence[SharedPrefix | None] | None = None,
) -> list[DecodeOutput]:
    """Decode several candidates of every prompt, and return the best one of each.

    Args:
        pair, prompts, max_new_tokens, top_k, top_p, stop_token_ids, block_size, on_progress, prefixes:
            as in ``speculative_generate``. To rank, prompts are read whole.
        rank_by: ``target``: the log-probability that the target gives the whole answer; ``likelihood``: the same per
            token, which does not favour short answers; ``blend``: per token, under the guided law of ``blend``.
        num_candidates: drawn from the target per prompt, at ``temperature``; not used with ``betas``.
        betas: one candidate for each β instead, decoded with guidance (0 is the target itself); at temperature 0 too.
        blend: of ``rank_by`` blend, and what but for β the candidates of ``betas`` are decoded with.
        readout: what is blended with the target.
        temperature: of the candidates; ranks are by the laws at temperature 1, without filters.
        seed: one integer, or one per prompt.

    Returns:
        The best candidate of every prompt, the first of equals; its ``trace.candidates`` has all of them. Lengths and
        forwards are its own; ``decode_seconds`` are those of the batch with all candidates of all prompts.

    Raises:
        InputError: an unusable argument, or candidates that could not differ.
    """
    check_rerank(rank_by, num_candidates, betas, blend, temperature)
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
        ways = [Guidance(replace(blend, beta=float(beta)), made) for beta in betas]
        columns = guided_sweep(
            pair, prompts, ways, block_size=block_size, speculative=pair.draft is not None, **knobs
        )  # per β
        groups = [list(row) for row in zip(*columns, strict=True)]
    else:
        drawn = _draw(pair, prompts, num_candidates, block_size, knobs)
        groups = [drawn[at : at + num_candidates] for at in range(0, len(drawn), num_candidates)]
    return [
        _best(pair, prompt, group, betas, rank_by, ranking, of_prompt(made, number) if ranking else None)
        for number, (prompt, group) in enumerate(zip(prompts, groups, strict=True))
    ]


def check_rerank(
    rank_by: str, num_candidates: int, betas: Sequence[float] | None, blend: Blend | None, temperature: float
) -> None:
    """Raises:
    InputError: an unusable argument of :func:`rerank_generate`, or candidates that could not differ.
    """
    if rank_by not in get_args(RankBy):
        raise InputError(
            "rank_by", expected=" or ".join(get_args(RankBy)), received=repr(rank_by), mend="use likelihood"
        )
    if rank_by == "blend" and blend is None:
        raise InputError("blend", expected="a Blend, which ranks", received="None", mend="use e.g. Blend(0.3)")
    if betas is None and temperature == 0:
        raise InputError(
            "temperature",
            expected="above 0: greedy candidates are all the same",
            received=temperature,
            mend="use temperature=1.0, or one candidate per β with betas",
        )
    if betas is None and (
        isinstance(num_candidates, bool) or not isinstance(num_candidates, int) or num_candidates < 1
    ):
        raise InputError(
            "num_candidates", expected="an integer of at least 1", received=repr(num_candidates), mend="use e.g. 8"
        )
    if betas is not None and not betas:
        raise InputError("betas", expected="at least one β, or None", received="[]", mend="use e.g. [0.0, 0.1, 0.3]")
    for beta in betas or ():
        try:
            replace(blend or Blend(0.0), beta=beta)
        except InputError as error:
            raise error.named("betas") if error.argument == "beta" else error from error


def _draw(
    pair: Pair, prompts: Sequence[Tensor], count: int, block_size: int | None, knobs: dict[str, Any]
) -> list[DecodeOutput]:
    """Candidates of the target's own law; a prompt's own seed gives its candidates theirs."""
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
    answers: dict[tuple[int, ...], int] = {}  # equal candidates are read once
    for output in group:
        answers.setdefault(tuple(output.tokens.tolist()), len(answers))
    totals = log_likelihoods(pair, prompt, [torch.tensor(answer) for answer in answers], blend, readout)
    candidates = []
    for number, output in enumerate(group):
        total = totals[answers[tuple(output.tokens.tolist())]]
        score = total if rank_by == "target" else total / len(output.tokens)
        beta = None if betas is None else float(betas[number])
        candidates.append(Candidate(output.tokens, score, beta, output.trace.seed, output.stop_reason))
    best = group[best_of(candidates)]
    seconds = time.perf_counter() - began
    return best._replace(trace=best.trace._replace(candidates=candidates, rank_seconds=seconds))


def best_of(candidates: Sequence[Candidate]) -> int:
    """Number of the candidate that is chosen, the first of equals."""
    return max(range(len(candidates)), key=lambda number: candidates[number].score)


def log_likelihoods(
    pair: Pair, prompt: Tensor, answers: Sequence[Tensor], blend: Blend | None, readout: Readout | None
) -> list[float]:
    """ln of the probability of whole answers [T] behind a prompt [S], at temperature 1: the target's, or a blend's."""
    totals = [0.0] * len(answers)
    for part in replays(pair, prompt, answers, [] if readout is None else [readout]):
        logits = wide(part.target)  # [Q, V]
        if blend is not None:
            step = torch.arange(part.first, part.first + len(part.tokens), device=logits.device)[None]
            beta = torch.tensor(blend.betas(1), dtype=torch.float64, device=logits.device)
            logits = blend.mix(part.target[None], part.readouts[0][None], beta, step)[0]
        chosen = logits.log_softmax(-1).gather(1, part.tokens[:, None])  # [Q, 1]
        totals[part.answer] += float(chosen.double().sum())
    return totals
