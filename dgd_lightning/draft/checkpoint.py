"""Drafts and adapters on disk, in the layouts of z-lab, SpecForge and PEFT: written whole, read with a report."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from dgd_lightning.draft.config import DraftConfig
from dgd_lightning.draft.model import DFlashDraft
from dgd_lightning.errors import InputError
from dgd_lightning.files import save_tensors, whole_files
from dgd_lightning.target.dtypes import as_dtype, chosen_dtype
from dgd_lightning.target.folder import (
    fetch_folder,
    find_weights,
    read_json,
    refuse_narrow_weights,
    refuse_quantised,
    shorten,
)

_FILES = ("config.json", "model*.safetensors", "model.safetensors.index.json")
_WRAPPED = re.compile(r"^(?:module\.|draft_model\.|model\.)+")  # prefixes that training code leaves on the names
_VOCABULARY = ("embed_tokens.weight", "lm_head.weight")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
MODULES = ("fc", *ATTENTION, *MLP)  # the linear layers of a draft that can be adapted
PREFIX = "base_model.model."  # PEFT's, before every key of a saved adapter
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# PEFT's settings that make another network of it.
FOREIGN = ("use_rslora", "use_dora", "bias", "rank_pattern", "alpha_pattern", "lora_bias", "modules_to_save")


def load_draft(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    revision: str | None = None,
    shared: Mapping[str, Tensor] | None = None,
) -> DFlashDraft:
    """Load a DFlash draft from a folder or the Hugging Face Hub, in eval mode.

    Args:
        name_or_path: folder or Hub id; safetensors, one file or an index.
        dtype: ``auto`` (that of the stored ``fc.weight`` where the device computes it natively, else float32), a torch
            dtype or its name.
        device: where it goes.
        revision: Hub revision.
        shared: the target's ``embed_tokens.weight`` and ``lm_head.weight``. SpecForge may save a frozen copy of them
            with the draft: an equal copy is dropped, also in a narrower dtype; any other is another format and is
            refused.

    Raises:
        InputError: nothing there, another format, quantised weights, and missing, unexpected or misshapen keys, by
            name.
    """
    wanted = as_dtype(dtype)
    folder = fetch_folder("draft", name_or_path, revision, _FILES)
    config = read_json(folder / "config.json", "draft")
    refuse_quantised(config, "draft")
    draft, files = DFlashDraft(DraftConfig.from_dict(config)), find_weights(folder, "draft")
    refuse_narrow_weights(files, "draft")
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            state |= load_file(file)
        except (SafetensorError, OSError) as error:
            received, again = f"{file.name}: {error}", "fetch it again"
            raise InputError("draft", expected="readable safetensors", received=received, hint=again) from error
    # Old checkpoints carry rotary buffers, which follow from the config.
    state = {_WRAPPED.sub("", key): value for key, value in state.items() if not key.endswith("rotary_emb.inv_freq")}
    _drop_shared(state, shared or {})
    _check_keys(state, draft.state_dict())
    draft.load_state_dict(state)
    stored = state["fc.weight"].dtype
    kind = wanted if isinstance(wanted, torch.dtype) else chosen_dtype(stored, torch.device(device))
    return draft.to(device=device, dtype=kind).eval()


def _drop_shared(state: dict[str, Tensor], shared: Mapping[str, Tensor]) -> None:
    for key in state.keys() & shared.keys() & set(_VOCABULARY):
        theirs, ours = state[key], shared[key].detach().cpu()
        if theirs.shape == ours.shape and (
            torch.equal(theirs.to(ours.dtype), ours) or torch.equal(theirs, ours.to(theirs.dtype))
        ):
            del state[key]
    own = sorted(k for k in state if k in (*_VOCABULARY, "t2d", "d2t") or k.startswith("verifier_"))
    if own:
        expected = "a draft that uses the target's embedding and head"
        hint = "drafts with a vocabulary of their own (speculators exports) are not supported"
        raise InputError("draft", expected=expected, received=f"a checkpoint with its own {shorten(own)}", hint=hint)


def _check_keys(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    shapes = {k: (list(state[k].shape), list(wanted[k].shape)) for k in sorted(wanted.keys() & state.keys())}
    found = {
        "missing": sorted(wanted.keys() - state.keys()),
        "unexpected": sorted(state.keys() - wanted.keys()),
        "misshapen": [f"{key} {ours} for {theirs}" for key, (ours, theirs) in shapes.items() if ours != theirs],
    }
    report = "; ".join(f"{kind}: {shorten(keys, 8)}" for kind, keys in found.items() if keys)
    if report:
        expected = "the keys layers.N.*, norm, fc and hidden_norm in the shapes of config.json"
        hint = "use a DFlash checkpoint whose config.json belongs to it"
        raise InputError("draft", expected=expected, received=report, hint=hint)


def save_draft(draft: DFlashDraft, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> Path:
    """Write ``config.json`` and ``model.safetensors`` as published drafts have them (for vLLM, SGLang, z-lab's code).

    Each file is written beside its final name and renamed, the weights first.

    Args:
        draft: the network.
        folder: made if missing; its two files are replaced.
        dtype: to store the weights in; None keeps the draft's.
    """
    path = Path(folder)
    kind = dtype or draft.dtype
    state = {k: v.detach().to("cpu", kind).contiguous() for k, v in draft.state_dict().items()}
    config = draft.config.to_dict() | {"dtype": str(kind).removeprefix("torch.")}
    with _written("folder", path, "model.safetensors", "config.json") as scratch:
        save_tensors(state, scratch / "model.safetensors", {"format": "pt"})
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (scratch / "config.json").write_text(text, encoding="utf-8")
    return path


@contextmanager
def _written(argument: str, folder: Path, *names: str) -> Iterator[Path]:
    """:func:`whole_files` in a folder that the user named."""
    expected, hint = "a folder that can be written", "choose another"
    try:
        with whole_files(folder, *names) as scratch:
            yield scratch
    except OSError as error:
        raise InputError(argument, expected=expected, received=error, hint=hint) from error


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


def save_adapter(adapter: Adapter, folder: str | os.PathLike[str]) -> Path:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT reads them; each appears whole.

    Raises:
        InputError: the folder cannot be written.
    """
    from peft import LoraConfig  # takes a second to import; most runs need none of it

    path = Path(folder)
    inside = dict.fromkeys(ATTENTION, "self_attn") | dict.fromkeys(MLP, "mlp")
    names = [rf"layers\.\d+\.{inside[name]}\.{name}" if name in inside else name for name in adapter.modules]
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # PEFT only ever divides it by the rank
        target_modules=f"({'|'.join(names)})",
        lora_dropout=0.0,
        bias="none",
        inference_mode=True,
    )
    weights = {PREFIX + key: value.contiguous() for key, value in adapter.weights.items()}
    metadata = {"format": "pt"} | ({"base": adapter.base} if adapter.base else {})
    with _written("adapter folder", path, WEIGHTS, CONFIG) as scratch:
        save_tensors(weights, scratch / WEIGHTS, metadata)
        config.save_pretrained(str(scratch))
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
        received, hint = f"{path} with {', '.join(foreign)}", "such adapters are not supported; train one without"
        raise InputError("adapter folder", expected="plain LoRA", received=received, hint=hint)
    found = {re.sub(r"\.lora_[AB]\.weight$", "", key).rpartition(".")[2] for key in weights}
    return Adapter(weights, rank, alpha, tuple(name for name in MODULES if name in found), base)
