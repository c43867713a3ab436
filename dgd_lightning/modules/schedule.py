"""The learning-rate schedule that every fit of this package uses."""

from __future__ import annotations

import math

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler


def cosine_with_warmup(step: int, *, total: int, warmup: int, floor: float) -> float:
    """Learning-rate factor at ``step``: linear warm-up to 1, then a cosine down to ``floor`` at ``total`` steps."""
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def scheduled(optimizer: torch.optim.Optimizer, *, total: int, warmup: int, floor: float = 0.0) -> OptimizerLRScheduler:
    """An optimiser with that schedule, step by step, as Lightning takes it."""
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: cosine_with_warmup(step, total=total, warmup=warmup, floor=floor)
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
