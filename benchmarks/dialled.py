"""A draft with dialled acceptance: it pays for the real draft's forward, then proposes the target's token at set odds.

Greedy decoding only. The target's tokens are handed in, so acceptance does not depend on training, and what a cycle
costs beside its two forwards is measured apart from how well the draft guesses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dgd_lightning.draft.model import DFlashDraft
from dgd_lightning.target.cache import PositionCache
from dgd_lightning.target.model import Target


class RowCache(PositionCache):
    """A cache that remembers which of the original rows it still holds."""

    def __init__(self, num_layers: int, batch: int, capacity: int, device: torch.device) -> None:
        super().__init__(num_layers, batch, capacity)
        self.rows = torch.arange(batch, device=device)

    def select(self, rows: Any) -> None:
        super().select(rows)
        self.rows = self.rows[rows]


class DialledDraft:
    """Takes the place of a DFlashDraft in decoding.

    Args:
        draft: the real draft, whose forward is run and paid for.
        target: lends its head; a proposal is made by a hidden state that points at the token's row of it.
        texts: each row's prompt and greedy continuation.
        acceptance: probability that a proposal is the target's token, independently per position.
        seed: of the coins.
    """

    def __init__(
        self, draft: DFlashDraft, target: Target, texts: Sequence[Sequence[int]], acceptance: float, seed: int = 0
    ) -> None:
        self.draft, self.config = draft, draft.config
        width = max(map(len, texts)) + draft.config.block_size
        truth = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts])  # [B, P]
        wrong = torch.rand(truth.shape, generator=torch.Generator().manual_seed(seed)) >= acceptance
        self.proposals = ((truth + wrong) % target.vocab_size).to(target.device)  # [B, P]
        head = target.model.get_output_embeddings().weight  # [V, H]
        # A unit vector along a token's row has its largest product with that row unless another row is much longer.
        self.pointers = head / head.norm(dim=-1, keepdim=True)
        self.slots = torch.arange(1, draft.config.block_size, device=target.device)  # [K - 1]

    def new_cache(self, batch: int, capacity: int) -> PositionCache:
        """As the draft's, remembering rows."""
        return RowCache(self.config.num_layers, batch, capacity, self.slots.device)

    def extend(self, cache: PositionCache, features: Tensor, positions: Tensor) -> None:
        """The real draft's."""
        self.draft.extend(cache, features, positions)

    def block(self, cache: RowCache, embeddings: Tensor, anchors: Tensor, *, longest_anchor: int) -> Tensor:
        """The real draft's forward [B, K, H], its slots 1 … K - 1 replaced by pointers at the proposals."""
        hidden = self.draft.block(cache, embeddings, anchors, longest_anchor=longest_anchor)
        at = anchors + self.slots[: embeddings.shape[1] - 1]  # [B, K - 1]
        at = at.clamp(max=self.proposals.shape[1] - 1)  # rows that are done may be at the very end
        tokens = self.proposals[cache.rows[:, None], at]
        return torch.cat([hidden[:, :1], self.pointers[tokens]], dim=1)
