"""Verification rules on their own: enumerated distributions, greedy agreement, residuals and their edge cases."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from dgd_lightning.decode import verify
from dgd_lightning.decode.random_source import Stream
from dgd_lightning.decode.verify import accept_probability, leading_true, residual, verify_match, verify_rejection

EXACT = 1e-14  # sums of fewer than 100 fp64 products


class Fixed:
    """A source with given answers: accept flags [B, K - 1]; the final draw is one token, its distribution is kept."""

    def __init__(self, flags: Tensor, token: int = 0) -> None:
        self.flags, self.token, self.distribution = flags, token, torch.empty(0)

    def categorical(self, probs: Tensor, stream: Stream, positions: Tensor) -> Tensor:
        self.distribution = probs
        return torch.full(probs.shape[:-1], self.token)

    def bernoulli(self, probs: Tensor, stream: Stream, positions: Tensor) -> Tensor:
        return self.flags

    def select(self, rows: Tensor) -> Fixed:
        raise NotImplementedError


def random_law(*shape: int, seed: int) -> Tensor:
    logits = 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return logits.softmax(-1)


def test_leading_true() -> None:
    flags = torch.tensor([[1, 1, 0], [0, 1, 1], [1, 1, 1], [0, 0, 0]]).bool()
    assert leading_true(flags).tolist() == [2, 0, 3, 0]


def test_match_commits_the_targets_tokens() -> None:
    verdict = verify_match(torch.tensor([[1, 2, 3], [1, 9, 3], [8, 2, 3]]), torch.tensor([[1, 2, 3, 4]] * 3))
    assert verdict.lengths.tolist() == [4, 2, 1]
    committed = [row[:n] for row, n in zip(verdict.tokens.tolist(), verdict.lengths.tolist(), strict=True)]
    assert committed == [[1, 2, 3, 4], [1, 2], [1]]


def test_rejection_commits_accepted_then_final() -> None:
    p, q = random_law(3, 4, 6, seed=0), random_law(3, 3, 6, seed=1)
    flags = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 1]]).bool()
    noise = Fixed(flags, token=5)
    proposals = torch.tensor([[1, 2, 3]] * 3)
    verdict = verify_rejection(proposals, q, p, noise, torch.arange(4).expand(3, 4))
    assert verdict.lengths.tolist() == [4, 2, 1]
    committed = [row[:n] for row, n in zip(verdict.tokens.tolist(), verdict.lengths.tolist(), strict=True)]
    assert committed == [[1, 2, 3, 5], [1, 5], [5]]
    torch.testing.assert_close(noise.distribution[0, 0], p[0, 3], rtol=0, atol=EXACT)  # the bonus comes from p itself
    torch.testing.assert_close(noise.distribution[1, 0], residual(p[1, 1], q[1, 1]), rtol=0, atol=EXACT)
    torch.testing.assert_close(noise.distribution[2, 0], residual(p[2, 0], q[2, 0]), rtol=0, atol=EXACT)


def law_of_one_slot(p: Tensor, q: Tensor) -> Tensor:
    """Exact distribution [V] of the token that rejection sampling commits at a slot with distributions p, q [V]."""
    distribution = torch.zeros_like(p)
    for x in range(len(p)):
        if q[x] > 0:
            accept = accept_probability(p[None, None], q[None, None], torch.tensor([[x]])).item()
            distribution[x] += q[x] * accept
            distribution += q[x] * (1 - accept) * verify.residual(p, q)
    return distribution


@pytest.mark.parametrize("seed", range(5))
def test_one_slot_has_the_targets_law(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = random_law(6, seed=seed), random_law(6, seed=seed + 100)
    assert (law_of_one_slot(p, q) - p).abs().sum() <= EXACT
    hot = q.log().div(2).softmax(-1)  # q off by a temperature: accept against another q than was drawn from
    wrong = torch.zeros_like(p)
    for x in range(6):
        accept = accept_probability(p[None, None], hot[None, None], torch.tensor([[x]])).item()
        wrong[x] += q[x] * accept
        wrong += q[x] * (1 - accept) * residual(p, hot)
    assert (wrong - p).abs().sum() > 1e-3
    monkeypatch.setattr(verify, "residual", lambda p, q: p)  # no subtraction
    assert (law_of_one_slot(p, q) - p).abs().sum() > 1e-3


def test_residual_edges() -> None:
    p = random_law(6, seed=3)
    assert torch.equal(residual(p, p), p)  # nothing left
    assert torch.equal(residual(p, torch.zeros_like(p)), p / p.sum())  # nothing rejected
    disjoint = torch.tensor([0.5, 0.5, 0.0, 0.0]), torch.tensor([0.0, 0.0, 0.5, 0.5])
    assert torch.equal(residual(*disjoint), disjoint[0])
    assert torch.isfinite(residual(torch.tensor([1.0, 0.0]), torch.tensor([1.0 - 2**-24, 2**-24]))).all()


def test_accept_probability_edges() -> None:
    p = torch.tensor([[[0.5, 0.5, 0.0]]])
    q = torch.tensor([[[0.25, 0.0, 0.75]]])
    values = [accept_probability(p, q, torch.tensor([[x]])).item() for x in range(3)]
    assert values == [1.0, 1.0, 0.0]


def test_match_law_by_enumeration() -> None:
    """Drawing the target's token at each slot and comparing leaves the target's distribution, whatever is proposed."""
    p = random_law(2, 4, seed=9)  # two slots, independent of what is proposed, V = 4
    for proposal in range(4):
        distribution = torch.zeros(4, dtype=torch.float64)
        for first, second in itertools.product(range(4), repeat=2):
            verdict = verify_match(torch.tensor([[proposal]]), torch.tensor([[first, second]]))
            distribution[verdict.tokens[0, 0]] += p[0, first] * p[1, second]
        assert (distribution - p[0]).abs().sum() <= EXACT
