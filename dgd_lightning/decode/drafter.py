"""The draft at work on a batch: its cache of the context, and the blocks that it proposes."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dgd_lightning.checks import check_integer
from dgd_lightning.decode.batch import Batch, choose
from dgd_lightning.decode.call import Request
from dgd_lightning.decode.finite import peaks
from dgd_lightning.decode.prefix_cache import cache_for
from dgd_lightning.decode.random_source import DRAFT
from dgd_lightning.decode.sampling import probabilities
from dgd_lightning.decode.verify import Verdict, verify_match, verify_rejection
from dgd_lightning.draft.model import DFlashDraft
from dgd_lightning.errors import LEAVE_OUT, InputError
from dgd_lightning.pair import Pair
from dgd_lightning.target.cache import PositionCache
from dgd_lightning.target.model import Target

Scheme = Literal["rejection", "exact_match"]


class Proposal(NamedTuple):
    """A drafted continuation of each sequence's anchor token."""

    tokens: Tensor  # [t, K - 1]
    q: Tensor | None  # [t, K - 1, V] what they were drawn from; None where they are the argmax
    first: Tensor | None = None  # [t, V] logits of slot 1: the draft's readout at the anchor


class Blocks:
    """Blocks of the draft behind a cache of the context, with the target's embedding that it borrows."""

    def __init__(self, target: Target, draft: DFlashDraft, cache: PositionCache, size: int) -> None:
        self.target, self.draft, self.cache, self.size = target, draft, cache, size
        self.masks = torch.full((size - 1,), draft.config.mask_token_id, device=target.device)  # [K − 1]

    def extend(self, features: Tensor, positions: Tensor) -> None:
        """Take up the target's features [b, S, F·H] at positions [b, S] as context."""
        self.draft.extend(self.cache, features, positions)

    def hidden(self, tokens: Tensor, anchors: Tensor, longest: int, **options: Any) -> Tensor:
        """`DFlashDraft.block` of blocks that begin with tokens [b, N] at anchors [b, N], none beyond ``longest``."""
        ids = torch.cat([tokens[..., None], self.masks.expand(*tokens.shape, -1)], dim=-1)  # [b, N, K]
        embeddings = self.target.embed(ids.flatten(1))  # [b, N·K, H]
        return self.draft.block(self.cache, embeddings, anchors, longest_anchor=longest, **options)


class Drafter(Blocks):
    """Proposes blocks of ``size`` tokens, K, to the rows of a batch."""

    def __init__(self, target: Target, draft: DFlashDraft, request: Request, size: int) -> None:
        own = None if request.prefixes[0] is None else request.prefixes[0].draft_cache
        super().__init__(target, draft, cache_for(draft, len(request.lengths), request.capacity(size), own), size)

    def logits(self, last: Tensor, anchors: Tensor, longest: int) -> Tensor:
        """[b, K - 1, V] for the positions after each row's token ``last`` [b] at ``anchors`` [b]."""
        hidden = self.hidden(last[:, None], anchors[:, None], longest)  # [b, K, H]
        return self.target.lm_head(hidden[:, 1:])  # slot j is for position anchor + j: no shift


def propose(drafter: Drafter, batch: Batch, positions: Tensor, scheme: Scheme) -> Proposal:
    """Draft K - 1 tokens after each sequence's anchor in one forward; ``positions`` [t, K] are those of the block.

    Only ``rejection`` at a temperature draws them: the likeliest token is the one that a draw of the target's own
    matches most often.
    """
    logits = drafter.logits(batch.sequences(batch.last), batch.sequences(batch.anchors), batch.longest)
    batch.watch("draft", batch.rows(peaks(logits)))
    if batch.request.sampling.greedy or scheme == "exact_match":
        return Proposal(logits.argmax(-1), None, logits[:, 0])
    q = probabilities(logits, batch.request.sampling)  # [t, K - 1, V]
    return Proposal(batch.sequence_random.categorical(q, DRAFT, positions[:, 1:]), q, logits[:, 0])


def judge(batch: Batch, proposal: Proposal | None, logits: Tensor, positions: Tensor) -> Verdict:
    """What rows commit of a proposal, by logits [b, K, V] that choose the tokens at positions [b, K].

    Without a proposal it is the one token that is chosen.
    """
    sampling, random_source = batch.request.sampling, batch.random_source
    if proposal is not None and proposal.q is not None:
        proposed, q, p = batch.rows(proposal.tokens), batch.rows(proposal.q), probabilities(logits, sampling)
        return verify_rejection(proposed, q, p, random_source, positions)
    chosen = choose(logits, sampling, random_source, positions)  # [b, K]
    if proposal is None:
        return Verdict(chosen, torch.ones_like(batch.last))
    return verify_match(batch.rows(proposal.tokens), chosen)


def check_draft(pair: Pair) -> DFlashDraft:
    """The pair's draft, which must be there in the target's dtype."""
    draft = pair.require_draft(hint="give load_pair a draft, or use autoregressive_generate")
    target, kind = pair.target.dtype, getattr(draft, "dtype", pair.target.dtype)  # a stand-in may have none
    if kind != target:
        raise InputError(
            "draft_dtype",
            expected=f"{target}, the target's: decoding reads both in one dtype",
            received=kind,
            hint="leave draft_dtype unset",
        )
    return draft


def check_block_size(pair: Pair, block_size: int | None, name: str = "block_size") -> int:
    """K, the trained size where none is asked for; the draft must be able to have it."""
    trained = check_draft(pair).config.block_size
    if block_size is None:
        return trained
    hint = f"{LEAVE_OUT} for the trained size of {trained}"
    return check_integer(name, block_size, least=2, most=trained, hint=hint)
