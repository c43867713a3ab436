"""Position-addressed key/value cache: each row's text is stored at its own absolute positions, never cropped.

A *slot* is a place in the buffers. Normally slot p holds position p, and no table says so. A proposal that may be
rejected as a whole can be written into spare slots instead: then the cache knows the position of every slot, until the
proposal is moved into place or forgotten.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from dgd_lightning.errors import InputError

NOWHERE = torch.iinfo(torch.long).max  # the position of a slot that no query may see


class _Cursor:
    """Where the next forward writes ([B, Q] slots) and how much of the buffers it reads; shared by the layers."""

    slots: Tensor | None = None
    max_length = 0


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
        shape = (self.batch, key_states.shape[1], self.capacity)
        self.device = key_states.device
        self.keys, self.values = (x.new_zeros(*shape, x.shape[-1]) for x in (key_states, value_states))
        self.is_initialized = True

    def write(self, key_states: Tensor, value_states: Tensor) -> None:
        """Put [B, heads, Q, D] into the cursor's slots [B, Q]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.cursor.slots is not None, "call PositionCache.at before a forward"
        index = self.cursor.slots.to(self.device)[:, None, :, None]  # [B, 1, Q, 1]
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            buffer.scatter_(2, index.expand_as(states), states.to(buffer.dtype))

    def move(self, from_slots: Tensor, to_slots: Tensor) -> None:
        for buffer in (self.keys, self.values) if self.is_initialized else ():
            take, put = (slots.to(self.device)[:, None, :, None] for slots in (from_slots, to_slots))  # [B, 1, n, 1]
            shape = (-1, buffer.shape[1], -1, buffer.shape[3])
            buffer.scatter_(2, put.expand(shape), buffer.gather(2, take.expand(shape)))

    def view(self) -> tuple[Tensor, Tensor]:
        """Keys and values of slots 0…max_length−1, [B, heads, L, D] each, no copy."""
        end = self.cursor.max_length
        return self.keys[:, :, :end], self.values[:, :, :end]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.write(key_states, value_states)
        return self.view()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cursor.max_length, 0

    def get_seq_length(self) -> int:
        return self.cursor.max_length

    def get_max_length(self) -> int:
        return self.capacity

    def fill(self, rows: list[int], source: "PositionLayer", length: int) -> None:
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
        capacity: slots per row; fixed. Spare slots for proposals lie behind the last position that a row can reach.
    """

    def __init__(self, num_layers: int, batch: int, capacity: int) -> None:
        self._cursor = _Cursor()
        self.buffers = [PositionLayer(self._cursor, batch, capacity) for _ in range(num_layers)]
        super().__init__(layers=list(self.buffers))
        self.batch, self.capacity = batch, capacity
        self._positions: Tensor | None = None  # [B, capacity], of every slot; None: of slot p it is p

    @property
    def max_length(self) -> int:
        """Keys that the next forward reads: slots 0…max_length−1."""
        return self._cursor.max_length

    @property
    def key_positions(self) -> Tensor | None:
        """Positions [B, max_length] of the keys that the next forward reads; None where slot p holds position p."""
        return None if self._positions is None else self._positions[:, : self.max_length]

    def at(self, positions: Tensor, *, slots: Tensor | None = None, max_length: int | None = None) -> None:
        """Set where the next forward writes, and how far it reads.

        A row's text ends where it is written: with ``slots``, every other slot at or beyond the row's smallest position
        is hidden, be it an earlier proposal's or, in its own place, what the proposal may replace. So a proposal may be
        written in several forwards. A call without ``slots`` forgets the proposal, and what is in place counts again.

        Args:
            positions: [B, Q], distinct within a row.
            slots: [B, Q], where they are written instead, distinct within a row; None: at their positions.
            max_length: one more than the largest slot read or written, known on the host (asking the device would
                stall it). None leaves the reading length alone (for writes without a read).
        """
        if positions.shape[0] != self.batch:
            expected, hint = f"{self.batch} rows, as the cache", "call cache.select(rows) when rows are dropped"
            raise InputError("positions", expected=expected, received=positions.shape[0], hint=hint)
        if max_length is not None:
            self.read(max_length)
        self._cursor.slots = positions if slots is None else slots
        if slots is None:
            self._positions = None
            return
        if self._positions is None:
            self._positions = torch.arange(self.capacity, device=positions.device).repeat(self.batch, 1)
        self._positions.masked_fill_(self._positions >= positions.amin(1, keepdim=True), NOWHERE)
        self._positions.scatter_(1, slots, positions)

    def read(self, max_length: int) -> None:
        """Set how far the next forward reads: slots 0…max_length−1."""
        if max_length > self.capacity:
            expected = f"at most the cache's capacity of {self.capacity} positions"
            hint = "allocate new_cache(batch, capacity) for prompt + new tokens + block size"
            raise InputError("max_length", expected=expected, received=max_length, hint=hint)
        self._cursor.max_length = max_length

    def move(self, from_slots: Tensor, to_slots: Tensor) -> None:
        """Copy accepted slots [B, n] into place, at their positions [B, n], distinct within a row, on the device.

        Rows that move fewer fill up with slots that are moved onto themselves.
        """
        for layer in self.buffers:
            layer.move(from_slots, to_slots)
        if self._positions is not None:
            moved = self._positions.gather(1, from_slots)
            self._positions.scatter_(1, from_slots, NOWHERE).scatter_(1, to_slots, moved)

    def fill(self, rows: Sequence[int], source: "PositionCache", length: int) -> None:
        """Copy positions 0…length−1 of a cache of one row, for the same network, into these rows."""
        for layer, other in zip(self.buffers, source.buffers, strict=True):
            layer.fill(list(rows), other, length)

    def select(self, rows: Tensor | Sequence[int]) -> None:
        """Keep these rows only, in this order (finished rows are dropped so)."""
        index = torch.as_tensor(rows, dtype=torch.long)
        self.batch = index.shape[0]
        for layer in self.buffers:
            layer.select(index)
        if self._positions is not None:
            self._positions = self._positions[index.to(self._positions.device)]
