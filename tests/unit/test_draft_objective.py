"""Anchors and blocks of the training objective, and the memory rule of its loss (values: parity/test_oracle.py)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dgd_lightning.draft.objective import block_ids, block_loss, default_gamma, sample_anchors


def test_anchors_are_supervised_pairs_without_repeats() -> None:
    mask = torch.zeros(3, 30)
    mask[0, 10:20] = 1  # candidates 10…18
    mask[1, :4] = 1  # candidates 1, 2 (position 0 has no context)
    mask[2, 29] = 1  # none
    counts = torch.zeros(30)
    for seed in range(200):
        anchors, keep = sample_anchors(mask, 5, torch.Generator().manual_seed(seed))
        assert anchors.shape == keep.shape == (3, 5)
        assert keep.sum(1).tolist() == [5, 2, 0]
        assert anchors[1].tolist() == [1, 2, 0, 0, 0]
        chosen = anchors[0]
        assert (chosen.diff() > 0).all()
        counts[chosen] += 1
    assert counts.nonzero().flatten().tolist() == list(range(10, 19))
    assert counts[10:19].min() > 70  # uniform: 200 · 5 / 9 ≈ 111 each


def test_more_anchors_than_positions() -> None:
    anchors, keep = sample_anchors(torch.ones(1, 4), 9, None)
    assert anchors.tolist() == [[1, 2]]
    assert keep.sum() == 2


def test_same_generator_same_anchors() -> None:
    first, again = (sample_anchors(torch.ones(2, 50), 8, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(first.anchors, again.anchors)


def test_block_ids() -> None:
    ids = torch.arange(10, 20)[None]
    assert block_ids(ids, torch.tensor([[3, 0]]), 3, 99).tolist() == [[13, 99, 99, 10, 99, 99]]


def test_published_gammas() -> None:
    assert [default_gamma(k) for k in (16, 10, 8)] == [7, 5, 4]


@pytest.mark.parametrize(
    ("unlabelled", "dropped", "chunks"),
    [([], [], [7, 7, 4]), ([4], [], [7, 5]), ([], [1], [7, 5]), (range(9), [], [0])],
    ids=["all", "a token", "a block", "nothing"],
)
def test_only_slots_with_weight_go_through_the_head_once(unlabelled: list, dropped: list, chunks: list) -> None:
    sizes: list[int] = []

    def head(states: Tensor) -> Tensor:
        sizes.append(states.shape[0])
        return states

    hidden = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids = torch.zeros(2, 9, dtype=torch.long)
    anchors = torch.tensor([[1, 2, 3], [1, 2, 3]])
    mask, keep = torch.ones(2, 9), torch.ones(2, 3, dtype=torch.bool)
    mask[:, unlabelled], keep[:, dropped] = 0, False
    result = block_loss(hidden, head, ids, mask, anchors, keep, block_size=4, gamma=2.0, chunk=7)
    assert sizes == chunks
    result.loss.backward()
    assert sizes == chunks  # gradients were made with them
    assert hidden.grad is not None
    reached = hidden.grad.abs().sum(-1).view(2, 3, 4) > 0
    assert reached[..., 0].sum() == 0  # slot 0 is given, not predicted
    assert torch.equal(reached[..., 1:].sum(dim=(0, 1)), result.per_slot_count)
    assert result.per_slot_count.sum() == sum(chunks)


def test_nothing_supervised_gives_zero() -> None:
    hidden = torch.randn(1, 4, 5, requires_grad=True)
    none = torch.zeros(1, 1, dtype=torch.bool)
    result = block_loss(
        hidden, lambda x: x, torch.zeros(1, 9, dtype=torch.long), torch.ones(1, 9), torch.tensor([[2]]), none,
        block_size=4, gamma=2.0,
    )  # fmt: skip
    result.loss.backward()
    assert result.loss.item() == 0
    assert result.accuracy.isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_loss_precision(dtype: torch.dtype) -> None:
    """Half precision is widened to fp32, fp64 is kept."""
    hidden = torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    keep = torch.ones(1, 1, dtype=torch.bool)
    ids = torch.zeros(1, 9, dtype=torch.long)
    loss = block_loss(hidden, lambda x: x, ids, torch.ones(1, 9), torch.tensor([[2]]), keep, block_size=4, gamma=2.0)
    assert loss.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
