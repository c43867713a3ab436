"""PositionCache: scattered writes, views, row selection, lazy allocation; proposals in spare slots."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import make_pair, make_target
from torch import Tensor

from dgd_lightning.errors import InputError
from dgd_lightning.target.cache import PositionCache
from dgd_lightning.target.model import Target

SAME = {"rtol": 0, "atol": 1e-12}  # keys in another order are summed in another order
LENGTHS, SPARE, CAPACITY = torch.tensor([9, 5]), 30, 40  # prompts; the first spare slot
WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
SLIDING: Any = pytest.mark.parametrize(("family", "changes"), [("qwen3", {}), ("qwen3", WINDOW), ("qwen3_moe", WINDOW)])


def test_rows_write_at_their_own_positions() -> None:
    cache = PositionCache(num_layers=2, batch=2, capacity=6)
    keys = torch.arange(1, 9, dtype=torch.float64).reshape(2, 1, 4, 1)[:, :, :2]  # [B, heads, Q, D]
    cache.at(torch.tensor([[0, 3], [2, 1]]), max_length=4)
    seen, values = cache.update(keys, -keys, 1)
    assert seen[:, 0, :, 0].tolist() == [[1, 0, 0, 2], [0, 6, 5, 0]]
    assert torch.equal(values, -seen)
    assert not cache.buffers[0].is_initialized
    assert cache.buffers[1].keys.shape == (2, 1, 6, 1)
    assert seen.data_ptr() == cache.buffers[1].keys.data_ptr()  # a view: nothing is copied
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


def after(count: int, start: int = 0) -> Tensor:
    """[2, count] positions behind the prompts, from the ``start``-th on."""
    return LENGTHS[:, None] + torch.arange(start, start + count)


def tokens(count: int, seed: int) -> Tensor:
    return torch.randint(60, (2, count), generator=torch.Generator().manual_seed(seed))


def read_prompts(target: Target) -> PositionCache:
    cache = target.new_cache(2, CAPACITY)
    target.prefill(tokens(9, seed=0), LENGTHS, cache)
    return cache


def spare(count: int, start: int = 0) -> Tensor:
    """[2, count] slots, other ones in each row."""
    return SPARE + torch.stack([torch.arange(start, start + count), torch.arange(start, start + count).flip(0)])


@SLIDING
def test_an_accepted_proposal_is_as_if_written_in_place(family: str, changes: dict[str, Any]) -> None:
    """Written in two forwards, moved, and gone on from."""
    target = make_target(family, **changes)
    cache, plain = read_prompts(target), read_prompts(target)
    for start, count in ((0, 4), (4, 3)):
        ids, at = tokens(count, seed=start), after(count, start)
        there = target.step(ids, at, cache, slots=spare(count, start), max_length=CAPACITY)
        expected = target.step(ids, at, plain, max_length=20)
        torch.testing.assert_close(there.logits, expected.logits, **SAME)
    cache.move(torch.cat([spare(4), spare(3, 4)], dim=1), after(7))
    ids, at = tokens(5, seed=9), after(5, 7)
    moved = target.step(ids, at, cache, max_length=21)
    torch.testing.assert_close(moved.logits, target.step(ids, at, plain, max_length=21).logits, **SAME)


@SLIDING
def test_a_rejected_proposal_has_never_been(family: str, changes: dict[str, Any]) -> None:
    """What it would have replaced stays in place; another proposal may follow in the same slots or in others."""
    target = make_target(family, **changes)
    cache, plain = read_prompts(target), read_prompts(target)
    for one in (cache, plain):
        target.step(tokens(8, seed=1), after(8), one, max_length=20)
    shorter = read_prompts(target)
    for start, slots in ((2, spare(4)), (1, spare(4)), (1, spare(4, 5))):
        ids, at = tokens(4, seed=start), after(4, start)
        proposed = target.step(ids, at, cache, slots=slots, max_length=CAPACITY)
        target.step(tokens(8, seed=1)[:, :start], after(start), shorter, max_length=20)
        expected = target.step(ids, at, shorter, max_length=20)  # neither the old text nor older proposals are seen
        torch.testing.assert_close(proposed.logits, expected.logits, **SAME)
    ids, at = tokens(3, seed=7), after(3, 8)
    assert torch.equal(
        target.step(ids, at, cache, max_length=21).logits, target.step(ids, at, plain, max_length=21).logits
    )


def test_rows_accept_different_numbers_and_leave() -> None:
    target = make_target()
    cache, plain = read_prompts(target), read_prompts(target)
    ids, at = tokens(4, seed=3), after(4)
    target.step(ids, at, cache, slots=spare(4), max_length=CAPACITY)
    target.step(ids, at, plain, max_length=20)
    kept = torch.arange(4) < torch.tensor([[3], [0]])  # row 0 accepts three, row 1 none
    cache.move(torch.where(kept, spare(4), at), at)
    at = LENGTHS[:, None] + torch.tensor([[3], [0]])
    ids = tokens(1, seed=4)
    expected = target.step(ids, at, plain, max_length=20)
    torch.testing.assert_close(target.step(ids, at, cache, max_length=20).logits, expected.logits, **SAME)
    # in the middle of a proposal the rows change places, one takes its prefix along
    first = target.step(ids, at + 1, cache, slots=spare(1), max_length=CAPACITY)
    torch.testing.assert_close(first.logits, target.step(ids, at + 1, plain, max_length=20).logits, **SAME)
    cache.select([1, 0])
    plain.select([1, 0])
    second = target.step(ids, (at + 2).flip(0), cache, slots=spare(1, 1), max_length=CAPACITY)
    expected = target.step(ids, (at + 2).flip(0), plain, max_length=20)
    torch.testing.assert_close(second.logits, expected.logits, **SAME)


def test_moving_a_part_while_a_proposal_goes_on() -> None:
    target = make_target()
    cache, plain = read_prompts(target), read_prompts(target)
    for one, slots, reach in ((cache, spare(4), CAPACITY), (plain, None, 20)):
        target.step(tokens(4, seed=3), after(4), one, slots=slots, max_length=reach)
    cache.move(spare(4)[:, :2], after(2))
    ids, at = tokens(2, seed=5), after(2, 4)
    expected = target.step(ids, at, plain, max_length=20)
    proposed = target.step(ids, at, cache, slots=spare(4)[:, :2], max_length=CAPACITY)  # slots that are free again
    torch.testing.assert_close(proposed.logits, expected.logits, **SAME)


def test_the_drafts_cache_has_spare_slots_too() -> None:
    pair = make_pair()
    draft = pair.draft
    assert draft is not None
    size, hidden = draft.config.block_size, pair.target.hidden_size
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 16, draft.config.num_features, generator=generator, dtype=torch.float64)
    blocks = torch.randn(2, 2 * size, hidden, generator=generator, dtype=torch.float64)
    cache, plain = draft.new_cache(2, CAPACITY), draft.new_cache(2, CAPACITY)
    for one in (cache, plain):
        draft.extend(one, features[:, :9], torch.arange(9).repeat(2, 1))
    draft.extend(cache, features[:, 9:13], after(4), spare(4))
    draft.extend(plain, features[:, 9:13], after(4))
    anchors = after(2, 3)
    there = draft.block(cache, blocks, anchors, longest_anchor=CAPACITY)
    expected = draft.block(plain, blocks, anchors, longest_anchor=16)
    torch.testing.assert_close(there, expected, **SAME)
    cache.move(spare(4), after(4))
    torch.testing.assert_close(draft.block(cache, blocks, anchors, longest_anchor=CAPACITY), expected, **SAME)


def test_a_cache_that_is_too_small_is_named() -> None:
    target = make_target()
    cache = target.new_cache(2, 12)
    with pytest.raises(InputError, match=r"^max_length: expected at most the cache's capacity of 12"):
        target.step(tokens(2, 0), after(2), cache, slots=spare(2), max_length=SPARE + 2)
