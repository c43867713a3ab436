"""From a checkpoint's folder to a :class:`Target`; what cannot be served is refused by name."""

import os
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from dgd_lightning.errors import InputError
from dgd_lightning.target.dtypes import as_dtype, chosen_dtype, short, stored_dtype, warn_if_slow, why_chosen
from dgd_lightning.target.folder import (
    TOKENIZER_FILES,
    fetch_folder,
    find_weights,
    first_words,
    read_json,
    read_list,
    read_rope,
    refuse_narrow_weights,
    refuse_quantised,
    shorten,
)
from dgd_lightning.target.model import Target, check_attention

# model_type -> the causal LM class that the weights must be of
FAMILIES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
_RECURRENT = re.compile(
    r"qwen3_next|qwen3_5|lfm2|mamba|jamba|rwkv|bamba|zamba|recurrent|falcon_h1|granitemoehybrid|nemotron_h"
)
_RECURRENT_LAYERS = ("linear_attention", "conv", "mamba", "recurrent", "hybrid")
# Settings of generation_config.json that transformers' generate applies to every token and our decoders do not, with
# the values at which they do nothing.
_PROCESSORS: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (None, 1),
    "no_repeat_ngram_size": (None, 0),
    "bad_words_ids": (None, []),
    "suppress_tokens": (None, []),
}
MODEL_FILES = ("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json")


def load_target(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | Mapping[str, Any] = "auto",
    attn_implementation: str | None = None,
    revision: str | None = None,
) -> Target:
    """Load a frozen target from a folder or the Hugging Face Hub: safetensors only, never remote code.

    Args:
        name_or_path: folder, Hub id, or ``lab`` for the bundled target.
        dtype: ``auto`` (the checkpoint's where the device computes it natively, else float32), a torch dtype or its
            name. A half-width one that a CPU has no instructions for warns, with how slow it is.
        device: ``auto`` (CUDA where there is one), a device, or a ``device_map``: a dict, ``balanced``, ``sequential``.
        attn_implementation: ``sdpa`` (default) or ``eager``.
        revision: Hub revision: branch, tag or commit. Folders have none.

    Warns where the generation config asks for what changes the tokens in transformers' ``generate`` and not here.

    Raises:
        InputError: nothing there, no network, no safetensors, another architecture, quantised weights, an unsupported
            option, a ``device_map`` that leaves layers on the CPU or the disk while others are on a GPU.
    """
    attention, wanted, where = check_attention(attn_implementation or "sdpa"), as_dtype(dtype), as_device_map(device)
    folder = fetch_folder("target", name_or_path, revision, (*MODEL_FILES, *TOKENIZER_FILES))
    config = read_json(folder / "config.json", "target")
    refuse_quantised(config, "target")
    check_family(config)
    refuse_narrow_weights(find_weights(folder, "target"), "target")
    at = first_device(where)
    if isinstance(wanted, torch.dtype):
        warn_if_slow(wanted, at, f"dtype {short(wanted)}")
    else:
        stored = stored_dtype(folder, config)
        wanted = chosen_dtype(stored, at)
        if wanted != stored:
            warnings.warn(why_chosen(stored, at), stacklevel=2)
    if (folder / "generation_config.json").is_file():  # transformers would go on without an unreadable one
        read_json(folder / "generation_config.json", "target")
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    # what transformers raises for a config.json of wrong types; its messages say which
    mistakes = (TypeError, KeyError, AttributeError, ArithmeticError, StrictDataclassError)
    loader: Any = AutoModelForCausalLM  # its annotations do not say that output_loading_info gives a pair
    try:
        model, info = loader.from_pretrained(
            folder,
            dtype=wanted,
            device_map=where,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, SafetensorError, RuntimeError, ValueError, *mistakes) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        kind = f"{type(error).__name__} " * isinstance(error, KeyError | AttributeError)
        received = f"{folder.name}: {kind}{first_words(error)}"
        raise InputError(
            "target", expected="a readable checkpoint", received=received, hint="fetch it again"
        ) from error
    broken = sorted(str(key) for kind in ("missing_keys", "mismatched_keys") for key in info.get(kind) or ())
    if broken:
        expected = "weights for every parameter of the architecture"
        hint = "fetch the checkpoint again, or check that config.json belongs to it"
        raise InputError("target", expected=expected, received=f"missing or misshapen: {shorten(broken)}", hint=hint)
    check_placement(getattr(model, "hf_device_map", {}))
    settings = {name: getattr(model.generation_config, name, None) for name in _PROCESSORS}
    if asked := [f"{name} = {value}" for name, value in settings.items() if value not in _PROCESSORS[name]]:
        warnings.warn(
            f"the target's generation config asks for {shorten(asked)}: transformers' generate applies it, decoding "
            "here does not, so tokens may differ from generate's",
            stacklevel=2,
        )
    return Target(model)


