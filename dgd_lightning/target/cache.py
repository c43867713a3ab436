"""Position-addressed key/value cache: written at each row's own absolute positions, never cropped or moved."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from dgd_lightning.errors import InputError


class _Cursor:
    """Where the next forward writes ([B, Q] positions) and how much of the buffers it reads; shared by the layers."""

    def __init__(self) -> None:
        self.positions: Tensor | None = None
        self.max_length = 0


class PositionLayer(CacheLayerMixin):
    """One layer's buffers, [B, heads, capacity, D], allocated (zeroed) at the first write on that layer's device.

    Zeros, not uninitialised memory: a hidden slot has attention weight 0, and 0 · NaN would be NaN.
    """

    is_compileable = True
    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, cursor: _Cursor, batch: int, capacity: int) -> None:
        super().__init__()
        self.cursor, self.batch, self.capacity = cursor, batch, capacity

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        heads, width = key_states.shape[1], key_states.shape[-1]
        shape = (self.batch, heads, self.capacity)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = torch.zeros(*shape, width, dtype=self.dtype, device=self.device)
        self.values = torch.zeros(*shape, value_states.shape[-1], dtype=value_states.dtype, device=self.device)
        self.is_initialized = True

    def write(self, key_states: Tensor, value_states: Tensor) -> None:
        """Put [B, heads, Q, D] at the cursor's positions [B, Q]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.cursor.positions is not None, "call PositionCache.at before a forward"
        index = self.cursor.positions.to(self.device)[:, None, :, None]  # [B, 1, Q, 1]
        self.keys.scatter_(2, index.expand_as(key_states), key_states.to(self.dtype))
        self.values.scatter_(2, index.expand_as(value_states), value_states.to(self.values.dtype))

    def view(self) -> tuple[Tensor, Tensor]:
        """Keys and values of positions 0…max_length−1, [B, heads, L, D] each, no copy."""
        end = self.cursor.max_length
        return self.keys[:, :, :end], self.values[:, :, :end]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        self.write(key_states, value_states)
        return self.view()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cursor.max_length, 0

    def get_seq_length(self) -> int:
        return self.cursor.max_length

    def get_max_length(self) -> int:
        return self.capacity

    def fill(self, rows: list[int], source: PositionLayer, length: int) -> None:
        """Copy positions 0…length−1 of the only row of another layer, [1, heads, capacity', D], into these rows."""
        if not self.is_initialized:
            self.lazy_initialization(source.keys, source.values)
        self.keys[rows, :, :length] = source.keys[:, :, :length]
        self.values[rows, :, :length] = source.values[:, :, :length]

    def select(self, rows: Tensor) -> None:
        self.batch = rows.shape[0]
        if self.is_initialized:
            rows = rows.to(self.device)
            self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)


class PositionCache(Cache):
    """Preallocated keys and values of every layer, addressed by absolute position.

    What a row has stored beyond its own length is hidden by the caller's mask (``key position ≤ query position``) and
    overwritten by the next write, so rows of a batch may advance by different amounts and nothing is rolled back.

    Args:
        num_layers: layers of the network that writes.
        batch: rows.
        capacity: positions per row; fixed.
    """

    def __init__(self, num_layers: int, batch: int, capacity: int) -> None:
        self._cursor = _Cursor()
        self.slots = [PositionLayer(self._cursor, batch, capacity) for _ in range(num_layers)]
        super().__init__(layers=list(self.slots))
        self.capacity = capacity
        self.batch = batch

    @property
    def max_length(self) -> int:
        """Keys that the next forward reads: positions 0…max_length−1."""
        return self._cursor.max_length

    def at(self, positions: Tensor, *, max_length: int | None = None) -> None:
        """Set where the next forward writes, and how far it reads.

        Args:
            positions: [B, Q], distinct within a row.
            max_length: one more than the largest position read or written, known on the host (asking the device would
                stall it). None leaves the reading length alone (for writes without a read).

        Raises:
            InputError: the capacity does not hold ``max_length`` positions, or the rows differ.
        """
        if positions.shape[0] != self.batch:
            raise InputError(
                "positions",
                expected=f"{self.batch} rows, as the cache",
                received=positions.shape[0],
                hint="call cache.select(rows) when rows are dropped",
            )
        if max_length is not None:
            if max_length > self.capacity:
                raise InputError(
                    "max_length",
                    expected=f"at most the cache's capacity of {self.capacity} positions",
                    received=max_length,
                    hint="allocate new_cache(batch, capacity) for prompt + new tokens + block size",
                )
            self._cursor.max_length = max_length
        self._cursor.positions = positions

    def fill(self, rows: Sequence[int], source: PositionCache, length: int) -> None:
        """Copy positions 0…length−1 of a cache of one row, for the same network, into these rows."""
        for slot, other in zip(self.slots, source.slots, strict=True):
            slot.fill(list(rows), other, length)

    def select(self, rows: Tensor | Sequence[int]) -> None:
        """Keep these rows only, in this order (finished rows are dropped so)."""
        index = torch.as_tensor(rows, dtype=torch.long)
        self.batch = index.shape[0]
        for slot in self.slots:
            slot.select(index)
