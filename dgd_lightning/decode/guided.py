"""Guided decoding: tokens of ``(1 − β)·target + β·readout``, token by token (the oracle) or several per target forward.

A cycle of the fast loop drafts a block, reads it once with the target, makes the readout's logits at all of its
positions in one go, blends, and commits the prefix that the blend itself would have chosen: argmax by argmax when
greedy, by rejection against the proposal's own distribution otherwise. The output has exactly the slow loop's law.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dgd_lightning.decode.blending import Blend, Schedule, Space, as_schedule
from dgd_lightning.decode.engine import Batch, OnProgress, Request, check_request, choose
from dgd_lightning.decode.noise import Noise
from dgd_lightning.decode.readouts import DraftReadout, Readout, Stretch, split_taps
from dgd_lightning.decode.sampling import probabilities
from dgd_lightning.decode.speculative import Drafter, check_block_size, check_draft, propose
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
    block_size: int | None = None,
    space: Space = "logits",
    candidates: int | None = None,
    plausibility: float | None = None,
    schedule: Schedule | None = None,
    on_progress: OnProgress | None = None,
    noise: Noise | None = None,
) -> list[DecodeOutput]:
    """Decode a batch of prompts with guidance; exact for the guided distribution.

    Args:
        pair: target and draft; a draft may be missing where neither readout nor ``speculative`` needs one.
        prompts, max_new_tokens, temperature, top_k, top_p, stop_token_ids, seed, on_progress, noise:
            as in ``autoregressive_generate``; temperature and filters apply to the blend.
        beta: of all rows, or one per row: several β of one prompt are rows of one batch.
        readout: ``draft``, or any :class:`~dgd_lightning.decode.readouts.Readout`.
        speculative: several tokens per target forward; False decodes token by token, with the same law.
        block_size: K of the proposals, as in ``speculative_generate``.
        space, candidates, plausibility, schedule: see :class:`~dgd_lightning.decode.blending.Blend`.

    Returns:
        B outputs in the order of the prompts.

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
    )
    width = 1
    if speculative:
        width = check_block_size(check_draft(pair).config.block_size, block_size)
    loop = Guided(pair, request, blend, as_readout(readout), width, noise, on_progress)
    while loop.batch.active:
        loop.cycle()
        loop.batch.synchronise()
    return loop.batch.outputs(drafting=speculative)


class Guided:
    """One batch: the target, the readout's reading, and with ``width`` > 1 the draft that proposes."""

    def __init__(
        self,
        pair: Pair,
        request: Request,
        blend: Blend,
        readout: Readout,
        width: int,
        noise: Noise | None,
        on_progress: OnProgress | None,
    ) -> None:
        target = pair.target
        betas = torch.tensor(blend.betas(len(request.lengths)), dtype=torch.float64, device=target.device)
        self.blend, self.betas, self.width, self.request = blend, betas, width, request
        draft = pair.draft
        proposed = tuple(draft.config.target_layer_ids) if width > 1 and draft is not None else ()
        self.proposed = proposed
        self.layer_ids = tuple(dict.fromkeys((*proposed, *readout.layers(pair))))
        self.reading = readout.begin(pair, request, width)
        self.drafter = Drafter(target, draft, request, width) if width > 1 and draft is not None else None
        own = [] if self.drafter is None else [self.drafter.cache]
        self.batch = Batch(
            target,
            request,
            width=width,
            layer_ids=self.layer_ids,
            on_features=self._extend,
            companions=[*own, *self.reading.caches],
            on_select=self._select,
            hold_last=True,
            noise=noise,
            on_progress=on_progress,
        )
        self.reading.ready()
        # The prompts' last tokens are a stretch like any other, which gives the first token.
        first = self._guided(self.batch.last[:, None], self.batch.positions(1))
        tokens = choose(first, request.sampling, self.batch.noise, self.batch.positions(1) + 1)
        self.batch.begin(tokens)

    def cycle(self) -> None:
        """Draft, read, blend, commit what the blend agrees with."""
        batch, sampling = self.batch, self.request.sampling
        positions = batch.positions(self.width)  # [b, K]
        if self.drafter is None:
            tokens = choose(self._guided(batch.last[:, None], positions), sampling, batch.noise, positions + 1)
            batch.commit(Verdict(tokens, torch.ones_like(batch.last)))
            return
        proposal = propose(self.drafter, batch, positions, "rejection")
        guided = self._guided(torch.cat([batch.last[:, None], proposal.tokens], dim=1), positions)  # [b, K, V]
        if proposal.q is None:
            verdict = verify_match(proposal.tokens, guided.argmax(-1))
        else:
            p = probabilities(guided, sampling)
            verdict = verify_rejection(proposal.tokens, proposal.q, p, batch.noise, positions + 1)
        batch.commit(verdict)

    def _guided(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Blended logits [b, Q, V] after tokens [b, Q]: one forward of the target, one of the readout."""
        forward = self.batch.step(tokens, positions)
        self._extend(forward.features, positions)
        longest = self.batch.longest + tokens.shape[1] - 1
        stretch = Stretch(tokens, positions, forward.logits, split_taps(forward.features, self.layer_ids), longest)
        readout = self.reading.logits(stretch)
        step = positions + 1 - self.batch.starts[:, None]  # tokens generated before the one that is chosen
        return self.blend.mix(forward.logits, readout, self.betas, step)

    def _extend(self, features: Tensor, positions: Tensor) -> None:
        taps = split_taps(features, self.layer_ids)
        if self.drafter is not None:
            self.drafter.extend(torch.cat([taps[i] for i in self.proposed], dim=-1), positions)
        self.reading.extend(taps, positions)

    def _select(self, rows: Tensor) -> None:
        self.betas = self.betas[rows]
        self.reading.select(rows)


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
