"""τ and acceptance: pure functions and their torchmetrics wrappers."""

from dgd_lightning.metrics.acceptance import AcceptanceLength, AcceptanceRate
from dgd_lightning.metrics.functional import (
    AcceptanceRates,
    Tau,
    acceptance_rates,
    length_histogram,
    tau,
    tau_of_histogram,
)

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
