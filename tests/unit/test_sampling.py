"""Sampling: filters against transformers' own, the inverse CDF against frequencies, position-addressed numbers."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from dgd_lightning.decode.random_source import ACCEPT, DRAFT, TARGET, RandomTable, random_table, row_seeds
from dgd_lightning.decode.sampling import GRAIN, draw, halved_sum, nucleus, probabilities, sampling_params
from dgd_lightning.distributions import real_dtype, uniforms_on
from dgd_lightning.errors import InputError

FP64_ROUNDING = 1e-14  # softmax over fewer than 100 entries, twice, in fp64


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (3, None), (None, 0.6), (5, 0.8), (1, None), (99, 1.0)])
def test_filters_match_transformers(temperature: float, top_k: int | None, top_p: float | None) -> None:
    logits = 3 * torch.randn(64, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # [64, V]
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p is not None:
        expected = TopPLogitsWarper(top_p)(None, expected)
    got = probabilities(logits, sampling_params(temperature, top_k, top_p))
    torch.testing.assert_close(got, expected.softmax(-1), rtol=0, atol=FP64_ROUNDING)


def sorted_nucleus(scaled: torch.Tensor, top_p: float) -> torch.Tensor:
    """The slow oracle of `nucleus`: which of the logits [n, V] are inside, by sorting all and adding one by one."""
    weights, inside = scaled.exp(), torch.zeros_like(scaled, dtype=torch.bool)
    needed = (halved_sum(weights).double()[:, 0] * (top_p * GRAIN)).tolist()
    order = scaled.sort(dim=-1, descending=True, stable=True).indices.tolist()  # equal logits by their ids
    for row, ids in enumerate(order):
        before, mass = 0, weights[row].tolist()
        for token in ids:
            if before >= needed[row]:
                break
            inside[row, token] = True
            before += int(mass[token] * GRAIN)
    return inside


def drawn_logits(kind: str) -> torch.Tensor:
    """[n, V] of different shapes, the likeliest at 0."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 2001, generator=generator)
    if kind == "peaked":
        logits[:, 7::400] += 14 * torch.rand(9, 5, generator=generator)
    elif kind == "bfloat16":
        logits = (4 * logits).bfloat16().float()  # many equal ones
    elif kind == "whole":
        logits = (2 * logits).round()
    elif kind == "equal":
        logits = torch.zeros(9, 40)  # 0.5, 0.9 and 0.05 of them are whole numbers of tokens
    elif kind == "one":
        logits[:, 3] = 100
    elif kind == "float64":
        logits = 3 * logits.double()
    elif kind == "masked":
        logits[:, ::2] = -torch.inf
    return logits - logits.amax(-1, keepdim=True)


KINDS = ("flat", "peaked", "bfloat16", "whole", "equal", "one", "float64", "masked")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999, 1 - 1e-7])
def test_the_nucleus_is_that_of_a_sort(kind: str, top_p: float) -> None:
    scaled = drawn_logits(kind)
    expected = scaled.masked_fill(~sorted_nucleus(scaled, top_p), -torch.inf).softmax(-1)
    for waits in (False, True):  # on a CPU, and as another device would
        got = nucleus(scaled, top_p, waits=waits)
        assert torch.equal(got > 0, expected > 0)
        torch.testing.assert_close(got, expected)
        alone = torch.cat([nucleus(row, top_p, waits=waits) for row in scaled.split(1)])
        assert torch.equal(alone, got)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [1, 5, 37])
def test_after_top_k_only_those_are_looked_at(kind: str, top_k: int) -> None:
    scaled = drawn_logits(kind)
    ranked = scaled.topk(top_k).values
    left = scaled.masked_fill(scaled < ranked[:, -1:], -torch.inf)
    expected = left.masked_fill(~sorted_nucleus(left, 0.8), -torch.inf).softmax(-1)
    for waits in (False, True):
        got = nucleus(left, 0.8, ranked, waits=waits)
        assert torch.equal(got > 0, expected > 0)
        torch.testing.assert_close(got, expected)
    got = probabilities(scaled.view(3, 3, -1), sampling_params(1.0, top_k, 0.8)).view_as(scaled)
    assert torch.equal(got > 0, expected > 0)


def test_the_whole_is_the_same_in_every_batch() -> None:
    numbers = torch.rand(5, 1237, generator=torch.Generator().manual_seed(0))
    sums = halved_sum(numbers)
    torch.testing.assert_close(sums.double(), numbers.double().sum(-1, keepdim=True), rtol=1e-6, atol=0)  # fp32
    assert torch.equal(torch.cat([halved_sum(row) for row in numbers.split(1)]), sums)
    assert halved_sum(torch.arange(7)).item() == 21


