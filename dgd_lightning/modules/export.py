"""What an export takes: a folder that can be written, the best checkpoint, the provenance without machine paths."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from dgd_lightning.errors import InputError

PROVENANCE = "provenance.json"
_ABSOLUTE = re.compile(r"(?<![\w.~:/])/(?:[^\s/,;'\"]+/)*([^\s/,;'\"]*)")


class Best(NamedTuple):
    """The best checkpoint of a run."""

    state: dict[str, Tensor]  # the module's state_dict
    step: int
    why: str  # "val/tau_micro = 3.2", for people


def require_writable(folder: Path, argument: str) -> None:
    """Makes the folder and writes a file into it, so that a long run does not fail at its end.

    Raises:
        InputError: it can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".dgd-write-test"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            argument,
            expected="a folder that can be written",
            received=f"{folder} ({error.strerror})",
            hint=f"choose another with --{argument}",
        ) from error


def best_checkpoint(trainer: Trainer) -> Best | None:
    """The best checkpoint of the first `ModelCheckpoint` with a monitor, or None where there is none."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor and callback.best_model_path:
            # this run wrote the file, and callbacks' states in it are no plain tensors
            saved = torch.load(callback.best_model_path, map_location="cpu", weights_only=False)
            score = callback.best_model_score
            value = float("nan") if score is None else float(score)
            return Best(saved["state_dict"], saved["global_step"], f"best {callback.monitor} = {value:.4g}")
    return None


def copy_provenance(log_dir: str | None, folder: Path) -> None:
    """Copy a run's ``provenance.json`` into ``folder``, absolute paths shortened to their last part."""
    source = Path(log_dir or "", PROVENANCE)
    if log_dir is not None and source.is_file():
        record = without_paths(json.loads(source.read_text(encoding="utf-8")))
        (folder / PROVENANCE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def without_paths(value: Any) -> Any:
    """``value`` (JSON) with every absolute path in its texts cut to its last part."""
    if isinstance(value, dict):
        return {key: without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item) for item in value]
    return _ABSOLUTE.sub(r"\1", value) if isinstance(value, str) else value
