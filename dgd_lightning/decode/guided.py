"""Guided decoding: tokens of ``(1 − β)·target + β·readout``, token by token (the oracle) or several per target forward.

A cycle of the fast loop drafts a block, reads it once with the target, makes the readout's logits at all of its
positions in one go, blends, and commits the prefix that the blend itself would have chosen: argmax by argmax when
greedy, by rejection against the proposal's own distribution otherwise. The output has exactly the slow loop's law.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dgd_lightning.decode.blending import Blend, Schedule, Space, as_schedule
from dgd_lightning.decode.engine import Batch, Change, Forward, OnProgress, Request, check_request, choose
from dgd_lightning.decode.lanes import Lane
from dgd_lightning.decode.noise import Noise
from dgd_lightning.decode.prefix import SharedPrefix
from dgd_lightning.decode.readouts import DraftReadout, Readout, Stretch, split_taps, wide
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
    prefixes: Sequence[SharedPrefix | None] | None = None,
    noise: Noise | None = None,
) -> list[DecodeOutput]:
    """Decode a batch of prompts with guidance; exact for the guided distribution.

    Args:
        pair: target and draft; a draft may be missing where neither readout nor ``speculative`` needs one.
        prompts, max_new_tokens, temperature, top_k, top_p, stop_token_ids, seed, num_return_sequences, on_progress,
            prefixes, noise: as in ``autoregressive_generate``; temperature and filters apply to the blend.
        beta: of all rows, or one per row.
        readout: ``draft``, or any :class:`~dgd_lightning.decode.readouts.Readout`.
        speculative: several tokens per target forward; False decodes token by token, with the same law.
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
    lane = Lane(blend, made.begin(pair, request, width), rows, betas, len(prompts))
    return Guided(pair, request, [lane], made.layers(pair), width, noise, on_progress).run()


class Guidance(NamedTuple):
    """One of the ways in which :func:`guided_sweep` decodes every prompt."""

    blend: Blend
    readout: Readout | str = "draft"


