"""Guided decoding: tokens of ``(1 − β)·target + β·readout``, token by token (the oracle) or several per target forward.

A cycle of the fast loop drafts a block, reads it once with the target, makes the readout's logits at all of its
positions in one go, blends, and commits the prefix that the blend itself would have chosen: argmax by argmax when
greedy, by rejection against the proposal's own distribution otherwise. The output has exactly the slow loop's
distribution.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dgd_lightning.decode.blending import Blend, Schedule, Space, as_schedule
from dgd_lightning.decode.engine import Batch, Change, Forward, OnProgress, Request, check_request, choose
from dgd_lightning.decode.prefix import PrefixCache
from dgd_lightning.decode.random_source import RandomSource
from dgd_lightning.decode.readout_group import ReadoutGroup
from dgd_lightning.decode.readouts import DraftReadout, Readout, TargetOutput, split_taps, wide
from dgd_lightning.decode.sampling import probabilities
from dgd_lightning.decode.speculative import Drafter, Proposal, check_block_size, check_draft, propose
from dgd_lightning.decode.verify import Verdict, verify_match, verify_rejection
from dgd_lightning.errors import InputError
from dgd_lightning.types import DecodeOutput

if TYPE_CHECKING:
    from dgd_lightning.pair import Pair


@torch.no_grad()
def guided_generate(
    pair: Pair,
    prompts: Sequence[Tensor],
    *,
    max_new_tokens: int,
    beta: float | Sequence[float],
    readout: Readout | str = "draft",
    speculative: bool = True,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_token_ids: Sequence[int] | None = None,
    seed: int | Sequence[int] | None = None,
    num_return_sequences: int = 1,
    block_size: int | None = None,
    space: Space = "logits",
    candidates: int | None = None,
    plausibility: float | None = None,
    schedule: Schedule | None = None,
    on_progress: OnProgress | None = None,
    prefixes: Sequence[PrefixCache | None] | None = None,
    random_source: RandomSource | None = None,
) -> list[DecodeOutput]:
    """Decode a batch of prompts with guidance; exact for the guided distribution.

    Args:
        pair: target and draft; a draft may be missing where neither readout nor ``speculative`` needs one.
        prompts, max_new_tokens, temperature, top_k, top_p, stop_token_ids, seed, num_return_sequences, on_progress,
            prefixes, random_source: as in ``autoregressive_generate``; temperature and filters apply to the blend.
        beta: of all rows, or one per row.
        readout: ``draft``, or any :class:`~dgd_lightning.decode.readouts.Readout`.
        speculative: several tokens per target forward; False decodes token by token, with the same distribution.
        block_size: K of the proposals, as in ``speculative_generate``.
        space, candidates, plausibility, schedule: see :class:`~dgd_lightning.decode.blending.Blend`.

    Returns:
        Outputs in the order of the prompts, ``num_return_sequences`` per prompt.

    Raises:
        InputError: an unusable argument, or a readout that the pair or the prompts can't serve.
    """
    blend = Blend(beta, space, candidates, plausibility, as_schedule(schedule))
    request = check_request(
        pair,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_token_ids=stop_token_ids,
        seed=seed,
        num_return_sequences=num_return_sequences,
        prefixes=prefixes,
    )
    width = check_block_size(check_draft(pair).config.block_size, block_size) if speculative else 1
    rows = list(range(len(request.rows)))
    betas = torch.tensor(blend.betas(len(rows)), dtype=torch.float64, device=pair.target.device)
    made = as_readout(readout)
    group = ReadoutGroup(blend, made.begin(pair, request, width), rows, betas, len(prompts))
    return Guided(pair, request, [group], made.layers(pair), width, random_source, on_progress).run()


class Guidance(NamedTuple):
    """One of the variants in which :func:`guided_sweep` decodes every prompt."""

    blend: Blend
    readout: Readout | str = "draft"


@torch.no_grad()
def guided_sweep(
    pair: Pair,
    prompts: Sequence[Tensor],
    variants: Sequence[Guidance],
    *,
    max_new_tokens: int,
    speculative: bool = True,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_token_ids: Sequence[int] | None = None,
    seed: int | Sequence[int] | None = None,
    block_size: int | None = None,
    on_progress: OnProgress | None = None,
    prefixes: Sequence[PrefixCache | None] | None = None,
) -> list[list[DecodeOutput]]:
    """Decode every prompt in several variants at once.

    A prompt is read once; its variants go on as one sequence until they choose different tokens, and as rows of one
    batch
    from there on: the weights are read once for all.

    Args:
        pair, prompts, max_new_tokens, speculative, temperature, top_k, top_p, stop_token_ids, block_size, on_progress,
            prefixes: as in :func:`guided_generate`.
        variants: several β, readouts, constraints; each is a row per prompt. Equal readouts share their forwards too.
        seed: as in ``autoregressive_generate``, per prompt: all variants of a prompt draw the same random numbers.

    Returns:
        For each variant the outputs of the prompts, equal to those of ``guided_generate`` up to rounding.

    Raises:
        InputError: see :func:`guided_generate`.
    """
    if not variants or not all(
        isinstance(variant, Guidance) and isinstance(variant.blend.beta, int | float) for variant in variants
    ):
        raise InputError(
            "variants",
            expected="a list of Guidance, each with one β",
            received=repr(variants),
            hint="use e.g. [Guidance(Blend(0.1)), Guidance(Blend(0.3))]",
        )
    request = check_request(
        pair,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_token_ids=stop_token_ids,
        seed=seed,
        prefixes=prefixes,
    )
    count = len(variants)
    request = request._replace(
        rows=[prompt for prompt in request.rows for _ in variants],
        seeds=request.seeds and [own for own in request.seeds for _ in variants],
    )
    width = check_block_size(check_draft(pair).config.block_size, block_size) if speculative else 1
    alike: dict[Any, list[int]] = {}
    for number, variant in enumerate(variants):
        alike.setdefault((readout_key(variant.readout), replace(variant.blend, beta=0.0)), []).append(number)
    groups, layers = [], ()  # type: list[ReadoutGroup], tuple[int, ...]
    for numbers in alike.values():
        blend, readout = variants[numbers[0]].blend, as_readout(variants[numbers[0]].readout)
        rows = [prompt * count + number for prompt in range(len(prompts)) for number in numbers]
        each = [float(variants[row % count].blend.beta) for row in rows]  # type: ignore[arg-type]
        betas = torch.tensor(each, dtype=torch.float64, device=pair.target.device)
        groups.append(ReadoutGroup(blend, readout.begin(pair, request, width), rows, betas, len(prompts)))
        layers += readout.layers(pair)
    outputs = Guided(pair, request, groups, layers, width, None, on_progress, share_sequences=True).run()
    return [outputs[number::count] for number in range(count)]


def readout_key(readout: Any) -> Any:
    """Equal for equal readouts, lists in them included; of what can't be compared, for the same object only."""
    if isinstance(readout, list | tuple):
        return tuple(map(readout_key, readout))
    if is_dataclass(readout) and not isinstance(readout, type):
        return type(readout), *(readout_key(getattr(readout, field.name)) for field in fields(readout))
    return id(readout) if isinstance(readout, Tensor) or not isinstance(readout, Hashable) else readout


