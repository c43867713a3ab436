"""Guided decoding: tokens of ``(1 − β)·target + β·readout``, token by token (the oracle) or several per target forward.

A cycle of the fast loop drafts a block, reads it once with the target, makes the readout's logits at all of its
positions in one go, blends, and commits the tokens that the blend itself would have chosen: argmax by argmax when
greedy, by rejection against the proposal's own distribution otherwise. The output has exactly the slow loop's
distribution.
"""

import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack

import torch
from torch import Tensor

from dgd_lightning.checks import check_integer
from dgd_lightning.decode.batch import Batch, Change, choose
from dgd_lightning.decode.blending import Blend, Schedule, Space, as_schedule
from dgd_lightning.decode.call import Call, Request, SampledOptions, call_of, check_request
from dgd_lightning.decode.drafter import Drafter, Proposal, check_block_size, propose
from dgd_lightning.decode.nested import readout_key
from dgd_lightning.decode.readout_group import ReadoutGroup
from dgd_lightning.decode.readouts.base import Readout, TargetOutput, split_taps, wide
from dgd_lightning.decode.readouts.draft import as_readout
from dgd_lightning.decode.sampling import probabilities
from dgd_lightning.decode.session import Session
from dgd_lightning.decode.verify import Verdict, verify_match, verify_rejection
from dgd_lightning.distributions import real_dtype
from dgd_lightning.errors import InputError
from dgd_lightning.methods.base import Guidance, Method, check_single_beta
from dgd_lightning.pair import Pair
from dgd_lightning.types import DecodeOutput


@dataclass(frozen=True)
class Guided(Method):
    """``(1 − β)·target + β·readout`` at every position; exact for this blended distribution.

    Args:
        beta: β, of all rows, or one per row.
        readout: ``draft``, or any :class:`~dgd_lightning.decode.readouts.base.Readout`.
        speculative: several tokens per target forward; False decodes token by token, with the same distribution.
        block_size: K of the proposals, as in :class:`~dgd_lightning.methods.speculative.Speculative`.
        space, candidates, plausibility, schedule: see :class:`~dgd_lightning.decode.blending.Blend`.

    Raises:
        InputError: a setting that can't be.
    """

    beta: float | Sequence[float]
    readout: Readout | str = "draft"
    speculative: bool = True
    block_size: int | None = None
    space: Space = "logits"
    candidates: int | None = None
    plausibility: float | None = None
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "readout", as_readout(self.readout))
        check_integer("block_size", self.block_size, least=2, optional=True)
        if self.block_size is not None and not self.speculative:
            raise InputError(
                "block_size",
                expected="null: token by token nothing is proposed",
                received=self.block_size,
                hint="leave it out, or set speculative: true",
            )
        self.blend()

    def blend(self) -> Blend:
        """How target and readout are blended."""
        return Blend(self.beta, self.space, self.candidates, self.plausibility, as_schedule(self.schedule))

    @property
    def blends(self) -> bool:
        return True

    @property
    def needs_draft(self) -> bool:
        return self.speculative or super().needs_draft

    def block(self, pair: Pair) -> int | None:
        return check_block_size(pair, self.block_size) if self.speculative else None

    def check_arm(self, temperature: float) -> None:
        check_single_beta(self.beta)

    def guidance_of(self, record: dict[str, Any]) -> Guidance | None:
        return Guidance(self.blend(), as_readout(self.readout))

    @torch.no_grad()
    def generate(self, pair: Pair, prompts: Sequence[Tensor], call: Call) -> list[DecodeOutput]:
        blend, readout, request = self.blend(), as_readout(self.readout), check_request(pair, prompts, call)
        width, rows = self.block(pair) or 1, list(range(len(request.rows)))
        betas = torch.tensor(blend.betas(len(rows)), dtype=real_dtype(pair.target.device), device=pair.target.device)
        group = ReadoutGroup(blend, readout.begin(pair, request, width), rows, betas, len(prompts))
        return GuidedLoop(pair, request, [group], readout.layers(pair), width, call).run()

    def join_key(self) -> Hashable | None:
        if type(self).generate is not Guided.generate:  # a subclass that decodes in another way
            return None
        return type(self), self.speculative, self.block_size

    def generate_together(
        self, pair: Pair, prompts: Sequence[Tensor], methods: Sequence[Any], call: Call
    ) -> list[list[DecodeOutput]]:
        variants = [Guidance(method.blend(), method.readout) for method in methods]
        return sweep(pair, prompts, variants, self.block(pair) or 1, call)


