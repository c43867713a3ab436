"""PositionCache: scattered writes, views, row selection, lazy allocation."""

from __future__ import annotations

import torch

from dgd_lightning.target.cache import PositionCache


def test_rows_write_at_their_own_positions() -> None:
    cache = PositionCache(num_layers=2, batch=2, capacity=6)
    keys = torch.arange(1, 9, dtype=torch.float64).reshape(2, 1, 4, 1)[:, :, :2]  # [B, heads, Q, D]
    cache.at(torch.tensor([[0, 3], [2, 1]]), max_length=4)
    seen, values = cache.update(keys, -keys, 1)
    assert seen[:, 0, :, 0].tolist() == [[1, 0, 0, 2], [0, 6, 5, 0]]
    assert torch.equal(values, -seen)
    assert not cache.slots[0].is_initialized
    assert cache.slots[1].keys.shape == (2, 1, 6, 1)
    assert seen.data_ptr() == cache.slots[1].keys.data_ptr()  # a view: nothing is copied
    assert cache.get_seq_length(1) == 4


def test_overwriting_and_selecting() -> None:
    cache = PositionCache(1, 3, 4)
    cache.at(torch.zeros(3, 1, dtype=torch.long), max_length=1)
    cache.update(torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1), torch.zeros(3, 1, 1, 2), 0)
    cache.select([2, 0])
    assert cache.batch == 2
    cache.at(torch.tensor([[0], [1]]), max_length=2)
    keys, values = cache.update(torch.tensor([9.0, 8.0]).view(2, 1, 1, 1), torch.ones(2, 1, 1, 2), 0)
    assert keys.flatten().tolist() == [9, 0, 1, 8]
    assert values.shape == (2, 1, 2, 2)
