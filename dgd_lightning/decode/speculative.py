"""Speculative decoding with a DFlash draft: one block and one verifying target forward a cycle, exact for any draft."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from dgd_lightning.decode.engine import (
    Batch,
    OnProgress,
    Prefix,
    Request,
    capacity,
    check_prefix,
    check_request,
    choose,
)
from dgd_lightning.decode.prefix import PrefixCache
from dgd_lightning.decode.random_source import DRAFT, RandomSource
from dgd_lightning.decode.sampling import probabilities
from dgd_lightning.decode.verify import verify_match, verify_rejection
from dgd_lightning.errors import InputError
from dgd_lightning.types import DecodeOutput

if TYPE_CHECKING:
    from dgd_lightning.draft.model import DFlashDraft
    from dgd_lightning.pair import Pair
    from dgd_lightning.target.cache import PositionCache
    from dgd_lightning.target.model import Target
    from dgd_lightning.ttt.online import OnlineTTT

Scheme = Literal["rejection", "exact_match"]


class Proposal(NamedTuple):
    """A drafted continuation of each row's anchor token."""

    tokens: Tensor  # [B, K - 1]
    q: Tensor | None  # [B, K - 1, V] what they were drawn from; None where they are the argmax
    first: Tensor | None = None  # [B, V] logits of slot 1: what the draft reads out at the anchor


@torch.no_grad()
def speculative_generate(
    pair: Pair,
    prompts: Sequence[Tensor],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_token_ids: Sequence[int] | None = None,
    seed: int | Sequence[int] | None = None,
    num_return_sequences: int = 1,
    block_size: int | None = None,
    scheme: Scheme = "rejection",
    on_progress: OnProgress | None = None,
    online: OnlineTTT | None = None,
    prefix: Prefix | None = None,
    prefixes: Sequence[PrefixCache | None] | None = None,
    random_source: RandomSource | None = None,
) -> list[DecodeOutput]:
    """Decode a batch of prompts with drafted blocks; the output has the distribution of ``autoregressive_generate``.

    Greedy decoding accepts while draft and target have the same argmax. With a temperature, ``rejection`` accepts with
    probability min(1, p/q) (Leviathan et al. 2023, Chen et al. 2023), and ``exact_match`` draws the target's token at
    each slot and accepts while it is the draft's argmax (z-lab/dflash): slower, but the tokens are those that
    ``autoregressive_generate`` gives for the same seed.

    Args:
        pair: target and draft.
        prompts, max_new_tokens, temperature, top_k, top_p, stop_token_ids, seed, num_return_sequences, on_progress,
            prefix, prefixes, random_source: as in ``autoregressive_generate``.
        block_size: K, tokens per verification with the anchor, from 2 to the size the draft was trained with (default).
        scheme: how blocks are verified when the temperature is above 0.
        online: go on adapting the draft to what was verified, and forget it all at the end; for one prompt a call. The
            distribution of the output stays the target's, whatever the draft becomes.

    Returns:
        Outputs in the order of the prompts, ``num_return_sequences`` per prompt.

    Raises:
        InputError: an unusable argument, a pair without a draft or in two dtypes, or a prompt that does not fit.
    """
    draft = check_draft(pair)
    size = check_block_size(draft.config.block_size, block_size)
    if scheme not in get_args(Scheme):
        raise InputError(
            "scheme", expected=" or ".join(get_args(Scheme)), received=repr(scheme), hint="use scheme='rejection'"
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
        num_return_sequences=num_return_sequences,
        prefixes=prefixes,
    )
    if prefix is not None and (online is not None or prefix.draft_cache is None):
        raise InputError(
            "prefix",
            expected="one that the draft has read too, and no online adaptation",
            received="online adaptation" if online is not None else "draft_cache None",
            hint="leave prefix out",
        )
    if online is not None:
        return _online(pair, request, size, scheme, online, random_source, on_progress)
    if prefix is not None:
        check_prefix(prefix, request, size)
    drafter = Drafter(pair.target, draft, request, size, prefix and prefix.draft_cache)
    batch = Batch(
        pair.target,
        request,
        width=size,
        layer_ids=draft.config.target_layer_ids,
        on_features=drafter.extend,
        companions=[drafter.cache],
        prefix=prefix,
        random_source=random_source,
        on_progress=on_progress,
    )
    while batch.active:
        # Rejected positions are written too: they lie at or beyond the next anchor, which hides them until overwritten.
        drafter.extend(*cycle(drafter, batch, size, scheme))
        batch.synchronise()
    return batch.outputs(drafts=1)


class Verified(NamedTuple):
    """What the target's forward on a block tells the draft."""

    features: Tensor  # [b, K, F·H]
    positions: Tensor  # [b, K]


def cycle(drafter: Drafter, batch: Batch, size: int, scheme: Scheme) -> Verified:
    """Draft a block, let the target verify it, commit what agreed."""
    positions = batch.positions(size)  # [b, K]
    proposal = propose(drafter, batch, positions, scheme)
    step = batch.step(torch.cat([batch.last[:, None], proposal.tokens], dim=1), positions)
    if proposal.q is not None:
        p = probabilities(step.logits, batch.request.sampling)  # [b, K, V]
        verdict = verify_rejection(proposal.tokens, proposal.q, p, batch.random_source, positions + 1)
    else:
        target_tokens = choose(step.logits, batch.request.sampling, batch.random_source, positions + 1)  # [b, K]
        verdict = verify_match(proposal.tokens, target_tokens)
    batch.commit(verdict)
    return Verified(step.features, positions)


