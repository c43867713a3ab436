"""Drafts on disk, in the layout of z-lab and SpecForge: read with a report of what does not fit, written atomically."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dgd_lightning.draft.config import DraftConfig
from dgd_lightning.draft.model import DFlashDraft
from dgd_lightning.errors import InputError
from dgd_lightning.files import save_tensors, whole_files
from dgd_lightning.target.folder import fetch_folder, find_weights, read_json, shorten
from dgd_lightning.target.load import as_dtype

_FILES = ("config.json", "model*.safetensors", "model.safetensors.index.json")
_PREFIXES = ("module.", "draft_model.", "model.")  # wrappers that training code leaves on the names
_VOCABULARY = ("embed_tokens.weight", "lm_head.weight")


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
        dtype: ``auto`` (that of the stored ``fc.weight``), a torch dtype or its name.
        device: where it goes.
        revision: Hub revision.
        shared: the target's ``embed_tokens.weight`` and ``lm_head.weight``. SpecForge may save a frozen copy of them
            with the draft: an equal copy is dropped, also in a narrower dtype; any other is another format and is
            refused.

    Raises:
        InputError: nothing there, another format, and missing, unexpected or misshapen keys, by name.
    """
    wanted = as_dtype(dtype)
    folder = fetch_folder("draft", name_or_path, revision, _FILES)
    config = DraftConfig.from_dict(read_json(folder / "config.json", "draft"))
    state: dict[str, Tensor] = {}
    for file in find_weights(folder, "draft"):
        try:
            state |= load_file(file)
        except (SafetensorError, OSError) as error:
            received = f"{file.name}: {error}"
            raise InputError(
                "draft", expected="readable safetensors", received=received, hint="fetch it again"
            ) from error
    state = _plain_names(state)
    _drop_shared(state, shared or {})
    draft = DFlashDraft(config)
    _check_keys(state, draft)
    draft.load_state_dict(state)
    kind = state["fc.weight"].dtype if isinstance(wanted, str) else wanted
    return draft.to(device=device, dtype=kind).eval()


def save_draft(draft: DFlashDraft, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> Path:
    """Write ``config.json`` and ``model.safetensors`` as published drafts have them (for vLLM, SGLang, z-lab's code).

    Each file is written beside its final name and renamed, the weights first.

    Args:
        draft: the network.
        folder: made if missing; its two files are replaced.
        dtype: to store the weights in; None keeps the draft's.

    Raises:
        InputError: the folder cannot be written.
    """
    path = Path(folder)
    kind = dtype or draft.dtype
    state = {k: v.detach().to("cpu", kind).contiguous() for k, v in draft.state_dict().items()}
    config = draft.config.to_dict() | {"dtype": str(kind).removeprefix("torch.")}
    try:
        with whole_files(path, "model.safetensors", "config.json") as scratch:
            save_tensors(state, scratch / "model.safetensors", {"format": "pt"})
            text = json.dumps(config, indent=2, sort_keys=True) + "\n"
            (scratch / "config.json").write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(
            "folder", expected="a folder that can be written", received=error, hint="choose another"
        ) from error
    return path


def _plain_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Strip wrappers' prefixes, and drop rotary buffers that old checkpoints carry (they follow from the config)."""
    plain: dict[str, Tensor] = {}
    for key, value in state.items():
        name, stripped = key, True
        while stripped:
            stripped = False
            for prefix in _PREFIXES:
                if name.startswith(prefix):
                    name, stripped = name.removeprefix(prefix), True
        if not name.endswith("rotary_emb.inv_freq"):
            plain[name] = value
    return plain


def _drop_shared(state: dict[str, Tensor], shared: Mapping[str, Tensor]) -> None:
    for key in _VOCABULARY:
        if key in state and key in shared:
            theirs, ours = state[key], shared[key].detach().cpu()
            if theirs.shape == ours.shape and (
                torch.equal(theirs.to(ours.dtype), ours) or torch.equal(theirs, ours.to(theirs.dtype))
            ):
                del state[key]
    own = sorted(k for k in state if k in (*_VOCABULARY, "t2d", "d2t") or k.startswith("verifier_"))
    if own:
        raise InputError(
            "draft",
            expected="a draft that uses the target's embedding and head",
            received=f"a checkpoint with its own {shorten(own)}",
            hint="drafts with a vocabulary of their own (speculators exports) are not supported",
        )


def _check_keys(state: Mapping[str, Tensor], draft: DFlashDraft) -> None:
    wanted = draft.state_dict()
    missing = sorted(wanted.keys() - state.keys())
    unexpected = sorted(state.keys() - wanted.keys())
    shapes = sorted(
        f"{k} {list(state[k].shape)} for {list(wanted[k].shape)}"
        for k in wanted.keys() & state.keys()
        if state[k].shape != wanted[k].shape
    )
    found = {"missing": missing, "unexpected": unexpected, "misshapen": shapes}
    report = "; ".join(f"{kind}: {shorten(keys, 8)}" for kind, keys in found.items() if keys)
    if report:
        raise InputError(
            "draft",
            expected="the keys layers.N.*, norm, fc and hidden_norm in the shapes of config.json",
            received=report,
            hint="use a DFlash checkpoint whose config.json belongs to it",
        )
