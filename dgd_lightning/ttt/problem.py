"""The loss of a step and the held-out score of one context, with everything that no step changes computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dgd_lightning.draft.attention import KeysValues, choose_attention
from dgd_lightning.draft.lora import DraftLora, LoraLinear
from dgd_lightning.draft.model import DFlashDraft, context_pieces, over_rows
from dgd_lightning.draft.objective import block_ids, default_gamma
from dgd_lightning.metrics.acceptance import tau
from dgd_lightning.pair import Pair
from dgd_lightning.ttt.config import TTTConfig
from dgd_lightning.ttt.context import (
    Blocks,
    ReadContext,
    Split,
    draw_blocks,
    held_out_span,
    held_out_text,
)
from dgd_lightning.ttt.objective import (
    SlotScores,
    accepted_slots,
    committed_per_block,
    decay_weights,
    dpace_weights,
    slot_scores,
)
from dgd_lightning.ttt.validation_texts import ValidationTexts
from dgd_lightning.types import HeldOutScore

Reduce = Callable[[Tensor], Tensor]


class Labelled(NamedTuple):
    """Labels of N blocks' slots 1…K−1."""

    tokens: Tensor  # [N, K − 1]
    inside: Tensor  # [N, K − 1] bool, False: no label there
    states: Tensor | None  # [N, K − 1, H], the target's hidden states before the slots


class Text(NamedTuple):
    """The context (0), or a validation text, of which only what follows the context is kept."""

    ids: Tensor  # [1, L], from position 0
    states: Tensor  # [1, …, H], the target's last hidden states from position ``states_from`` on
    states_from: int
    draft_context: DraftContext


class DraftContext:
    """The draft's context of positions ``origin …`` of a text; whatever comes before the first adapted layer is kept.

    Args:
        draft: with LoRA layers or without.
        fc: the adapted ``fc``, or None where it is not adapted.
        features: [1, S, F·H].
        origin: position of the first one.
        keys_too: no step changes keys and values either.
    """

    def __init__(
        self, draft: DFlashDraft, fc: LoraLinear | None, features: Tensor, origin: int, *, keys_too: bool
    ) -> None:
        self.draft, self.fc, self.origin = draft, fc, origin
        self.features = features  # [1, S, F·H], in the target's dtype
        # [1, S, H]: fc's own product, to which each step adds an update, or all that the layers read
        self.base = draft.context(features) if fc is None else over_rows(fc.base_layer, features, draft.dtype)
        self.keys_values = draft.context_keys_values(self.base, origin) if keys_too else None

    def rows(self, first: int, end: int) -> Tensor:
        """[1, end − first, H], what the layers read of positions first … end − 1."""
        part = slice(first - self.origin, end - self.origin)
        if self.fc is None:
            return self.base[:, part]
        base, features = self.base[:, part], self.features[:, part]
        if not self.draft.gradient_checkpointing:
            return self._adapted(base, features)
        pieces = [(base[:, at], features[:, at]) for at in context_pieces(end - first)]
        if not torch.is_grad_enabled():
            return torch.cat([self._adapted(*piece) for piece in pieces], dim=1)
        return torch.cat([checkpoint(self._adapted, *piece, use_reentrant=False) for piece in pieces], dim=1)

    def _adapted(self, base: Tensor, features: Tensor) -> Tensor:
        assert self.fc is not None
        return self.draft.hidden_norm(self.fc.updated(base, features))

    def layers(self, first: int, end: int) -> list[KeysValues]:
        """The same as keys and values of every layer, [1, kv heads, end − first, D] each."""
        if self.keys_values is None:
            return self.draft.context_keys_values(self.rows(first, end), first)
        part = slice(first - self.origin, end - self.origin)
        return [(keys[:, :, part], values[:, :, part]) for keys, values in self.keys_values]

    @contextmanager
    def held(self, end: int) -> Iterator[None]:
        """Keys and values of all positions before ``end`` are made once and serve all forwards of the block."""
        if self.keys_values is not None:
            yield
            return
        self.keys_values = self.layers(self.origin, end)
        try:
            yield
        finally:
            self.keys_values = None


