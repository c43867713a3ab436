"""The learning-rate schedule that every fit of this package uses."""

from __future__ import annotations

import math


def cosine_with_warmup(step: int, *, total: int, warmup: int, floor: float) -> float:
    """Learning-rate factor at ``step``: linear warm-up to 1, then a cosine down to ``floor`` at ``total`` steps."""
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
