"""Reranking: several answers per prompt, and the one that target or blend finds likeliest.

The fallback of guided decoding: where blending token by token gains nothing, choosing among whole answers may.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Unpack, get_args

import torch
from torch import Tensor

from dgd_lightning.checks import check_choice, check_integer
from dgd_lightning.decode.blending import Blend, Constant, Schedule, Space
from dgd_lightning.decode.call import Call, CallOptions, call_of
from dgd_lightning.decode.drafter import check_block_size
from dgd_lightning.decode.nested import of_prompt
from dgd_lightning.decode.readouts.base import Readout
from dgd_lightning.decode.readouts.draft import as_readout
from dgd_lightning.decode.replay import CHUNK, replay
from dgd_lightning.distributions import wide
from dgd_lightning.errors import InputError
from dgd_lightning.methods.base import Guidance, Method, check_single_beta, check_unused, choose_among
from dgd_lightning.methods.guided import sweep
from dgd_lightning.methods.several_answers import check_differ, check_one_answer, drawn_answers
from dgd_lightning.pair import Pair
from dgd_lightning.types import DecodeOutput

RankBy = Literal["target", "blend", "likelihood"]
DIFFER = "use temperature=1.0, or one answer per β with betas"
GUIDANCE = ("beta", "readout", "space", "candidates", "plausibility", "schedule")


@dataclass(frozen=True)
class Rerank(Method):
    """Decode several answers of every prompt, and return the best one of each.

    Args:
        rank_by: ``target``: the log-probability that the target gives the whole answer; ``likelihood``: the same per
            token, which does not favour short answers; ``blend``: per token, under the guided distribution of ``beta``
            and ``readout``. Ranks are by the distributions at temperature 1, without filters.
        num_answers: drawn from the target per prompt, at a temperature above 0; not used with ``betas``.
        betas: one answer for each β instead, decoded with guidance (0 is the target itself); at temperature 0 too.
        beta: of ``rank_by: blend``.
        readout, space, candidates, plausibility, schedule: what blends with the target and how, where ``rank_by`` is
            ``blend`` or ``betas`` are given; see :class:`~dgd_lightning.methods.guided.Guided`.
        block_size: K of the proposals, where there is a draft.

    Raises:
        InputError: a setting that can't be, or that nothing would use.
    """

    rank_by: RankBy = "likelihood"
    num_answers: int = 8
    betas: Sequence[float] | None = None
    beta: float | None = None
    readout: Readout | str = "draft"
    space: Space = "logits"
    candidates: int | None = None
    plausibility: float | None = None
    schedule: Schedule | None = None
    block_size: int | None = None

    def __post_init__(self) -> None:
        check_choice("rank_by", self.rank_by, get_args(RankBy), hint="use likelihood")
        check_integer("block_size", self.block_size, least=2, optional=True)
        object.__setattr__(self, "readout", as_readout(self.readout))
        if not self.blends:
            check_unused(self, GUIDANCE, "only betas and rank_by: blend use it", "set rank_by: blend or betas, or ")
        if self.rank_by != "blend":
            check_unused(self, ["beta"], "answers have the β of betas, and no blend ranks")
        elif self.beta is None:
            raise InputError("beta", expected="a number", received="null", hint="use e.g. beta: 0.3")
        self.blend()
        if self.betas is None:
            check_integer("num_answers", self.num_answers, hint="use e.g. 8")
            return
        check_unused(self, ["num_answers"], "there is one answer per β of betas", "set betas: null, or ")
        if not isinstance(self.betas, Sequence) or not self.betas:
            raise InputError(
                "betas",
                expected="a list of at least one β, or None",
                received=repr(self.betas),
                hint="use [0.0, 0.1, 0.3]",
            )
        for beta in self.betas:
            try:
                replace(self.blend(), beta=beta)
            except InputError as error:
                raise error.named("betas") if error.argument == "beta" else error from error

    def blend(self) -> Blend:
        """Of ``rank_by: blend``, and but for β of the answers of ``betas``."""
        beta = 0.0 if self.beta is None else self.beta
        schedule = Constant() if self.schedule is None else self.schedule
        return Blend(beta, self.space, self.candidates, self.plausibility, schedule)

    @property
    def blends(self) -> bool:
        return self.rank_by == "blend" or self.betas is not None

    @property
    def needs_draft(self) -> bool:
        return self.block_size is not None or (self.blends and super().needs_draft)

    @property
    def uses_draft(self) -> bool:
        return True

    def block(self, pair: Pair) -> int | None:
        return None if pair.draft is None else check_block_size(pair, self.block_size)

    def layers(self, pair: Pair) -> tuple[int, ...]:
        return super().layers(pair) if self.blends or self.block(pair) is not None else ()

    def check_arm(self, temperature: float) -> None:
        check_single_beta(self.blend().beta)
        if self.betas is None:
            check_differ(temperature, DIFFER)

    def settings(self) -> dict[str, Any]:
        """Without the guidance that nothing uses."""
        values = super().settings()
        return values if self.blends else {name: value for name, value in values.items() if name not in GUIDANCE}

    def guidance_of(self, record: dict[str, Any]) -> Guidance | None:
        """An answer of a β was decoded as guided decoding does it."""
        if self.betas is None:
            return None
        return Guidance(replace(self.blend(), beta=record["answers"][record["chosen"]]["beta"]), self.readout)

    @torch.no_grad()
    def generate(self, pair: Pair, prompts: Sequence[Tensor], call: Call) -> list[DecodeOutput]:
        if self.betas is None:
            check_differ(call.sampling.temperature, DIFFER)
        check_one_answer(call)
        block, readout = self.block(pair), as_readout(self.readout)
        if self.betas is not None:
            variants = [Guidance(replace(self.blend(), beta=float(beta)), readout) for beta in self.betas]
            columns = sweep(pair, prompts, variants, block or 1, call)  # per β
            groups = [list(row) for row in zip(*columns, strict=True)]
        else:
            groups = drawn_answers(pair, prompts, call, self.num_answers, self.block_size)
        blend, names = self.blend() if self.rank_by == "blend" else None, call.names_of(len(prompts))
        return [
            self._best(pair, prompt, group, blend, of_prompt(readout, number), names[number])
            for number, (prompt, group) in enumerate(zip(prompts, groups, strict=True))
        ]

    def _best(
        self, pair: Pair, prompt: Tensor, group: list[DecodeOutput], blend: Blend | None, readout: Readout, name: str
    ) -> DecodeOutput:
        began = time.perf_counter()
        distinct: dict[tuple[int, ...], int] = {}  # equal answers are read once
        for output in group:
            distinct.setdefault(tuple(output.tokens.tolist()), len(distinct))
        totals = log_likelihoods(pair, prompt, [torch.tensor(answer) for answer in distinct], blend, readout, name)
        scores = []
        for output in group:
            total = totals[distinct[tuple(output.tokens.tolist())]]
            scores.append(total if self.rank_by == "target" else total / len(output.tokens))
        chosen = max(range(len(scores)), key=lambda number: scores[number])  # the first of equals
        seconds = time.perf_counter() - began
        ranking = sum(-(-len(answer) // CHUNK) for answer in distinct)
        return choose_among(group, chosen, scores=scores, betas=self.betas, seconds=seconds, ranking=ranking)


def log_likelihoods(
    pair: Pair, prompt: Tensor, answers: Sequence[Tensor], blend: Blend | None, readout: Readout, name: str = "prompt"
) -> list[float]:
    """ln of the probability of whole answers [T] behind a prompt [S], at temperature 1: the target's, or a blend's."""
    totals = [0.0] * len(answers)
    for part in replay(pair, prompt, answers, [] if blend is None else [readout], name=name):
        logits = wide(part.target)  # [Q, V]
        if blend is not None:
            logits = blend.mix_along(part.target, part.readouts[0], part.first)
        chosen = logits.log_softmax(-1).gather(1, part.tokens[:, None])  # [Q, 1]
        totals[part.answer] += float(chosen.double().sum())
    return totals


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
    block_size: int | None = None,
    **options: Unpack[CallOptions],
) -> list[DecodeOutput]:
    """Decode several answers of every prompt, and return the best one of each.

    Args:
        pair, prompts, max_new_tokens, options: as in ``autoregressive_generate``, of the answers; ``temperature`` is 1
            where it is left out, and seeds are one per prompt.
        blend: of ``rank_by`` blend, and what but for β the answers of ``betas`` are decoded with.
        rank_by, num_answers, betas, readout, block_size: see :class:`Rerank`.

    Returns:
        The best answer of every prompt, the first of equals; its ``trace.answers`` has all of them. Lengths and
        forwards are its own; ``decode_seconds`` are those of the batch with all answers of all prompts.

    Raises:
        InputError: an unusable argument, or answers that could not differ.
    """
    if rank_by == "blend" and blend is None:
        raise InputError("blend", expected="a Blend, which ranks", received="None", hint="use e.g. Blend(0.3)")
    guidance: dict[str, Any] = {}
    if blend is not None:
        guidance = {"space": blend.space, "candidates": blend.candidates, "plausibility": blend.plausibility}
        guidance |= {"schedule": blend.schedule, "beta": blend.beta if rank_by == "blend" else None}
    method = Rerank(rank_by, num_answers, betas, readout=readout, block_size=block_size, **guidance)
    options.setdefault("temperature", 1.0)
    return method.generate(pair, prompts, call_of(max_new_tokens, **options))
