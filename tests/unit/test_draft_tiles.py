"""Attention by tiles: who looks at which key, its own backward pass, precision, and what it keeps."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from dgd_lightning.draft import tiles
from dgd_lightning.draft.attention import mix_of
from dgd_lightning.draft.tiles import attend_in_tiles, plan_of

SUMS = 1e-12  # fp64 sums in another order
CPU = torch.device("cpu")


class Given:
    """Random queries, keys and values of N blocks over a context of S positions."""

    def __init__(self, limits: list[int], context: int = 40, dtype: torch.dtype = torch.float64) -> None:
        self.limits, self.context, self.heads, self.kv_heads, self.size, width = limits, context, 4, 2, 3, 8
        draw = torch.Generator().manual_seed(len(limits))

        def some(heads: int, length: int) -> Tensor:
            return torch.randn(1, heads, length, width, generator=draw, dtype=torch.float64).to(dtype)

        slots = len(limits) * self.size
        self.tensors = [some(self.heads, slots), *(some(self.kv_heads, n) for n in (context, context, slots, slots))]

    def tiles(self, *tensors: Tensor) -> Tensor:
        queries, keys, values, own_keys, own_values = tensors or self.tensors
        plan = plan_of(self.limits, self.kv_heads, self.heads // self.kv_heads * self.size, CPU)
        return attend_in_tiles(queries, (keys, values), (own_keys, own_values), [plan])

    def dense(self, *tensors: Tensor) -> Tensor:
        queries, keys, values, own_keys, own_values = tensors or self.tensors
        mix = mix_of("dense", torch.tensor([self.limits]), self.context, self.size, None, heads=4, kv_heads=2,
                     dtype=queries.dtype)  # fmt: skip
        return mix(queries, (keys, values), (own_keys, own_values))


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles in a short context."""
    monkeypatch.setattr(tiles, "NARROW", 8)
    monkeypatch.setattr(tiles, "WIDE", 8)


def test_a_plan_shows_each_block_the_keys_before_its_limit() -> None:
    rng = random.Random(0)
    for _ in range(50):
        limits = [rng.randint(0, 40) for _ in range(rng.randint(1, 9))]
        plan = plan_of(limits, 2, 6, CPU)
        order = list(range(len(limits))) if plan.order is None else plan.order.tolist()
        seen = {block: set[int]() for block in order}
        for tile in plan.tiles:
            assert tile.keys.stop - tile.keys.start <= 8
            for at, block in enumerate(order[tile.first :]):
                keys = range(tile.keys.start, tile.keys.stop)
                if tile.hidden is not None and at < len(tile.hidden):
                    keys = [key for key, hidden in zip(keys, tile.hidden[at, 0].tolist(), strict=True) if not hidden]
                assert not seen[block] & set(keys)
                seen[block] |= set(keys)
        assert seen == {block: set(range(limit)) for block, limit in enumerate(limits)}


def test_keys_behind_all_anchors_are_not_read() -> None:
    given = Given([11, 3, 20])
    for tensor in given.tensors[1:3]:
        tensor[:, :, 20:] = torch.nan
    assert given.tiles().isfinite().all()
    given.tensors[1][:, :, 15] = torch.nan  # seen by the last block alone
    mixed = given.tiles().unflatten(2, (3, -1))
    assert mixed[:, :, :2].isfinite().all()
    assert mixed[:, :, 2].isnan().all()


def test_the_backward_pass_is_the_derivative() -> None:
    given = Given([5, 0, 12], context=14)
    tensors = [tensor.requires_grad_() for tensor in given.tensors]
    assert torch.autograd.gradcheck(given.tiles, tensors, fast_mode=True)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (1, 2), (0, 1, 2)])
def test_gradients_that_nobody_wants_change_no_other(frozen: tuple[int, ...]) -> None:
    found = []
    for attend in (Given.tiles, Given.dense):
        given = Given([0, 17, 40, 33])
        wanted = [tensor.requires_grad_() for i, tensor in enumerate(given.tensors) if i not in frozen]
        attend(given).sin().sum().backward()
        assert all(given.tensors[i].grad is None for i in frozen)
        found.append([tensor.grad for tensor in wanted])
    for fast, slow in zip(*found, strict=True):
        assert slow is not None
        assert slow.abs().max() > 0
        torch.testing.assert_close(fast, slow, atol=SUMS, rtol=0)


def test_scores_far_apart_do_not_overflow() -> None:
    given = Given([40, 25, 8])
    given.tensors[0] *= 500
    mixed, oracle = given.tiles(), given.dense()
    assert mixed.isfinite().all()
    torch.testing.assert_close(mixed, oracle, atol=SUMS, rtol=0)


def test_half_precision_is_summed_in_full() -> None:
    given = Given([40, 0, 25, 8], dtype=torch.bfloat16)
    mixed = given.tiles()
    assert mixed.dtype == torch.bfloat16
    assert torch.equal(mixed, given.tiles(*(tensor.float() for tensor in given.tensors)).bfloat16())


def test_autocast_rounds_no_score() -> None:
    given = Given([40, 0, 25, 8], dtype=torch.float32)
    outside = given.tiles()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(given.tiles(), outside)


def test_terms_are_kept_for_the_backward_pass_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the tiles that find room: as many numbers as there are pairs of a query and a key of its tiles."""
    given = Given([40, 0, 25, 8])

    def kept() -> int:
        """Numbers of the saved [h, m, width]."""
        shapes = list[torch.Size]()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: shapes.append(x.shape) or x, lambda x: x):
            given.tiles()
        return sum(shape.numel() for shape in shapes if len(shape) == 3 and shape[-1] == 8 and shape[1] % 6 == 0) - rest

    rest = 0
    assert kept() == 0
    given.tensors[0].requires_grad_()
    monkeypatch.setattr(tiles, "KEPT", 0)
    rest = kept()  # queries and what they found are as wide as a tile here
    assert kept() == 0
    rows = given.heads * given.size
    monkeypatch.setattr(tiles, "KEPT", 8 * rows * (8 * 3 + 8 * 2))  # bytes of fp64; three blocks, then two see a tile
    assert kept() == rows * 40
    monkeypatch.setattr(tiles, "KEPT", 2**28)
    assert kept() == rows * (8 * 3 + 8 * 2 + 8 * 2 + 8 * 2 + 8)  # a tile reaches from 24 to 32, and 25 sees one of it


@pytest.mark.parametrize("room", [0, 4_000])
def test_terms_without_room_are_made_again(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "KEPT", room)
    found = []
    for attend in (Given.tiles, Given.dense):
        given = Given([0, 17, 40, 33])
        attend(given, *(tensor.requires_grad_() for tensor in given.tensors)).sin().sum().backward()
        found.append([tensor.grad for tensor in given.tensors])
    for fast, slow in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow, atol=SUMS, rtol=0)
