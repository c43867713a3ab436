"""Guided decoding: tokens of ``(1 − β)·target + β·readout``, token by token (the oracle) or several per target forward.

A cycle of the fast loop drafts a block, reads it once with the target, makes the readout's logits at all of its
positions in one go, blends, and commits the tokens that the blend itself would have chosen: argmax by argmax when
greedy, by rejection against the proposal's own distribution otherwise. The output has exactly the slow loop's
distribution.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack

import torch
from torch import Tensor

from dgd_lightning.checks import check_integer
from dgd_lightning.decode.batch import Batch, Change, index_of, taken
from dgd_lightning.decode.blending import Blend, Constant, Schedule, Space
from dgd_lightning.decode.call import Call, CallOptions, Request, call_of, check_request
from dgd_lightning.decode.drafter import Drafter, Proposal, Scheme, check_block_size, judge, propose
from dgd_lightning.decode.finite import peaks
from dgd_lightning.decode.nested import readout_key
from dgd_lightning.decode.readouts.base import Readout, TargetOutput, split_taps
from dgd_lightning.decode.readouts.draft import as_readout
from dgd_lightning.decode.session import Session
from dgd_lightning.decode.verify import Verdict
from dgd_lightning.distributions import real_dtype, wide
from dgd_lightning.errors import LEAVE_OUT, InputError
from dgd_lightning.methods.base import Guidance, Method, check_single_beta
from dgd_lightning.pair import Pair
from dgd_lightning.target.cache import PositionCache
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
                hint=f"{LEAVE_OUT}, or set speculative: true",
            )
        self.blend()

    def blend(self) -> Blend:
        """How target and readout are blended."""
        schedule = Constant() if self.schedule is None else self.schedule
        return Blend(self.beta, self.space, self.candidates, self.plausibility, schedule)

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
        request, width = check_request(pair, prompts, call), self.block(pair) or 1
        rows, blend = list(range(len(request.rows))), self.blend()
        guidance = Guidance(blend, as_readout(self.readout))
        group = ReadoutGroup(pair, request, width, guidance, rows, blend.betas(len(rows)))
        return GuidedLoop(pair, request, [group], width).run()

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

    Each variant is a row per prompt; equal readouts share their forwards too. A ``width`` of 1 is token by token.
    """
    count, request = len(variants), check_request(pair, prompts, call)
    request = request._replace(
        rows=[prompt for prompt in request.rows for _ in variants],
        seeds=request.seeds and [own for own in request.seeds for _ in variants],
    )
    alike: dict[Any, list[int]] = {}
    for number, variant in enumerate(variants):
        alike.setdefault(readout_key((variant.readout, replace(variant.blend, beta=0.0))), []).append(number)
    groups = []
    for numbers in alike.values():
        rows = [prompt * count + number for prompt in range(len(prompts)) for number in numbers]
        betas = [beta for _ in prompts for number in numbers for beta in variants[number].blend.betas(1)]
        groups.append(ReadoutGroup(pair, request, width, variants[numbers[0]], rows, betas))
    outputs = GuidedLoop(pair, request, groups, width, share_sequences=True).run()
    return [outputs[number::count] for number in range(count)]


class ReadoutGroup:
    """The rows of a batch that share a readout and, but for β, a blend.

    The readout's state has a row per sequence that one of them is at. Rows are numbers in the batch, ascending; their n
    β stand in place of the blend's own.
    """

    def __init__(
        self, pair: Pair, request: Request, width: int, guidance: Guidance, rows: list[int], betas: Sequence[float]
    ) -> None:
        device, readout = pair.target.device, as_readout(guidance.readout)
        self.blend, self.state = guidance.blend, readout.begin(pair, request, width)
        self.layers, self.rows = readout.layers(pair), rows
        self.name = f"readout {type(readout).__name__}"
        self.betas = torch.tensor(betas, dtype=real_dtype(device), device=device)  # [n]
        self.sequences = list(range(len(request.lengths)))  # ascending; none once every row is finished
        self._sequences: Tensor | None = None  # the same on the device; None: all there are, in order
        self.index: Tensor | None = None  # [n], the rows; None: all there are, in order
        self._places: Tensor | None = None  # [n] which of our sequences each row is at; None: row for row

    def follow(self, change: Change) -> None:
        """Rows leave and sequences part: those that stay take along what is theirs."""
        device = self.betas.device
        places = {row: place for place, row in enumerate(self.rows)}
        kept = [places[row] for row in change.stay if row in places]
        self.rows = [new for new, row in enumerate(change.stay) if row in places]
        self.betas = self.betas[kept]
        was, sequences = self.sequences, sorted({change.sequence_of[row] for row in self.rows} - {-1})
        take = [was.index(change.parents[sequence]) for sequence in sequences]
        if sequences and take != list(range(len(was))):
            index = torch.tensor(take, device=device)
            self.state.select(index)
            for cache in self.state.caches:
                cache.select(index)
        self.sequences = sequences
        own = {sequence: place for place, sequence in enumerate(sequences)}
        at = [own.get(change.sequence_of[row], 0) for row in self.rows]
        self._sequences = index_of(sequences, len(change.parents), device)
        self.index = index_of(self.rows, len(change.stay), device)
        self._places = index_of(at, len(sequences), device)

    def extend(self, taps: dict[int, Tensor], positions: Tensor) -> None:
        """Let the readout take up what the target has computed of all sequences."""
        states = {layer: taken(states, self._sequences) for layer, states in taps.items()}
        self.state.extend(states, taken(positions, self._sequences))

    def mix(self, batch: Batch, out: TargetOutput, target: Tensor, step: Tensor) -> Tensor:
        """Guided logits [n, Q, V] of the group's rows, by ``out`` of all sequences, and [b, ..] of all rows."""
        own = out._replace(
            tokens=taken(out.tokens, self._sequences),
            positions=taken(out.positions, self._sequences),
            logits=taken(out.logits, self._sequences),
            taps={layer: taken(states, self._sequences) for layer, states in out.taps.items()},
        )
        logits = self.state.logits(own)
        batch.watch(self.name, taken(peaks(logits), self._places), self.index)
        readout = taken(logits, self._places)
        return self.blend.mix(taken(target, self.index), readout, self.betas, taken(step, self.index))


