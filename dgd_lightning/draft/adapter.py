"""An adapter: the LoRA weights of one context, apart from any draft; saved and loaded in PEFT's format."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dgd_lightning.errors import InputError
from dgd_lightning.files import save_tensors, whole_files

if TYPE_CHECKING:
    from peft import LoraConfig

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
MODULES = ("fc", *ATTENTION, *MLP)  # the linear layers of a draft that can be adapted
PREFIX = "base_model.model."  # PEFT's, before every key of a saved adapter
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# PEFT's settings that make another network of it.
FOREIGN = ("use_rslora", "use_dora", "bias", "rank_pattern", "alpha_pattern", "lora_bias", "modules_to_save")


class Adapter(NamedTuple):
    """LoRA weights of one context, apart from any draft."""

    weights: dict[str, Tensor]  # by PEFT's keys without their prefix: ``fc.lora_A.weight`` [r, in], … on CPU
    rank: int
    alpha: float
    modules: tuple[str, ...]
    base: str | None  # ``lora.base_digest`` of the draft it was trained on; None where a file does not say

    @property
    def parameters(self) -> int:
        """Trained numbers."""
        return sum(weight.numel() for weight in self.weights.values())


def peft_config(rank: int, alpha: float, modules: Sequence[str]) -> LoraConfig:
    """PEFT's description of LoRA layers on these modules of a draft."""
    from peft import LoraConfig  # takes a second to import; most runs need none of it

    inside = dict.fromkeys(ATTENTION, "self_attn") | dict.fromkeys(MLP, "mlp")
    names = [rf"layers\.\d+\.{inside[name]}\.{name}" if name in inside else name for name in modules]
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT only ever divides it by the rank
        target_modules=f"({'|'.join(names)})",
        lora_dropout=0.0,
        bias="none",
    )


def save_adapter(adapter: Adapter, folder: str | os.PathLike[str]) -> Path:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT reads them; each appears whole.

    Raises:
        InputError: the folder cannot be written.
    """
    path = Path(folder)
    config = peft_config(adapter.rank, adapter.alpha, adapter.modules)
    config.inference_mode = True
    weights = {PREFIX + key: value.contiguous() for key, value in adapter.weights.items()}
    metadata = {"format": "pt"} | ({"base": adapter.base} if adapter.base else {})
    try:
        with whole_files(path, WEIGHTS, CONFIG) as scratch:
            save_tensors(weights, scratch / WEIGHTS, metadata)
            config.save_pretrained(str(scratch))
    except OSError as error:
        raise InputError(
            "adapter folder", expected="a folder that can be written", received=error, hint="choose another"
        ) from error
    return path


def load_adapter(folder: str | os.PathLike[str]) -> Adapter:
    """Read an adapter that :func:`save_adapter` or PEFT wrote for a draft.

    Raises:
        InputError: there is none, it can't be read, or it is no LoRA on linear layers of a draft.
    """
    path = Path(folder)
    hint = "name a folder adapters/<context id>/ of a run"
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        with safe_open(path / WEIGHTS, framework="pt") as file:
            base = (file.metadata() or {}).get("base")
            weights = {key.removeprefix(PREFIX): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
        foreign = [name for name in FOREIGN if config.get(name) not in (None, False, "none", {}, [])]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError("adapter folder", expected="a PEFT adapter", received=f"{path}: {error}", hint=hint) from error
    if foreign:
        raise InputError(
            "adapter folder",
            expected="plain LoRA",
            received=f"{path} with {', '.join(foreign)}",
            hint="such adapters are not supported; train one without",
        )
    found = {re.sub(r"\.lora_[AB]\.weight$", "", key).rpartition(".")[2] for key in weights}
    modules = tuple(name for name in MODULES if name in found)
    return Adapter(weights, rank, alpha, modules, base)