def _online(
    pair: Pair,
    request: Request,
    size: int,
    scheme: Scheme,
    online: OnlineTTT,
    random_source: RandomSource | None,
    on_progress: OnProgress | None,
) -> list[DecodeOutput]:
    """The loop above for one prompt, with rounds of adaptation between its cycles."""
    assert pair.draft is not None
    if len(request.rows) > 1:
        raise InputError(
            "online",
            expected="one row a call: what one row teaches would change the others",
            received=f"{len(request.rows)} rows",
            hint="call once per prompt",
        )
    fit, prompt = online.begin(pair, capacity(request, size)), request.lengths[0]
    try:
        drafter = Drafter(pair.target, pair.draft, request, size)
        batch = Batch(
            pair.target,
            request,
            width=size,
            layer_ids=fit.layer_ids,
            on_features=lambda taps, positions: drafter.extend(fit.observe(taps, positions), positions),
            companions=[drafter.cache],
            random_source=random_source,
            on_progress=on_progress,
        )
        while batch.active:
            taps, positions = cycle(drafter, batch, size, scheme)
            drafter.extend(fit.observe(taps, positions), positions)
            batch.synchronise()
            read = batch.ends[0]  # positions before the anchor: the target has read them
            if batch.active and fit.due(read - prompt):
                ids = torch.cat([request.ids[0].to(batch.tokens.device), batch.tokens[0]])[:read]
                features = fit.adapt(ids, prompt)
                if fit.moves_context:  # keys and values made before the round are stale
                    drafter.extend(features, torch.arange(read, device=ids.device)[None])
        return batch.outputs(drafts=1)
    finally:
        fit.close()


class Drafter:
    """The draft, its cache of the context, and the target's embedding and head that it borrows."""

    def __init__(
        self, target: Target, draft: DFlashDraft, request: Request, size: int, cache: PositionCache | None = None
    ) -> None:
        self.target, self.draft = target, draft
        self.cache = draft.new_cache(len(request.lengths), capacity(request, size)) if cache is None else cache
        masks = torch.full((len(request.rows), size - 1), draft.config.mask_token_id, device=target.device)
        self.masks = target.embed(masks)  # [B, K - 1, H]

    def extend(self, features: Tensor, positions: Tensor) -> None:
        """Take up the target's features [b, S, F·H] at positions [b, S] as context."""
        self.draft.extend(self.cache, features, positions)

    def logits(self, last: Tensor, anchors: Tensor, longest: int) -> Tensor:
        """[b, K - 1, V] for the positions after each row's token ``last`` [b] at ``anchors`` [b]."""
        anchor = self.target.embed(last[:, None])  # [b, 1, H]
        embeddings = torch.cat([anchor, self.masks[: len(last)]], dim=1)  # [b, K, H]
        hidden = self.draft.block(self.cache, embeddings, anchors[:, None], longest_anchor=longest)  # [b, K, H]
        return self.target.lm_head(hidden[:, 1:])  # slot j stands for position anchor + j: no shift


def propose(drafter: Drafter, batch: Batch, positions: Tensor, scheme: Scheme) -> Proposal:
    """Draft K - 1 tokens after each sequence's anchor in one forward; ``positions`` [t, K] are those of the block.

    Only ``rejection`` at a temperature draws them: the likeliest token is the one that a draw of the target's own
    matches most often.
    """
    logits = drafter.logits(batch.sequences(batch.last), batch.sequences(batch.anchors), batch.longest)  # [t, K - 1, V]
    if batch.request.sampling.greedy or scheme == "exact_match":
        return Proposal(logits.argmax(-1), None, logits[:, 0])
    q = probabilities(logits, batch.request.sampling)
    return Proposal(batch.sequence_random.categorical(q, DRAFT, positions[:, 1:]), q, logits[:, 0])


def check_draft(pair: Pair) -> DFlashDraft:
    """The pair's draft.

    Raises:
        InputError: there is none, or it has another dtype than the target.
    """
    if pair.draft is None:
        raise InputError(
            "pair",
            expected="a pair with a draft",
            received="a target alone",
            hint="give load_pair a draft, or use autoregressive_generate",
        )
    target, kind = pair.target.dtype, getattr(pair.draft, "dtype", pair.target.dtype)  # a stand-in may have none
    if kind != target:
        raise InputError(
            "draft_dtype",
            expected=f"{target}, the target's: decoding reads both in one dtype",
            received=kind,
            hint="leave draft_dtype unset",
        )
    return pair.draft


def check_block_size(trained: int, block_size: int | None) -> int:
    """K, the trained size where none is asked for.

    Raises:
        InputError: one that the draft can't have.
    """
    if block_size is None:
        return trained
    if isinstance(block_size, bool) or not isinstance(block_size, int) or not 2 <= block_size <= trained:
        raise InputError(
            "block_size",
            expected=f"an integer from 2 to {trained}, the size the draft was trained with",
            received=repr(block_size),
            hint="leave it out for the trained size; for no drafting use autoregressive_generate",
        )
    return block_size
