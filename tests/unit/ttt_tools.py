"""Helpers of the tests of test-time training: a random context, and settings of a short fit."""

from __future__ import annotations

import torch
from torch import Tensor

from dgd_lightning import TTTConfig


def context(length: int = 60, seed: int = 0) -> Tensor:
    return torch.randint(0, 60, (length,), generator=torch.Generator().manual_seed(seed))


def config(**changes: object) -> TTTConfig:
    return TTTConfig(
        **{"steps": 6, "lr": 1e-2, "anchors_per_step": 8, "eval_every": 3, "validation_texts": 0, **changes}
    )  # type: ignore[arg-type]