class GuidedLoop:
    """One batch: the target, what it is blended with, and with ``width`` > 1 the draft that proposes.

    Args:
        groups: have every row between them; none, and the target is blended with nothing.
        scheme: how proposals are verified at a temperature.
        start: new tokens [T] that each row has already, instead of a first token to be drawn.
        options: of :class:`~dgd_lightning.decode.batch.Batch`.
    """

    def __init__(
        self,
        pair: Pair,
        request: Request,
        groups: list[ReadoutGroup],
        width: int,
        *,
        scheme: Scheme = "rejection",
        start: Sequence[Tensor] | None = None,
        **options: Any,
    ) -> None:
        target, draft = pair.target, pair.draft
        self.groups, self.width, self.scheme = groups, width, scheme
        self.drafter = None
        layers = [layer for group in groups for layer in group.layers]
        if width > 1 and draft is not None:
            self.drafter = Drafter(target, draft, request, width)
            layers = [*draft.config.target_layer_ids, *layers]
            if len(groups) == 1:
                groups[0].state.share(self.drafter.cache, width)
        self.layer_ids = tuple(dict.fromkeys(layers))
        self.drafts = [int(self.drafter is not None)] * len(request.rows)
        for group in groups:
            for row in group.rows:
                self.drafts[row] += group.state.drafts
        companions = [] if self.drafter is None else [self.drafter.cache]
        session = Session(target, request, width=width, layer_ids=self.layer_ids, companions=companions)
        session.prefill(self._extend, hold_last=True)
        for group in groups:
            group.state.ready()
        self.batch = batch = Batch(session, on_change=self._follow, **options)
        if start is not None:
            self._read(start)
            return
        # The prompts' last tokens are read like any others; they give the first tokens.
        batch.begin(self._guided(batch.sequences(batch.last)[:, None], batch.sequences(batch.positions(1))))

    def run(self) -> list[DecodeOutput]:
        """Decode all rows to their ends."""
        while self.batch.active:
            self.cycle()
        return self.batch.outputs(drafts=self.drafts)

    def cycle(self) -> None:
        """Draft, read, blend, commit what the blend agrees with, and tell the host."""
        batch = self.batch
        positions = batch.positions(self.width)  # [b, K]
        here, tokens = batch.sequences(positions), batch.sequences(batch.last)[:, None]
        proposal = None if self.drafter is None else propose(self.drafter, batch, here, self.scheme)
        if proposal is not None:
            tokens = torch.cat([tokens, proposal.tokens], dim=1)  # [t, K]
        guided = self._guided(tokens, here, proposal)  # [b, K, V]
        batch.commit(judge(batch, proposal, guided, positions + 1), guided)
        batch.synchronise()

    def _read(self, start: Sequence[Tensor]) -> None:
        """Commit tokens [T] that each row has already."""
        batch, tokens = self.batch, torch.nn.utils.rnn.pad_sequence(list(start), batch_first=True)
        counts = torch.tensor([len(own) for own in start])
        tokens, counts = tokens.to(batch.index.device), counts.to(batch.index.device)
        for first in range(0, tokens.shape[1], self.width):
            given = tokens[:, first : first + self.width]  # [b, Q]
            read = torch.cat([batch.last[:, None], given[:, :-1]], dim=1)
            logits = self._guided(read, batch.positions(given.shape[1]))
            batch.commit(Verdict(given, (counts - first).clamp(0, given.shape[1])), logits)
            batch.synchronise(first=True)
        batch.prefilled()

    def caches(self) -> list[tuple[PositionCache, Tensor | None]]:
        """All that keep something of every position, each with its readout's ``shift``."""
        own: list[tuple[PositionCache, Tensor | None]] = [(cache, None) for cache in self.batch.session.caches]
        return own + [(cache, group.state.shift) for group in self.groups for cache in group.state.caches]

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
        if not self.groups:
            return target
        if len(self.groups) == 1:
            return self.groups[0].mix(batch, out, target, step)
        guided = wide(target).clone()
        for group in self.groups:
            if group.sequences:
                index = slice(None) if group.index is None else group.index
                guided[index] = group.mix(batch, out, target, step)
        return guided

    def _extend(self, features: Tensor | None, positions: Tensor) -> None:
        taps = split_taps(features, self.layer_ids)
        if self.drafter is not None:
            tapped = self.drafter.draft.config.target_layer_ids
            self.drafter.extend(torch.cat([taps[i] for i in tapped], dim=-1), positions)
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
    **options: Unpack[CallOptions],
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
    **options: Unpack[CallOptions],
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
