"""Logits that are no numbers stop a run: argmax makes token 0 of them, and rows of it look like a speed-up."""

from collections.abc import Iterable

import torch
from torch import Tensor

from dgd_lightning.distributions import wide
from dgd_lightning.errors import InputError

_HINTS = {
    torch.float16: "set dtype (model.dtype) to bfloat16 or float32: float16 ends at 65504",
    torch.bfloat16: "set dtype (model.dtype) to float32; if that changes nothing, the weights are damaged",
}


def peaks(logits: Tensor) -> Tensor:
    """The largest of logits [.., V], fp32 or wider [..]: finite exactly where their softmax is a distribution.

    Minus infinity alone is a token that can't be chosen; NaN, infinity and a row of nothing but −∞ are no distribution.
    """
    return wide(logits.amax(-1))


def hint_of(dtype: torch.dtype) -> str:
    """What helps against numbers that a computation in this dtype could not hold."""
    return _HINTS.get(dtype, "weights are damaged, the model's, an adapter's or a readout's: fetch or make them anew")


def not_finite(prompt: str, found: Iterable[tuple[str, Tensor]], first: int, dtype: torch.dtype) -> InputError:
    """The error for a prompt, by name, where one of the `peaks` is not finite.

    Args:
        found: whose logits, and their peaks [Q], in the order in which they were made.
        first: position of the token that the first of the Q is for.
        dtype: of the computation.
    """
    wrong = ((what, (~highest.isfinite()).tolist()) for what, highest in found)
    what, slots = next((what, slots) for what, slots in wrong if any(slots))
    kind = str(dtype).removeprefix("torch.")
    return InputError(
        prompt,
        expected=f"finite logits of the {what}",
        received=f"NaN or infinity for the token at position {first + slots.index(True)}, in {kind}",
        hint=hint_of(dtype),
    )
