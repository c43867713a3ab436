"""Philox4x32-10 against the known answers of Random123, and normal numbers that depend on nothing but their names."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dgd_lightning.decode.readouts import noise as module
from dgd_lightning.decode.readouts.noise import normals, philox

FULL = 0xFFFFFFFF
# counter, key, words: "philox4x32 10" of Random123's kat_vectors; the third takes its input from the digits of π
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((FULL, FULL, FULL, FULL), (FULL, FULL), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
VOCABULARY = 4001  # no multiple of four
KEYS = torch.tensor([[1, 2], [1, 3], [2, 2]])
POSITIONS = torch.tensor([[0, 1, 70_000], [0, 1, 70_000], [1, 0, 5]])


@pytest.mark.parametrize("copies", [1, 33])  # vectorised code has another path for what fills no register
def test_known_answers(copies: int) -> None:
    def words(values: tuple[int, ...]) -> tuple[Tensor, ...]:
        return tuple(torch.full((copies,), value) for value in values)

    for counter, key, expected in KNOWN:
        found = philox(words(counter), words(key))  # type: ignore[arg-type]
        assert [word.unique().tolist() for word in found] == [[word] for word in expected]


def test_rows_positions_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    together = normals(KEYS, POSITIONS, VOCABULARY)
    assert together.shape == (3, 3, VOCABULARY)
    for row in range(3):
        for at in range(3):
            alone = normals(KEYS[row, None], POSITIONS[row, at].view(1, 1), VOCABULARY)
            assert torch.equal(alone[0, 0], together[row, at])
    assert torch.equal(normals(KEYS, POSITIONS, 10), together[..., :10])
    monkeypatch.setattr(module, "AT_ONCE", 1000)
    assert torch.equal(normals(KEYS, POSITIONS, VOCABULARY), together)


def test_numbers_are_standard_normal_and_independent() -> None:
    drawn = normals(KEYS, POSITIONS, VOCABULARY).flatten(0, 1)  # nine rows, of keys and positions that are all unlike
    count = drawn.numel()
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
        spread = math.sqrt(math.prod(range(1, 2 * power, 2)) / count)  # of the mean of x^power, at most
        assert abs(float((drawn**power).mean()) - moment) < 5 * spread
    quantiles = drawn.flatten().quantile(torch.tensor([0.001, 0.5, 0.999], dtype=drawn.dtype))
    torch.testing.assert_close(quantiles, torch.tensor([-3.0902, 0.0, 3.0902], dtype=drawn.dtype), atol=0.12, rtol=0)
    bound = 5 / math.sqrt(VOCABULARY)
    assert torch.corrcoef(drawn).fill_diagonal_(0).abs().max() < bound
    for lag in (1, 2, 3, 4):  # places of one counter, and of two
        assert (drawn[:, lag:] * drawn[:, :-lag]).mean(-1).abs().max() < bound