@torch.no_grad()
def guided_sweep(
    pair: Pair,
    prompts: Sequence[Tensor],
    ways: Sequence[Guidance],
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
    prefixes: Sequence[SharedPrefix | None] | None = None,
) -> list[list[DecodeOutput]]:
    """Decode every prompt in several ways at once.

    A prompt is read once; its ways go on as one text until they choose different tokens, and as rows of one batch
    from there on: the weights are read once for all.

    Args:
        pair, prompts, max_new_tokens, speculative, temperature, top_k, top_p, stop_token_ids, block_size, on_progress,
            prefixes: as in :func:`guided_generate`.
        ways: several β, readouts, constraints; each is a row per prompt. Equal readouts share their forwards too.
        seed: as in ``autoregressive_generate``, per prompt: all ways of a prompt draw with the same noise.

    Returns:
        For each way the outputs of the prompts, equal to those of ``guided_generate`` up to rounding.

    Raises:
        InputError: see :func:`guided_generate`.
    """
    if not ways or not all(isinstance(way, Guidance) and isinstance(way.blend.beta, int | float) for way in ways):
        raise InputError(
            "ways",
            expected="a list of Guidance, each with one β",
            received=repr(ways),
            mend="use e.g. [Guidance(Blend(0.1)), Guidance(Blend(0.3))]",
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
    count = len(ways)
    request = request._replace(
        rows=[prompt for prompt in request.rows for _ in ways],
        seeds=request.seeds and [own for own in request.seeds for _ in ways],
    )
    width = check_block_size(check_draft(pair).config.block_size, block_size) if speculative else 1
    alike: dict[Any, list[int]] = {}
    for number, way in enumerate(ways):
        alike.setdefault((readout_key(way.readout), replace(way.blend, beta=0.0)), []).append(number)
    lanes, layers = [], ()  # type: list[Lane], tuple[int, ...]
    for numbers in alike.values():
        blend, readout = ways[numbers[0]].blend, as_readout(ways[numbers[0]].readout)
        rows = [prompt * count + number for prompt in range(len(prompts)) for number in numbers]
        each = [float(ways[row % count].blend.beta) for row in rows]  # type: ignore[arg-type]
        betas = torch.tensor(each, dtype=torch.float64, device=pair.target.device)
        lanes.append(Lane(blend, readout.begin(pair, request, width), rows, betas, len(prompts)))
        layers += readout.layers(pair)
    outputs = Guided(pair, request, lanes, layers, width, None, on_progress, share_texts=True).run()
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
        pair, request, noise, on_progress: as everywhere.
        lanes: between them they have every row.
        layers: of the target, which their readouts need.
        width: K of the proposals; 1 decodes token by token.
        share_texts: see :class:`~dgd_lightning.decode.engine.Batch`.
    """

    def __init__(
        self,
        pair: Pair,
        request: Request,
        lanes: list[Lane],
        layers: Sequence[int],
        width: int,
        noise: Noise | None,
        on_progress: OnProgress | None,
        *,
        share_texts: bool = False,
    ) -> None:
        target, draft = pair.target, pair.draft
        self.lanes, self.width, self.request = lanes, width, request
        self.drafter = Drafter(target, draft, request, width) if width > 1 and draft is not None else None
        self.proposed = tuple(draft.config.target_layer_ids) if self.drafter is not None and draft is not None else ()
        self.layer_ids = tuple(dict.fromkeys((*self.proposed, *layers)))
        if self.drafter is not None and len(lanes) == 1:
            lanes[0].reading.share(self.drafter.cache, width)
        proposals = int(self.drafter is not None)
        drafts = {row: proposals + lane.reading.drafts for lane in lanes for row in lane.rows}
        self.drafts = [drafts[row] for row in range(len(request.rows))]
        self.batch = Batch(
            target,
            request,
            width=width,
            layer_ids=self.layer_ids,
            on_features=self._extend,
            companions=[] if self.drafter is None else [self.drafter.cache],
            share_texts=share_texts,
            on_prompts=self._ready,
            on_change=self._follow,
            hold_last=True,
            noise=noise,
            on_progress=on_progress,
        )
        # The prompts' last tokens are a stretch like any other, which gives the first token.
        batch, positions = self.batch, self.batch.positions(1)
        first = self._guided(batch.texts(batch.last)[:, None], batch.texts(positions))
        batch.begin(choose(first, request.sampling, batch.noise, positions + 1))

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
        here, last = batch.texts(positions), batch.texts(batch.last)[:, None]
        if self.drafter is None:
            tokens = choose(self._guided(last, here), sampling, batch.noise, positions + 1)
            batch.commit(Verdict(tokens, torch.ones_like(batch.last)))
            return
        proposal = propose(self.drafter, batch, here, "rejection")
        guided = self._guided(torch.cat([last, proposal.tokens], dim=1), here, proposal)  # [b, K, V]
        proposed = batch.rows(proposal.tokens)
        if proposal.q is None:
            verdict = verify_match(proposed, guided.argmax(-1))
        else:
            p = probabilities(guided, sampling)
            verdict = verify_rejection(proposed, batch.rows(proposal.q), p, batch.noise, positions + 1)
        batch.commit(verdict)

    def _guided(self, tokens: Tensor, positions: Tensor, proposal: Proposal | None = None) -> Tensor:
        """Blended logits [b, Q, V] after tokens [t, Q]: one forward of the target, one of each readout."""
        batch = self.batch
        forward: Forward = batch.step(tokens, positions)
        self._extend(forward.features, positions)
        longest = batch.longest + tokens.shape[1] - 1
        taps = split_taps(forward.features, self.layer_ids)
        stretch = Stretch(tokens, positions, forward.logits, taps, longest, proposal and proposal.first)
        target = batch.rows(forward.logits)  # [b, Q, V]
        step = batch.rows(positions) + 1 - batch.starts[:, None]  # tokens generated before the one that is chosen
        if len(self.lanes) == 1:
            return self.lanes[0].mix(stretch, target, step)
        guided = wide(target).clone()
        for lane in self.lanes:
            if lane.texts:
                guided[lane.index] = lane.mix(stretch, target, step)
        return guided

    def _extend(self, features: Tensor, positions: Tensor) -> None:
        taps = split_taps(features, self.layer_ids)
        if self.drafter is not None:
            self.drafter.extend(torch.cat([taps[i] for i in self.proposed], dim=-1), positions)
        for lane in self.lanes:
            if lane.texts:
                lane.extend(taps, positions)

    def _ready(self) -> None:
        for lane in self.lanes:
            lane.reading.ready()

    def _follow(self, change: Change) -> None:
        for lane in self.lanes:
            lane.follow(change)


def as_readout(readout: Readout | str) -> Readout:
    """``draft`` by name; anything else must be a readout.

    Raises:
        InputError: it is not.
    """
    if readout == "draft":
        return DraftReadout()
    if isinstance(readout, str | type) or not hasattr(readout, "begin") or not hasattr(readout, "layers"):
        raise InputError(
            "readout", expected="draft, or a Readout", received=repr(readout), mend="see dgd_lightning.decode.readouts"
        )
    return readout