@torch.no_grad()
def sweep(
    pair: Pair, prompts: Sequence[Tensor], variants: Sequence[Guidance], width: int, call: Call
) -> list[list[DecodeOutput]]:
    """Outputs of every variant: a prompt's rows are one sequence until they choose different tokens.

    Args:
        variants: each is a row per prompt. Equal readouts share their forwards too.
        width: K of the proposals; 1 decodes token by token.
    """
    count, request = len(variants), check_request(pair, prompts, call)
    request = request._replace(
        rows=[prompt for prompt in request.rows for _ in variants],
        seeds=request.seeds and [own for own in request.seeds for _ in variants],
    )
    alike: dict[Any, list[int]] = {}
    for number, variant in enumerate(variants):
        alike.setdefault(readout_key((variant.readout, replace(variant.blend, beta=0.0))), []).append(number)
    groups: list[ReadoutGroup] = []
    layers: tuple[int, ...] = ()
    for numbers in alike.values():
        blend, readout = variants[numbers[0]].blend, as_readout(variants[numbers[0]].readout)
        rows = [prompt * count + number for prompt in range(len(prompts)) for number in numbers]
        each = [float(variants[row % count].blend.beta) for row in rows]  # type: ignore[arg-type]
        betas = torch.tensor(each, dtype=real_dtype(pair.target.device), device=pair.target.device)
        groups.append(ReadoutGroup(blend, readout.begin(pair, request, width), rows, betas, len(prompts)))
        layers += readout.layers(pair)
    outputs = GuidedLoop(pair, request, groups, layers, width, call, share_sequences=True).run()
    return [outputs[number::count] for number in range(count)]


class GuidedLoop:
    """One batch: the target, what it is blended with, and with ``width`` > 1 the draft that proposes.

    Args:
        groups: between them they have every row.
        layers: of the target, which their readouts need.
        width: K of the proposals; 1 decodes token by token.
        share_sequences: see :class:`~dgd_lightning.decode.batch.Batch`.
    """

    def __init__(
        self,
        pair: Pair,
        request: Request,
        groups: list[ReadoutGroup],
        layers: Sequence[int],
        width: int,
        call: Call,
        *,
        share_sequences: bool = False,
    ) -> None:
        target, draft = pair.target, pair.draft
        self.groups, self.width, self.request = groups, width, request
        self.drafter = Drafter(target, draft, request, width) if width > 1 and draft is not None else None
        self.proposed = tuple(draft.config.target_layer_ids) if self.drafter is not None and draft is not None else ()
        self.layer_ids = tuple(dict.fromkeys((*self.proposed, *layers)))
        if self.drafter is not None and len(groups) == 1:
            groups[0].state.share(self.drafter.cache, width)
        proposals = int(self.drafter is not None)
        drafts = {row: proposals + group.state.drafts for group in groups for row in group.rows}
        self.drafts = [drafts[row] for row in range(len(request.rows))]
        began = time.perf_counter()
        companions = [] if self.drafter is None else [self.drafter.cache]
        session = Session(target, request, width=width, layer_ids=self.layer_ids, companions=companions)
        session.prefill(self._extend, hold_last=True)
        for group in groups:
            group.state.ready()
        self.batch = batch = Batch(
            session,
            width=width,
            share_sequences=share_sequences,
            on_change=self._follow,
            random_source=call.random_source,
            on_progress=call.on_progress,
            began=began,
        )
        # The prompts' last tokens are read like any others; they give the first tokens.
        batch.begin(self._guided(batch.sequences(batch.last)[:, None], batch.sequences(batch.positions(1))))

    def run(self) -> list[DecodeOutput]:
        """Decode all rows to their ends."""
        while self.batch.active:
            self._cycle()
            self.batch.synchronise()
        return self.batch.outputs(drafts=self.drafts)

    def _cycle(self) -> None:
        """Draft, read, blend, commit what the blend agrees with."""
        batch, sampling = self.batch, self.request.sampling
        positions = batch.positions(self.width)  # [b, K]
        here, last = batch.sequences(positions), batch.sequences(batch.last)[:, None]
        if self.drafter is None:
            guided = self._guided(last, here)  # [b, 1, V]
            tokens = choose(guided, sampling, batch.random_source, positions + 1)
            batch.commit(Verdict(tokens, torch.ones_like(batch.last)), guided)
            return
        proposal = propose(self.drafter, batch, here, "rejection")
        guided = self._guided(torch.cat([last, proposal.tokens], dim=1), here, proposal)  # [b, K, V]
        proposed = batch.rows(proposal.tokens)
        if proposal.q is None:
            verdict = verify_match(proposed, guided.argmax(-1))
        else:
            p = probabilities(guided, sampling)
            verdict = verify_rejection(proposed, batch.rows(proposal.q), p, batch.random_source, positions + 1)
        batch.commit(verdict, guided)

    def _guided(self, tokens: Tensor, positions: Tensor, proposal: Proposal | None = None) -> Tensor:
        """Blended logits [b, Q, V] after tokens [t, Q]: one forward of the target, one of each readout."""
        batch = self.batch
        forward = batch.step(tokens, positions)
        self._extend(forward.features, positions)
        longest = batch.longest + tokens.shape[1] - 1
        taps = split_taps(forward.features, self.layer_ids)
        out = TargetOutput(tokens, positions, forward.logits, taps, longest, proposal and proposal.first)
        target = batch.rows(forward.logits)  # [b, Q, V]
        step = batch.rows(positions) + 1 - batch.starts[:, None]  # tokens generated before the one that is chosen
        if len(self.groups) == 1:
            return self.groups[0].mix(out, target, step)
        guided = wide(target).clone()
        for group in self.groups:
            if group.sequences:
                guided[group.index] = group.mix(out, target, step)
        return guided

    def _extend(self, features: Tensor, positions: Tensor) -> None:
        taps = split_taps(features, self.layer_ids)
        if self.drafter is not None:
            self.drafter.extend(torch.cat([taps[i] for i in self.proposed], dim=-1), positions)
        for group in self.groups:
            if group.sequences:
                group.extend(taps, positions)

    def _follow(self, change: Change) -> None:
        for group in self.groups:
            group.follow(change)


