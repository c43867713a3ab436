"""Acceptance metrics against a loop written straight from their definitions, on one process and on two."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dgd_lightning.metrics.acceptance import AcceptanceLength, acceptance_rates, length_histogram, tau

K = 6


def responses(seed: int, count: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randint(1, K) for _ in range(rng.randint(0, 9))] for _ in range(count)]


def naive_rates(lengths: list[int]) -> tuple[list[float], list[float]]:
    """Walks every block slot by slot, as a verification does."""
    given, overall = [], []
    for slot in range(1, K):
        reached = [length for length in lengths if length - 1 >= slot - 1]
        accepted = [length for length in reached if length - 1 >= slot]
        given.append(len(accepted) / len(reached))
        overall.append(len(accepted) / len(lengths))
    return given, overall


def test_tau_by_hand() -> None:
    value = tau([[4, 2], [], [1]])
    assert value.micro == pytest.approx(7 / 3)
    assert value.macro == pytest.approx((3 + 1) / 2)


def test_tau_of_nothing_is_nan() -> None:
    assert all(map(math.isnan, tau([[], []])))


def test_histogram_refuses_longer_than_the_block() -> None:
    with pytest.raises(ValueError, match="at most block_size 6, received 7"):
        length_histogram([1, 7], K)


def test_rates_equal_the_walk() -> None:
    lengths = [length for response in responses(0, 200) for length in response]
    rates = acceptance_rates(length_histogram(lengths, K))
    given, overall = naive_rates(lengths)
    assert rates.given_reached.tolist() == pytest.approx(given)
    assert rates.overall.tolist() == pytest.approx(overall)


def test_unreached_slots_are_nan() -> None:
    rates = acceptance_rates(length_histogram([1, 2], K))
    assert rates.given_reached[:2].tolist() == [0.5, 0.0]
    assert rates.given_reached[2:].isnan().all()
    assert rates.overall.tolist() == [0.5, 0, 0, 0, 0]


def check_metric(data: list[list[int]], mine: list[list[int]]) -> None:
    length = AcceptanceLength(K)
    for lengths in mine:
        length.update(lengths)
    assert length.compute() == pytest.approx(tau(data))
    given, overall = naive_rates([value for lengths in data for value in lengths])
    with length.sync_context():  # the histogram, too, is that of all ranks
        rates = acceptance_rates(length.counts)
    assert rates.given_reached.tolist() == pytest.approx(given)
    assert rates.overall.tolist() == pytest.approx(overall)


def test_metrics_equal_the_functions() -> None:
    check_metric(responses(1, 50), responses(1, 50))


def _worker(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    try:
        data = responses(2, 51)
        check_metric(data, data[rank::2])
    finally:
        dist.destroy_process_group()


def test_metrics_reduce_over_two_ranks(tmp_path: Path) -> None:
    # Forked: a spawned process would import everything anew, for a second's work without a gradient.
    mp.start_processes(_worker, args=(str(tmp_path / "rendezvous"),), nprocs=2, start_method="fork")
