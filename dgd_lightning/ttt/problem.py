"""The loss of a step and the held-out score of one context, with everything that no step changes computed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dgd_lightning.draft.objective import block_ids, default_gamma
from dgd_lightning.pair import Pair
from dgd_lightning.ttt.config import TTTConfig
from dgd_lightning.ttt.context import Blocks, ReadContext, Split, draw_blocks, held_out_blocks
from dgd_lightning.ttt.lora import NAME, DraftLora, factors
from dgd_lightning.ttt.objective import SlotScores, accepted_slots, decay_weights, dpace_weights, slot_scores
from dgd_lightning.types import HeldOutScore

Reduce = Callable[[Tensor], Tensor]


class Labelled(NamedTuple):
    """Labels of N blocks' slots 1…K−1."""

    tokens: Tensor  # [N, K − 1]
    inside: Tensor  # [N, K − 1] bool, False: no label there
    states: Tensor | None  # [N, K − 1, H], the target's hidden states before the slots


class AdaptProblem:
    """What is minimised over the LoRA weights: the same functions serve `ttt_adapt` and the Lightning module.

    Args:
        pair: with the draft that holds ``lora``.
        read: the context, read once.
        split: its training part and its held-out part.
        config: what to do.
        lora: the layers in the draft.
    """

    def __init__(self, pair: Pair, read: ReadContext, split: Split, config: TTTConfig, lora: DraftLora) -> None:
        assert pair.draft is not None
        self.target, self.draft, self.read, self.split, self.config = pair.target, pair.draft, read, split, config
        self.block_size = pair.draft.config.block_size
        self.gamma = config.decay_gamma or default_gamma(self.block_size)
        self.attention: Literal["sdpa", "flex"] = "flex" if read.features.is_cuda else "sdpa"
        self.held_out = held_out_blocks(split, config, read.ids.device)
        adapted = set(config.modules)
        with torch.no_grad():
            # Whatever lies before the first adapted layer is the same in every step.
            features = read.features.to(self.draft.dtype)
            self.fc = lora.layers.get("fc")
            self.fc_base = None if self.fc is None else self.fc.get_base_layer()(features)  # [1, S, H]
            self.context = self.draft.context(features) if self.fc is None else None  # [1, S, H]
            self.keys_values = None
            if self.context is not None and not adapted & {"k_proj", "v_proj"}:
                self.keys_values = self.draft.context_keys_values(self.context)
        self.draft.gradient_checkpointing = config.gradient_checkpointing

    def loss(self, step: int, *, rank: int = 0, ranks: int = 1, reduce: Reduce | None = None) -> Tensor:
        """Σ w·loss / Σ w over the blocks of a step.

        Args:
            step: which blocks are drawn.
            rank, ranks: with several, each takes every ``ranks``-th block; the mean over the ranks of what they return
                (what DDP does to gradients) is the loss of all blocks.
            reduce: sums a number over the ranks.
        """
        blocks = draw_blocks(self.split, self.config, step, self.read.ids.device)
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
        """The held-out span under the weights of now, with DFlash's static weights; None where nothing is held out."""
        if self.held_out is None:
            return None
        labels = self._labels(self.held_out, with_target=True)
        scores = self._scores(self.held_out, labels)
        weights = decay_weights(labels.inside, self.gamma)
        loss = (scores.loss.view_as(weights) * weights).sum() / weights.sum()
        shape = labels.inside.shape
        assert scores.target_choice is not None
        accepted = accepted_slots(
            scores.choice.view(shape), scores.target_choice.view(shape), labels.tokens, labels.inside
        )
        rates = accepted.double().mean(0)  # [K − 1]
        return HeldOutScore(step, float(loss), 1.0 + float(rates.sum()), rates.tolist())

    def _labels(self, blocks: Blocks, *, with_target: bool = False) -> Labelled:
        """Labels of the blocks; the target's states only where the loss or the score asks for them."""
        anchors, keep = blocks.anchors[0], blocks.keep[0]  # [N]
        slots = torch.arange(1, self.block_size, device=anchors.device)  # [K − 1]
        where = anchors[:, None] + slots  # [N, K − 1]
        inside = keep[:, None] & (where < blocks.label_end)
        where = where.clamp(max=blocks.label_end - 1)
        states = None
        if with_target or self.config.labels == "target":
            before = (where - 1 - self.read.start).clamp(min=0)
            states = self.read.states[0][before]  # [N, K − 1, H]
        return Labelled(self.read.ids[0][where], inside, states)

    def _scores(self, blocks: Blocks, labels: Labelled) -> SlotScores:
        """Scores of all slots 1…K−1 of the blocks, [N·(K − 1)] each."""
        draft, target = self.draft, self.target
        ids = block_ids(self.read.ids, blocks.anchors, self.block_size, draft.config.mask_token_id)
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

    def _context(self, blocks: Blocks) -> Tensor | list[tuple[Tensor, Tensor]]:
        """What the layers read of positions first … end − 1, from what was kept."""
        part = slice(blocks.first, blocks.end)
        if self.keys_values is not None:
            return [(keys[:, :, part], values[:, :, part]) for keys, values in self.keys_values]
        if self.context is not None:
            return self.context[:, part]
        assert self.fc is not None
        assert self.fc_base is not None
        first, second = factors(self.fc)
        base, features = self.fc_base[:, part], self.read.features[:, part].to(first.dtype)
        # PEFT's own order of operations, so that the numbers are those of the layer itself
        update = F.linear(F.linear(features, first), second) * self.fc.scaling[NAME]
        return self.draft.hidden_norm((base + update).to(base.dtype))
