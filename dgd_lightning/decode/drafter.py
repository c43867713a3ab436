"""The draft at work on a batch: its cache of the context, and the blocks that it proposes."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dgd_lightning.checks import check_integer
from dgd_lightning.decode.batch import Batch
from dgd_lightning.decode.call import Request
from dgd_lightning.decode.prefix_cache import check_room
from dgd_lightning.decode.random_source import DRAFT
from dgd_lightning.decode.sampling import probabilities
from dgd_lightning.draft.model import DFlashDraft
from dgd_lightning.errors import InputError
from dgd_lightning.pair import Pair
from dgd_lightning.target.model import Target

Scheme = Literal["rejection", "exact_match"]


class Proposal(NamedTuple):
    """A drafted continuation of each sequence's anchor token."""

    tokens: Tensor  # [t, K - 1]
    q: Tensor | None  # [t, K - 1, V] what they were drawn from; None where they are the argmax
    first: Tensor | None = None  # [t, V] logits of slot 1: the draft's readout at the anchor


class Drafter:
    """The draft, its cache of the context, and the target's embedding and head that it borrows.

    Args:
        size: K of its blocks.
    """

    def __init__(self, target: Target, draft: DFlashDraft, request: Request, size: int) -> None:
        self.target, self.draft = target, draft
        own, need = request.prefixes[0], request.capacity(size)
        in_place = None if own is None else own.draft_cache
        self.cache = draft.new_cache(len(request.lengths), need) if in_place is None else check_room(in_place, need)
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
        return self.target.lm_head(hidden[:, 1:])  # slot j is for position anchor + j: no shift


def propose(drafter: Drafter, batch: Batch, positions: Tensor, scheme: Scheme) -> Proposal:
    """Draft K - 1 tokens after each sequence's anchor in one forward; ``positions`` [t, K] are those of the block.

    Only ``rejection`` at a temperature draws them: the likeliest token is the one that a draw of the target's own
    matches most often.
    """
    logits = drafter.logits(batch.sequences(batch.last), batch.sequences(batch.anchors), batch.longest)
    if batch.request.sampling.greedy or scheme == "exact_match":
        return Proposal(logits.argmax(-1), None, logits[:, 0])
    q = probabilities(logits, batch.request.sampling)  # [t, K - 1, V]
    return Proposal(batch.sequence_random.categorical(q, DRAFT, positions[:, 1:]), q, logits[:, 0])


def check_draft(pair: Pair) -> DFlashDraft:
    """The pair's draft.

    Raises:
        InputError: there is none, or it has another dtype than the target.
    """
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


def check_block_size(pair: Pair, block_size: int | None) -> int:
    """K, the trained size where none is asked for.

    Raises:
        InputError: one that the draft can't have.
    """
    trained = check_draft(pair).config.block_size
    if block_size is None:
        return trained
    return check_integer(
        "block_size", block_size, least=2, most=trained, hint=f"leave it out for the trained size of {trained}"
    )
