"""A model's dtype: ``auto`` is the checkpoint's where the device computes it natively, else float32."""

import functools
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dgd_lightning.checks import check_choice
from dgd_lightning.target.folder import FLOATS, find_weights

DTYPES = {name: getattr(torch, name) for name in FLOATS.values()}
SIZE, REPEATS = 512, 3  # of the matrix products that are timed: rows and columns; how often each


def as_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """``auto`` or a torch dtype."""
    if isinstance(dtype, torch.dtype):
        return dtype
    return DTYPES.get(check_choice("dtype", dtype, ("auto", *DTYPES)), "auto")


def named_dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype that a config.json names for its weights; None where it names none."""
    return DTYPES.get(str(config.get("dtype", config.get("torch_dtype"))).removeprefix("torch."))


def stored_dtype(folder: Path, config: Mapping[str, Any]) -> torch.dtype:
    """The checkpoint's dtype: what its config.json names, or else that of its first weight."""
    if (named := named_dtype(config)) is not None:
        return named
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(find_weights(folder, "target")[0], framework="pt") as tensors:
            return DTYPES[FLOATS[tensors.get_slice(next(iter(tensors.keys()))).get_dtype()]]
    except (SafetensorError, OSError, KeyError, StopIteration):  # who loads it says what is wrong
        return torch.float32


def is_native(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device has instructions for a dtype; where not, it may compute in it, but slowly or not at all."""
    if dtype not in (torch.float16, torch.bfloat16):
        return dtype == torch.float32 or device.type != "mps"
    if device.type == "cpu":
        return _cpu_has(dtype)
    if device.type == "cuda" and torch.version.hip is None and dtype == torch.bfloat16:
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return True


@functools.cache
def _cpu_has(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():  # oneDNN has the kernels
        return False
    names = {
        torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"),
        torch.float16: ("avx512_fp16", "amx_fp16"),
    }
    if hasattr(torch.cpu, "get_capabilities"):
        found = torch.cpu.get_capabilities()
        return any(found.get(name) for name in names[dtype])
    older: Any = torch.cpu  # torch before 2.10 has no public question for it
    return dtype == torch.bfloat16 and (older._is_avx512_bf16_supported() or older._is_amx_tile_supported())


def chosen_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """What ``auto`` comes to for weights stored in a dtype."""
    return stored if is_native(stored, device) else torch.float32


def why_chosen(stored: torch.dtype, device: torch.device) -> str:
    """What ``auto`` came to, and why, in one line."""
    chosen = chosen_dtype(stored, device)
    if chosen == stored:
        return f"dtype auto: {short(chosen)}, the checkpoint's"
    return (
        f"dtype auto: {short(chosen)}, as this {device.type} does not compute the checkpoint's {short(stored)} natively"
    )


def short(dtype: torch.dtype) -> str:
    """``bfloat16``."""
    return str(dtype).removeprefix("torch.")


@functools.cache
def warn_if_slow(dtype: torch.dtype, device: torch.device, setting: str) -> None:
    """Warns, once, that a CPU computes a half-width dtype without instructions for it, with how slowly.

    ``setting`` is what asked for it.
    """
    if device.type == "cpu" and not is_native(dtype, device):
        ratio = seconds_of_product(dtype) / seconds_of_product(torch.float32)
        warnings.warn(
            f"{setting} on a CPU without instructions for it: a product of two matrices of {SIZE} rows took "
            f"{ratio:.1f} times as long as in float32; dtype auto (with trainer.precision 32-true) chooses float32",
            stacklevel=2,
        )


def seconds_of_product(dtype: torch.dtype) -> float:
    """Of two small square matrices, the shortest of a few after one that is not timed."""
    matrix, took = torch.ones(SIZE, SIZE, dtype=dtype), []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        torch.mm(matrix, matrix)
        took.append(time.perf_counter() - began)
    return min(took[1:])