class Guided:
    """One batch: the target, what it is blended with, and with ``width`` > 1 the draft that proposes.

    Args:
        pair, request, random_source, on_progress: as everywhere.
        groups: between them they have every row.
        layers: of the target, which their readouts need.
        width: K of the proposals; 1 decodes token by token.
        share_sequences: see :class:`~dgd_lightning.decode.engine.Batch`.
    """

    def __init__(
        self,
        pair: Pair,
        request: Request,
        groups: list[ReadoutGroup],
        layers: Sequence[int],
        width: int,
        random_source: RandomSource | None,
        on_progress: OnProgress | None,
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
        self.batch = Batch(
            target,
            request,
            width=width,
            layer_ids=self.layer_ids,
            on_features=self._extend,
            companions=[] if self.drafter is None else [self.drafter.cache],
            share_sequences=share_sequences,
            on_prompts=self._ready,
            on_change=self._follow,
            hold_last=True,
            random_source=random_source,
            on_progress=on_progress,
        )
        # The prompts' last tokens are a forward like any other, which gives the first token.
        batch, positions = self.batch, self.batch.positions(1)
        first = self._guided(batch.sequences(batch.last)[:, None], batch.sequences(positions))
        batch.begin(choose(first, request.sampling, batch.random_source, positions + 1))

    def run(self) -> list[DecodeOutput]:
        """Decode all rows to their ends."""
        while self.batch.active:
            self.cycle()
            self.batch.synchronise()
        return self.batch.outputs(drafts=self.drafts)

    def cycle(self) -> None:
        """Draft, read, blend, commit what the blend agrees with."""
        batch, sampling = self.batch, self.request.sampling
        positions = batch.positions(self.width)  # [b, K]
        here, last = batch.sequences(positions), batch.sequences(batch.last)[:, None]
        if self.drafter is None:
            tokens = choose(self._guided(last, here), sampling, batch.random_source, positions + 1)
            batch.commit(Verdict(tokens, torch.ones_like(batch.last)))
            return
        proposal = propose(self.drafter, batch, here, "rejection")
        guided = self._guided(torch.cat([last, proposal.tokens], dim=1), here, proposal)  # [b, K, V]
        proposed = batch.rows(proposal.tokens)
        if proposal.q is None:
            verdict = verify_match(proposed, guided.argmax(-1))
        else:
            p = probabilities(guided, sampling)
            verdict = verify_rejection(proposed, batch.rows(proposal.q), p, batch.random_source, positions + 1)
        batch.commit(verdict)

    def _guided(self, tokens: Tensor, positions: Tensor, proposal: Proposal | None = None) -> Tensor:
        """Blended logits [b, Q, V] after tokens [t, Q]: one forward of the target, one of each readout."""
        batch = self.batch
        forward: Forward = batch.step(tokens, positions)
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

    def _ready(self) -> None:
        for group in self.groups:
            group.state.ready()

    def _follow(self, change: Change) -> None:
        for group in self.groups:
            group.follow(change)


def as_readout(readout: Readout | str) -> Readout:
    """``draft`` by name; anything else must be a readout.

    Raises:
        InputError: it is not.
    """
    if readout == "draft":
        return DraftReadout()
    if isinstance(readout, str | type) or not hasattr(readout, "begin") or not hasattr(readout, "layers"):
        raise InputError(
            "readout", expected="draft, or a Readout", received=repr(readout), hint="see dgd_lightning.decode.readouts"
        )
    return readout
