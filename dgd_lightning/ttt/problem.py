"""The loss of a step and the held-out score of one context, with everything that no step changes computed once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dgd_lightning.draft.attention import KeysValues, choose_attention, joined
from dgd_lightning.draft.lora import DraftLora, LoraLinear
from dgd_lightning.draft.model import DFlashDraft, context_pieces, over_rows
from dgd_lightning.draft.objective import SlotScores, block_ids, decay_weights, default_gamma, slot_scores
from dgd_lightning.metrics.acceptance import tau
from dgd_lightning.pair import Pair
from dgd_lightning.ttt.config import TTTConfig
from dgd_lightning.ttt.context import Blocks, ReadText, Split, draw_blocks, held_out_blocks
from dgd_lightning.ttt.objective import accepted_slots, committed_per_block, dpace_weights
from dgd_lightning.ttt.validation_texts import ValidationTexts
from dgd_lightning.types import HeldOutScore

Reduce = Callable[[Tensor], Tensor]


class DraftContext:
    """The draft's context behind ``text.origin``; whatever comes before the first adapted layer is kept.

    ``fc`` is None where it is not adapted; with ``keys_too`` no step changes keys and values either.
    """

    def __init__(self, draft: DFlashDraft, fc: LoraLinear | None, text: ReadText, *, keys_too: bool) -> None:
        self.draft, self.fc, self.origin = draft, fc, text.origin
        self.features = text.features  # [1, S, F·H], in the target's dtype
        # [1, S, H]: fc's own product, to which each step adds an update, or all that the layers read
        self.base = draft.context(self.features) if fc is None else over_rows(fc.base_layer, self.features, draft.dtype)
        self.keys_values = draft.context_keys_values(self.base, self.origin) if keys_too else None

    def rows(self, first: int, end: int) -> Tensor:
        """[1, end − first, H], what the layers read of positions first … end − 1."""
        part = slice(first - self.origin, end - self.origin)
        if self.fc is None:
            return self.base[:, part]
        base, features = self.base[:, part], self.features[:, part]
        if not self.draft.gradient_checkpointing:
            return self._adapted(base, features)
        again = partial(checkpoint, self._adapted, use_reentrant=False) if torch.is_grad_enabled() else self._adapted
        return torch.cat([again(base[:, at], features[:, at]) for at in context_pieces(end - first)], dim=1)

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
    """What is minimised over the LoRA weights in the pair's draft: the context as the target ``read`` it, and texts.

    The same functions serve `ttt_adapt`, the Lightning module and online rounds.
    """

    def __init__(
        self,
        pair: Pair,
        read: ReadText,
        split: Split,
        config: TTTConfig,
        lora: DraftLora,
        validation_texts: ValidationTexts | None = None,
    ) -> None:
        texts = validation_texts or ValidationTexts([], [])
        held_out, self.trained = texts.held_out, texts.trained
        self.target, self.draft, self.split, self.config = pair.target, pair.require_draft(), split, config
        self.block_size = self.draft.config.block_size
        self.gamma = config.decay_gamma or default_gamma(self.block_size)
        self.attention = choose_attention(config.attention, read.features.device, "ttt.attention")
        self.device, self.has_validation_texts = read.ids.device, bool(held_out)
        self.texts = [read, *self.trained, *held_out]  # draw_blocks numbers the trained ones from 1
        fc, keys_too = lora.layers.get("fc"), not set(lora.modules) & {"fc", "k_proj", "v_proj"}
        with torch.no_grad():
            self.contexts = [DraftContext(self.draft, fc, text, keys_too=keys_too) for text in self.texts]
        self.held_out = held_out_blocks(split, config, self.device, held_out, len(self.trained))
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
        few = max(0, ranks - blocks.anchors.shape[1])  # every rank has a block, be it a dropped one
        anchors, keep = (F.pad(one, (0, few))[:, rank::ranks] for one in (blocks.anchors, blocks.keep))
        mine = blocks._replace(anchors=anchors, keep=keep)
        scores, _, inside = self._scores(mine, with_target=self.config.labels == "target")
        if self.config.weighting == "dpace":
            weights = dpace_weights(scores.confidence, inside, self.config.dpace_alpha)
        else:
            weights = decay_weights(inside, self.gamma, scores.loss.dtype)
        total = weights.sum()
        if reduce is not None:
            total = reduce(total)
        tiny = torch.finfo(weights.dtype).tiny
        return (scores.loss * weights).sum() * ranks / total.clamp_min(tiny)

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
        # all validation texts follow one context
        held = self.contexts[0].held(self.contexts[-1].origin) if self.has_validation_texts else nullcontext()
        with held:
            for one in self.held_out:
                accepted_per_block: list[int] = []
                parts = (x.split(self.config.anchors_per_step, dim=1) for x in (one.anchors, one.keep))
                for anchors, keep in zip(*parts, strict=True):
                    scores, tokens, inside = self._scores(one._replace(anchors=anchors, keep=keep), with_target=True)
                    weights = decay_weights(inside, self.gamma, scores.loss.dtype)
                    assert scores.target_choice is not None
                    accepted = accepted_slots(scores.choice, scores.target_choice, tokens, inside)
                    loss, weight = loss + (scores.loss * weights).sum(), weight + weights.sum()
                    hits, counts = hits + accepted.sum(0), counts + inside.sum(0)  # [K − 1]
                    accepted_per_block += accepted.sum(1).tolist()
                if self.has_validation_texts:
                    walks.append(committed_per_block(accepted_per_block))
        acceptance = [hit / max(1, count) for hit, count in zip(hits.tolist(), counts.tolist(), strict=True)]
        committed = tau(walks).micro if self.has_validation_texts else 1.0 + sum(acceptance)
        return HeldOutScore(step, float(loss / weight), committed, [tau([walk]).micro for walk in walks], acceptance)

    def _scores(self, blocks: Blocks, *, with_target: bool) -> tuple[SlotScores, Tensor, Tensor]:
        """Of slots 1…K−1 of N blocks: scores, the text's own tokens, and whether there is a label, [N, K − 1] each."""
        draft, target, text = self.draft, self.target, self.texts[blocks.text]
        anchors, keep = blocks.anchors[0], blocks.keep[0]  # [N]
        where = anchors[:, None] + torch.arange(1, self.block_size, device=anchors.device)  # [N, K − 1]
        inside = keep[:, None] & (where < blocks.end)
        where = where.clamp(max=blocks.end - 1)
        tokens = text.ids[0][where]
        target_states = None
        if with_target:
            target_states = text.states[0][(where - 1 - text.states_from).clamp(min=0)]  # [N, K − 1, H]
        ids = block_ids(text.ids, blocks.anchors, self.block_size, draft.config.mask_token_id)
        embeddings = target.embed(ids).to(draft.dtype)  # [1, N·K, H]
        hidden = draft.over_context(
            self._context(blocks), embeddings, blocks.anchors, blocks.keep, first=blocks.first, attention=self.attention
        )
        scores = slot_scores(
            hidden[0].unflatten(0, (-1, self.block_size))[:, 1:],  # [N, K − 1, H]
            lambda x: target.lm_head(x.to(target.dtype)),
            tokens,
            inside,
            target_states,
            kind=self.config.loss_kind,
            soft=self.config.labels == "target",
            chunk=self.config.chunk,
        )
        return scores, tokens, inside

    def _context(self, blocks: Blocks) -> Tensor | list[KeysValues]:
        """What the layers read of positions first … end − 1: of the context, and behind it of the validation text."""
        whole, own = self.contexts[0], self.contexts[blocks.text]
        first, middle, end = blocks.first, own.origin, blocks.end
        as_keys = whole.keys_values is not None
        if own is whole or first >= middle:  # a window may begin behind the context
            return own.layers(first, end) if as_keys else own.rows(first, end)
        if as_keys:
            pairs = zip(whole.layers(first, middle), own.layers(middle, end), strict=True)
            return [joined(before, behind) for before, behind in pairs]
        return torch.cat([whole.rows(first, middle), own.rows(middle, end)], dim=1)