class AdaptProblem:
    """What is minimised over the LoRA weights: the same functions serve `ttt_adapt` and the Lightning module.

    Args:
        pair: with the draft that holds ``lora``.
        read: the context, read once.
        split: its training part and its held-out part.
        config: what to do.
        lora: the layers in the draft.
        validation_texts: what the target wrote behind the context.
    """

    def __init__(
        self,
        pair: Pair,
        read: ReadContext,
        split: Split,
        config: TTTConfig,
        lora: DraftLora,
        validation_texts: ValidationTexts | None = None,
    ) -> None:
        held_out, trained, _ = validation_texts or ValidationTexts([], [])
        self.target, self.draft, self.split = pair.target, pair.require_draft(), split
        self.config, self.trained = config, trained
        self.block_size = self.draft.config.block_size
        self.gamma = config.decay_gamma or default_gamma(self.block_size)
        self.attention = choose_attention(config.attention, read.features.device, "ttt.attention")
        self.device, self.has_validation_texts = read.ids.device, bool(held_out)
        fc = lora.layers.get("fc")
        keys_too = not set(config.modules) & {"fc", "k_proj", "v_proj"}
        self.texts: list[Text] = []
        with torch.no_grad():
            whole = DraftContext(self.draft, fc, read.features, 0, keys_too=keys_too)
            self.texts.append(Text(read.ids, read.states, read.start, whole))
            for one in (*trained, *held_out):  # draw_blocks numbers the trained ones from 1
                draft_context = DraftContext(self.draft, fc, one.features, one.origin, keys_too=keys_too)
                self.texts.append(Text(one.ids, one.states, one.origin, draft_context))
        numbered = enumerate(held_out, 1 + len(trained))
        self.held_out = [held_out_text(one, number, config, self.device) for number, one in numbered]
        if not held_out and (span := held_out_span(split, config, self.device)) is not None:
            self.held_out = [span]
        self.draft.gradient_checkpointing = config.gradient_checkpointing

    def loss(self, step: int, *, rank: int = 0, ranks: int = 1, reduce: Reduce | None = None) -> Tensor:
        """Σ w·loss / Σ w over the blocks of a step.

        Args:
            step: which blocks are drawn.
            rank, ranks: with several, each takes every ``ranks``-th block; the mean over the ranks of what they return
                (what DDP does to gradients) is the loss of all blocks.
            reduce: sums a number over the ranks.
        """
        blocks = draw_blocks(self.split, self.config, step, self.device, self.trained)
        mine = blocks._replace(anchors=blocks.anchors[:, rank::ranks], keep=blocks.keep[:, rank::ranks])
        labels = self._labels(mine)
        scores = self._scores(mine, labels)
        if self.config.weighting == "dpace":
            confidence = scores.confidence.view_as(labels.inside)
            weights = dpace_weights(confidence, labels.inside, self.config.dpace_alpha)
        else:
            weights = decay_weights(labels.inside, self.gamma)
        total = weights.sum()
        if reduce is not None:
            total = reduce(total)
        tiny = torch.finfo(weights.dtype).tiny
        return (scores.loss.view_as(weights) * weights).sum() * ranks / total.clamp_min(tiny)

    @torch.no_grad()
    def score(self, step: int) -> HeldOutScore | None:
        """What is held out under the weights of now, with DFlash's static weights; None where nothing is.

        τ on validation texts is that of decoding them: their blocks are walked as the decoder would. Along the
        context's end it is the mean over the blocks there.
        """
        if not self.held_out:
            return None
        loss, weight = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        hits, counts = torch.zeros(2, self.block_size - 1, device=self.device, dtype=torch.long)
        walks = list[list[int]]()  # tokens per verification, validation text by validation text
        whole = self.texts[0].draft_context  # all validation texts follow one context
        with whole.held(self.texts[-1].draft_context.origin) if self.has_validation_texts else nullcontext():
            for one in self.held_out:
                accepted_per_block: list[int] = []
                for part in _parts(one, self.config.anchors_per_step):
                    labels = self._labels(part, with_target=True)
                    scores = self._scores(part, labels)
                    weights = decay_weights(labels.inside, self.gamma)
                    shape = labels.inside.shape
                    assert scores.target_choice is not None
                    accepted = accepted_slots(
                        scores.choice.view(shape), scores.target_choice.view(shape), labels.tokens, labels.inside
                    )
                    loss = loss + (scores.loss.view_as(weights) * weights).sum()
                    weight = weight + weights.sum()
                    hits, counts = hits + accepted.sum(0), counts + labels.inside.sum(0)  # [K − 1]
                    accepted_per_block += accepted.sum(1).tolist()
                if self.has_validation_texts:
                    walks.append(committed_per_block(accepted_per_block))
        acceptance = [hit / max(1, count) for hit, count in zip(hits.tolist(), counts.tolist(), strict=True)]
        committed = tau(walks).micro if self.has_validation_texts else 1.0 + sum(acceptance)
        return HeldOutScore(step, float(loss / weight), committed, [tau([walk]).micro for walk in walks], acceptance)

    def _labels(self, blocks: Blocks, *, with_target: bool = False) -> Labelled:
        """Labels of the blocks; the target's states only where the loss or the score asks for them."""
        text, anchors, keep = self.texts[blocks.text], blocks.anchors[0], blocks.keep[0]  # [N]
        slots = torch.arange(1, self.block_size, device=anchors.device)  # [K − 1]
        where = anchors[:, None] + slots  # [N, K − 1]
        inside = keep[:, None] & (where < blocks.label_end)
        where = where.clamp(max=blocks.label_end - 1)
        states = None
        if with_target or self.config.labels == "target":
            before = (where - 1 - text.states_from).clamp(min=0)
            states = text.states[0][before]  # [N, K − 1, H]
        return Labelled(text.ids[0][where], inside, states)

    def _scores(self, blocks: Blocks, labels: Labelled) -> SlotScores:
        """Scores of all slots 1…K−1 of the blocks, [N·(K − 1)] each."""
        draft, target = self.draft, self.target
        ids = block_ids(self.texts[blocks.text].ids, blocks.anchors, self.block_size, draft.config.mask_token_id)
        embeddings = target.embed(ids).to(draft.dtype)  # [1, N·K, H]
        hidden = draft.over_context(
            self._context(blocks), embeddings, blocks.anchors, blocks.keep, first=blocks.first, attention=self.attention
        )
        states = hidden[0].unflatten(0, (-1, self.block_size))[:, 1:].flatten(0, 1)  # [N·(K − 1), H]
        return slot_scores(
            states,
            lambda x: target.lm_head(x.to(target.dtype)),
            labels.tokens.flatten(),
            None if labels.states is None else labels.states.flatten(0, 1),
            kind=self.config.loss_kind,
            soft=self.config.labels == "target",
            chunk=self.config.chunk,
        )

    def _context(self, blocks: Blocks) -> Tensor | list[KeysValues]:
        """What the layers read of positions first … end − 1: of the context, and behind it of the validation text."""
        whole, own = self.texts[0].draft_context, self.texts[blocks.text].draft_context
        alone = own is whole or blocks.first >= own.origin  # a window may begin behind the context
        if whole.keys_values is not None:
            if alone:
                return own.layers(blocks.first, blocks.end)
            before, behind = whole.layers(blocks.first, own.origin), own.layers(own.origin, blocks.end)
            return [
                (torch.cat([keys, more_keys], dim=2), torch.cat([values, more_values], dim=2))
                for (keys, values), (more_keys, more_values) in zip(before, behind, strict=True)
            ]
        if alone:
            return own.rows(blocks.first, blocks.end)
        return torch.cat([whole.rows(blocks.first, own.origin), own.rows(own.origin, blocks.end)], dim=1)


def _parts(blocks: Blocks, count: int) -> list[Blocks]:
    """At most ``count`` blocks at a time."""
    pieces = zip(blocks.anchors.split(count, dim=1), blocks.keep.split(count, dim=1), strict=True)
    return [blocks._replace(anchors=anchors, keep=keep) for anchors, keep in pieces]
