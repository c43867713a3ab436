"""A session: the target on position-addressed caches. It reads prompts, steps, and keeps the rows that are asked for.

It knows nothing of what was committed: positions come from the caller, and a row goes back by naming earlier ones
(what lies beyond them is hidden by the mask until it is overwritten).
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dgd_lightning.decode.call import Request
from dgd_lightning.decode.prefix_cache import cache_for, fill_from_prefixes
from dgd_lightning.target.cache import PositionCache
from dgd_lightning.target.model import Target
from dgd_lightning.types import TargetStep

OnFeatures = Callable[[Tensor, Tensor], None]  # features [B, C, F·H] and positions [B, C] of a chunk of the prompts


class Session:
    """Caches with a row per sequence; at first a sequence per prompt.

    Args:
        target: reads.
        request: the prompts, and what of each has been read already.
        width: most tokens that a cycle may write beyond the last committed one (K).
        layer_ids: layers whose features every forward gives.
        companions: other caches, made for the same prompts, such as the draft's; their rows are kept the same.
    """

    def __init__(
        self,
        target: Target,
        request: Request,
        *,
        width: int,
        layer_ids: Sequence[int] = (),
        companions: Sequence[PositionCache] = (),
    ) -> None:
        self.target, self.request, self.width, self.layer_ids = target, request, width, tuple(layer_ids)
        first = request.prefixes[0]
        own = None if first is None or first.draft_cache is None else first.cache
        self.cache = cache_for(target, len(request.lengths), request.capacity(width), own)
        self.caches = [self.cache, *companions]
        self.began = 0.0  # `time.perf_counter` of when the prefill began

    def prefill(self, on_features: OnFeatures | None = None, *, hold_last: bool = False) -> Tensor | None:
        """Read the prompts, behind their prefixes, whose features are handed on first.

        ``hold_last`` leaves each prompt's last token to the caller's first step.

        Returns:
            [B, V], logits after each prompt; None where nothing was left to read.
        """
        request, self.began = self.request, time.perf_counter()
        fill_from_prefixes(request.prefixes, self.cache, self.layer_ids, on_features)
        starts = [0 if prefix is None else len(prefix.ids) for prefix in request.prefixes]
        ends = [length - int(hold_last) for length in request.lengths]
        rows = [request.ids[row, start:end] for row, (start, end) in enumerate(zip(starts, ends, strict=True))]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.target.device)  # [B, S], still to be read
        if not ids.shape[1]:
            return None
        return self.target.prefill(
            ids,
            [max(len(row), 1) for row in rows],
            self.cache,
            start=starts[0] if len(set(starts)) == 1 else starts,
            layer_ids=self.layer_ids,
            on_features=on_features,
        ).logits

    def step(self, tokens: Tensor, positions: Tensor, *, max_length: int, slots: Tensor | None = None) -> TargetStep:
        """The target's forward on tokens [t, Q] at positions [t, Q].

        Args:
            max_length: host integer above every position and slot.
            slots: [t, Q], spare slots of the cache for a proposal that may be rejected as a whole; see
                :meth:`~dgd_lightning.target.cache.PositionCache.at`.
        """
        return self.target.step(
            tokens, positions, self.cache, max_length=max_length, layer_ids=self.layer_ids, slots=slots
        )

    def select(self, rows: Tensor) -> None:
        """Keep these rows [t], in this order; a row that comes several times is copied."""
        for cache in self.caches:
            cache.select(rows)
