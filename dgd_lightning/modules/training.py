"""What trainings share: the learning-rate schedule, and what an export takes.

An export takes a folder that can be written, the best checkpoint, and the provenance without machine paths.
"""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from dgd_lightning.errors import InputError
from dgd_lightning.run_folder import PROVENANCE

_ABSOLUTE = re.compile(r"(?<![\w.~:/])/(?:[^\s/,;'\"]+/)*([^\s/,;'\"]*)")


def checked(loss: Tensor, module: LightningModule) -> Tensor:
    """The loss of a training step; an InputError ends the fit where it is not finite on one of the ranks."""
    trainer = module.trainer
    value = trainer.strategy.reduce(loss.detach(), reduce_op="mean") if trainer.world_size > 1 else loss.detach()
    if not math.isfinite(float(value)):
        first = trainer.global_step == 0
        raise InputError(
            "loss",
            expected="a finite number",
            received=f"{float(value)} in step {trainer.global_step + 1}, in {trainer.precision}; nothing is exported",
            hint="use model.dtype and trainer.precision with larger numbers" if first else "lower model.lr",
        )
    return loss


def require_finite(weights: Iterable[Tensor]) -> None:
    """Refuses to export what the last step has broken, or what the exported dtype can't hold."""
    if not all(bool(weight.isfinite().all()) for weight in weights):
        received = "NaN or infinity; nothing is exported"
        raise InputError("model.lr", expected="finite weights after the last step", received=received, hint="lower it")


class Best(NamedTuple):
    """The best checkpoint of a run."""

    state: dict[str, Tensor]  # the module's state_dict
    step: int
    why: str  # "val/tau_micro = 3.2", for people


def require_writable(folder: Path, argument: str) -> None:
    """Writes a file into the folder, so that a long run does not fail at its end. A folder made for it goes again."""
    made = [one for one in (folder, *folder.parents) if not one.exists()]  # the innermost first
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".dgd-write-test"
        probe.touch()
        probe.unlink(missing_ok=True)
        for one in made:
            one.rmdir()
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


def cosine_with_warmup(step: int, *, total: int, warmup: int, floor: float) -> float:
    """Learning-rate factor at ``step``: linear warm-up to 1, then a cosine down to ``floor`` at ``total`` steps."""
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def scheduled(optimizer: torch.optim.Optimizer, *, total: int, warmup: int, floor: float = 0.0) -> OptimizerLRScheduler:
    """An optimiser with that schedule, step by step, as Lightning takes it."""
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: cosine_with_warmup(step, total=total, warmup=warmup, floor=floor)
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
