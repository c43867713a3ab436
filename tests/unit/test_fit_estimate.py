"""What a fit will take, by counting: it grows with what is counted, and says where the device is too small."""

from __future__ import annotations

import pytest
import torch
from tiny import make_pair

from dgd_lightning.modules import fit_estimate
from dgd_lightning.modules.fit_estimate import FitEstimate, estimate_fit, said


def test_it_grows_with_batch_and_anchors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_estimate, "_speed", lambda device, width: 1e9)
    pair, talk = make_pair(), [(torch.zeros(20), torch.zeros(41))] * 3
    one, other = (estimate_fit(pair.target, pair.draft, talk, size, 8) for size in (1, 4))
    assert other.step_seconds == pytest.approx(4 * one.step_seconds)
    assert one.memory < other.memory < 4 * one.memory  # weights are there once
    assert estimate_fit(pair.target, pair.draft, talk, 1, 16).step_seconds > one.step_seconds
    most = estimate_fit(pair.target, pair.draft, talk, 1, 40)
    assert estimate_fit(pair.target, pair.draft, talk, 1, 500) == most  # an answer has no more anchors


def test_memory_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_estimate, "memory_of", lambda device: 2 * 2**30)
    cpu = torch.device("cpu")
    assert "lower data.batch_size" not in said(FitEstimate(2**30, 0.5), 100, cpu)
    text = said(FitEstimate(3 * 2**30, 60.0), 1000, cpu)
    assert "3.0 GiB, 17 h" in text
    assert "more than the 2 GiB here: lower data.batch_size" in text