def check_placement(device_map: Mapping[str, Any]) -> None:
    """Refuse placements that fetch weights anew for every token: on the disk, or on the CPU with the rest on GPUs."""
    places = {name: str(place) for name, place in device_map.items()}
    gpus = set(places.values()) - {"cpu", "disk"}
    offloaded = [f"{name or 'all'} on {place}" for name, place in places.items() if place not in gpus]
    if "disk" in places.values() or (gpus and offloaded):
        expected = "a placement on GPUs alone, or on the CPU alone"
        hint = "use more GPUs, a smaller target or dtype, or device=cpu"
        raise InputError("device", expected=expected, received=shorten(offloaded), hint=hint)


def check_family(config: Mapping[str, Any]) -> None:
    """Refuse targets that the position-addressed cache cannot serve."""
    kind = str(config.get("model_type"))
    names = [str(a) for a in read_list(config, "architectures", "target")]
    layers = [str(t) for t in read_list(config, "layer_types", "target")]
    recurrent = next((t for t in layers if any(r in t for r in _RECURRENT_LAYERS)), None)
    if recurrent or _RECURRENT.search(kind):
        raise InputError(
            "target",
            expected="a target whose every layer is attention over a key/value cache",
            received=f"{kind}, a hybrid or linear-attention model ({recurrent or ', '.join(names) or kind})",
            hint=f"use one of {', '.join(FAMILIES)}: a recurrent state cannot drop rejected tokens",
        )
    if kind not in FAMILIES or (names and FAMILIES[kind] not in names):
        expected, hint = f"a causal LM of one of {', '.join(FAMILIES.values())}", "choose a target of these families"
        raise InputError("target", expected=expected, received=f"model_type {kind}, architectures {names}", hint=hint)
    read_rope(config, "target")  # transformers looks at its numbers only when it turns something


def first_device(device_map: Any) -> torch.device:
    """One of the devices of a ``device_map`` that `as_device_map` gave; they are of one kind."""
    if isinstance(device_map, Mapping):
        place = next(iter(device_map.values()))
        return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
    return torch.device("cuda" if device_map is not None and torch.cuda.is_available() else "cpu")


def as_device_map(device: str | torch.device | Mapping[str, Any]) -> Any:
    """What ``from_pretrained(device_map=…)`` takes."""
    if isinstance(device, Mapping):
        check_placement(device)
        return dict(device)
    if device in ("balanced", "balanced_low_0", "sequential"):
        return device
    if device == "auto":
        return {"": "cuda:0"} if torch.cuda.is_available() else None
    try:
        where = torch.device(device)
    except RuntimeError as error:
        expected = "auto, cpu, cuda, cuda:N, or a device_map"
        raise InputError("device", expected=expected, received=device, hint="use one of these") from error
    if where.type == "cuda" and (where.index or 0) >= (count := torch.cuda.device_count()):
        raise InputError("device", expected=f"one of {count} CUDA devices", received=where, hint="use device=auto")
    return None if where.type == "cpu" else {"": str(where)}
