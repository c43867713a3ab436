"""Pure functions of what decoding gives, and their torchmetrics wrappers, which load on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dgd_lightning.metrics.acceptance import AcceptanceLength, AcceptanceRate
    from dgd_lightning.metrics.functional import (
        AcceptanceRates,
        Tau,
        acceptance_rates,
        length_histogram,
        tau,
        tau_of_histogram,
    )

_WRAPPERS = ("AcceptanceLength", "AcceptanceRate")
__all__ = [
    "AcceptanceLength",
    "AcceptanceRate",
    "AcceptanceRates",
    "Tau",
    "acceptance_rates",
    "length_histogram",
    "tau",
    "tau_of_histogram",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "acceptance" if name in _WRAPPERS else "functional"
    return getattr(import_module(f"dgd_lightning.metrics.{home}"), name)