def test_dtypes_and_greedy() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, -torch.inf]])
    greedy = probabilities(logits, sampling_params(0.0))
    assert greedy.tolist() == [[0.0, 1.0, 0.0, 0.0]]
    assert probabilities(logits.bfloat16(), sampling_params(1.0)).dtype == torch.float32
    assert probabilities(logits.double(), sampling_params(1.0)).dtype == torch.float64
    cold = probabilities(1e4 * logits, sampling_params(1e-4))  # a naive division overflows fp32 here
    assert cold.tolist() == [[0.0, 0.5, 0.5, 0.0]]


def test_draw_frequencies_and_edges() -> None:
    probs = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    n = 4000
    grid = torch.arange(n, dtype=torch.float64) / n  # an exact grid of uniforms gives exact counts
    counts = draw(probs.expand(n, -1), grid).bincount(minlength=6)
    assert counts.tolist() == [0, n // 4, 0, n // 2, n // 4, 0]
    largest = torch.tensor(1 - 2.0**-53, dtype=torch.float64)
    for total in (1 - 1e-6, 1.0, 1 + 1e-6):  # the sum of an fp32 softmax
        assert draw(probs * total, largest).item() == 4
        assert draw(probs * total, torch.zeros((), dtype=torch.float64)).item() == 1


def test_noise_is_the_rows_own() -> None:
    table = random_table([7, 8, 7], 20)  # [3, 20, 3]
    assert torch.equal(table[0], table[2])
    assert not torch.equal(table[0], table[1])
    assert torch.equal(random_table([8], 50)[0, :20], table[1])
    assert table.dtype == torch.float64
    assert table.unique().numel() == 2 * 20 * 3  # no number serves two streams or positions


def test_table_noise_is_addressed_by_position() -> None:
    random_source = RandomTable(random_table([1, 2], 10), torch.tensor([5, 100]))
    probs = torch.full((2, 3, 50), 1 / 50, dtype=torch.float64)
    positions = torch.tensor([[6, 7, 8], [101, 102, 103]])
    together = random_source.categorical(probs, DRAFT, positions)
    assert torch.equal(random_source.categorical(probs[:, :1], DRAFT, positions[:, 1:2]), together[:, 1:2])
    assert torch.equal(
        random_source.select(torch.tensor([1])).categorical(probs[1:], DRAFT, positions[1:]), together[1:]
    )
    assert not torch.equal(random_source.categorical(probs, TARGET, positions), together)
    certain = torch.ones(2, 3, dtype=torch.float64)
    assert random_source.bernoulli(certain, ACCEPT, positions).all()
    assert not random_source.bernoulli(0 * certain, ACCEPT, positions).any()


def test_row_seeds() -> None:
    seeds = row_seeds(3, 4)
    assert seeds[:2] == row_seeds(3, 2)  # a row's seed does not depend on how many follow
    assert len(set(seeds) | set(row_seeds(4, 4))) == 8
    assert row_seeds([5, 6], 2) == [5, 6]
    assert row_seeds(None, 2) != row_seeds(None, 2)
    assert all(0 <= seed < 2**63 for seed in seeds + row_seeds(None, 3))


@pytest.mark.parametrize("seed", [-1, [1], [1, -2], "ab", 1.5, True, [1, 2.0]])
def test_bad_seeds(seed: object) -> None:
    with pytest.raises(InputError, match=r"^seed: expected"):
        row_seeds(seed, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", v) for v in (-1.0, float("nan"), float("inf"), 1e-9, "1", True)]
    + [("top_k", v) for v in (0, -1, 2.0, True)]
    + [("top_p", v) for v in (0.0, 1.5, -0.1, float("nan"), "1", True)],
)
def test_bad_params(name: str, value: object) -> None:
    with pytest.raises(InputError, match=f"^{name}: expected"):
        sampling_params(**{"temperature": 1.0, name: value})  # type: ignore[arg-type]


def test_a_device_without_float64_gets_narrower_uniforms_that_stay_below_one() -> None:
    assert real_dtype(torch.device("cpu")) == torch.float64
    assert real_dtype(torch.device("mps")) == torch.float32
    largest = 1 - torch.finfo(torch.float64).eps / 2  # the largest that a generator gives; as fp32 it would be 1
    table = torch.tensor([0.0, 0.25, largest], dtype=torch.float64)
    assert torch.equal(uniforms_on(table, torch.device("cpu")), table)
    with mock.patch("dgd_lightning.distributions.real_dtype", return_value=torch.float32):
        narrow = uniforms_on(table, torch.device("cpu"))
    assert narrow.dtype == torch.float32
    assert narrow[:2].tolist() == [0.0, 0.25]
    assert narrow[2] < 1


def test_a_narrower_draw_still_takes_no_token_of_probability_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgd_lightning.decode.sampling.real_dtype", lambda device: torch.float32)
    probs = torch.tensor([0.0, 0.3, 0.7, 0.0])
    uniform = torch.tensor([0.0, 0.29, 0.31, 1 - torch.finfo(torch.float32).eps / 2])
    assert draw(probs.expand(4, 4), uniform).tolist() == [1, 1, 2, 2]