def guided_generate(
    pair: Pair,
    prompts: Sequence[Tensor],
    *,
    max_new_tokens: int,
    beta: float | Sequence[float],
    readout: Readout | str = "draft",
    speculative: bool = True,
    block_size: int | None = None,
    space: Space = "logits",
    candidates: int | None = None,
    plausibility: float | None = None,
    schedule: Schedule | None = None,
    **options: Unpack[SampledOptions],
) -> list[DecodeOutput]:
    """Decode a batch of prompts with guidance; exact for the guided distribution.

    Args:
        pair: target and draft; a draft may be missing where neither readout nor ``speculative`` needs one.
        prompts, max_new_tokens, options: as in ``autoregressive_generate``; temperature and filters apply to the blend.
        beta, readout, speculative, block_size, space, candidates, plausibility, schedule: see :class:`Guided`.

    Returns:
        Outputs in the order of the prompts, ``num_return_sequences`` per prompt.

    Raises:
        InputError: an unusable argument, or a readout that the pair or the prompts can't serve.
    """
    method = Guided(beta, readout, speculative, block_size, space, candidates, plausibility, schedule)
    return method.generate(pair, prompts, call_of(max_new_tokens, **options))


def guided_sweep(
    pair: Pair,
    prompts: Sequence[Tensor],
    variants: Sequence[Guidance],
    *,
    max_new_tokens: int,
    speculative: bool = True,
    block_size: int | None = None,
    **options: Unpack[SampledOptions],
) -> list[list[DecodeOutput]]:
    """Decode every prompt in several variants at once.

    A prompt is read once; its variants go on as one sequence until they choose different tokens, and as rows of one
    batch from there on: the weights are read once for all.

    Args:
        pair, prompts, max_new_tokens, speculative, block_size, options: as in :func:`guided_generate`; all variants of
            a prompt draw with the same random numbers, and there is one row of each.
        variants: several β, readouts, constraints.

    Returns:
        For each variant the outputs of the prompts, equal to those of ``guided_generate`` up to rounding.

    Raises:
        InputError: see :func:`guided_generate`.
    """
    fine = bool(variants) and all(
        isinstance(one, Guidance) and isinstance(one.blend.beta, int | float) for one in variants
    )
    if not fine or options.get("num_return_sequences", 1) != 1:
        raise InputError(
            "variants",
            expected="a list of Guidance, each with one β and one row per prompt",
            received=repr(variants),
            hint="use e.g. [Guidance(Blend(0.1)), Guidance(Blend(0.3))]",
        )
    width = check_block_size(pair, block_size) if speculative else 1
    made = [Guidance(one.blend, as_readout(one.readout)) for one in variants]
    return sweep(pair, prompts, made, width, call_of(max_new_tokens, **options))
