"""`Provenance`: what made a run, in `provenance.json`, written before anything is loaded."""

import datetime
import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

import dgd_lightning
from dgd_lightning import run_folder
from dgd_lightning.errors import InputError
from dgd_lightning.files import whole_files

PACKAGES = ("dgd-lightning", "torch", "lightning", "transformers", "tokenizers", "peft", "torchmetrics", "datasets")


class Provenance(Callback):
    """Writes code, versions, command line, hardware and hashes; a continued run adds a session to the file.

    A run that is continued by other code or versions warns of what differs.

    Environment variables are never written: they may hold keys.
    """

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Writes the file on rank 0, unless the folder is another configuration's."""
        log_dir = trainer.log_dir  # a collective: every rank asks
        if not trainer.is_global_zero or log_dir is None:
            return
        path = Path(log_dir) / run_folder.PROVENANCE
        hashes: dict[str, Any] = {}
        data = trainer.datamodule  # type: ignore[attr-defined]
        if hasattr(data, "fingerprint"):
            hashes["data_hash"] = data.fingerprint()
            hashes["data_commit"] = getattr(data, "data_commit", None)  # of the Hub, as its revision was looked up
            if hasattr(pl_module, "row_names"):  # its fingerprint says what shapes the rows
                hashes["config_hash"] = run_folder.config_hash(pl_module, data)
        if hasattr(pl_module, "fingerprint"):
            hashes["model"] = pl_module.fingerprint()  # Hub ids with their commits
        earlier: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        ours, theirs = hashes.get("config_hash"), earlier.get("config_hash")
        if theirs is not None and theirs != ours:
            expected, received = f"a run folder of configuration {ours}", f"{path.parent}, which is that of {theirs}"
            raise InputError("logs_dir", expected=expected, received=received, hint="use another folder or name")
        # a resumed fit may read other data than before: each session names its own
        this = {**session(trainer), "data_hash": hashes.get("data_hash")}
        before = earlier.get("sessions", [])
        if changes := changed_versions(before, this):
            rank_zero_warn(
                f"{path.parent} is continued by other versions, so its rows may differ in their last digits or more: "
                + ", ".join(changes)
            )
        record = {**hashes, "sessions": [*before, this]}
        with whole_files(path.parent, path.name) as scratch:
            (scratch / path.name).write_text(json.dumps(record, indent=1) + "\n")


def session(trainer: Trainer) -> dict[str, Any]:
    """One start of the run."""
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "argv": sys.argv,
        "git": git_state(Path(dgd_lightning.__file__).parent),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "hardware": {
            "machine": platform.machine(),
            "system": f"{platform.system()} {platform.release()}",
            "cpu_threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in gpus],
            "cuda": torch.version.cuda,
        },
        "ranks": trainer.world_size,
        "strategy": type(trainer.strategy).__name__,
    }


def changed_versions(before: Sequence[dict[str, Any]], now: dict[str, Any]) -> list[str]:
    """What differs from some earlier session of a run: ``torch 2.9.0 → 2.9.1``."""
    latest: dict[str, str] = {}
    ours = _code(now)
    for name, value in (item for one in before for item in _code(one).items()):
        if value != ours.get(name):
            latest[name] = f"{name} {value} → {ours.get(name)}"
    return list(latest.values())


def _code(one: dict[str, Any]) -> dict[str, Any]:
    """What a session ran, by name; None where it is not known."""
    git = one.get("git") or {"sha": None, "diff_hash": "clean"}
    changes = "" if git["diff_hash"] == "clean" else f" with changes {git['diff_hash']}"
    commit = git["sha"] and git["sha"][:10] + changes
    return {"python": one.get("python"), **one.get("versions", {}), "git": commit}


def git_state(folder: Path) -> dict[str, str] | None:
    """Commit and a hash of the changes on top of it; None where no repository tracks the package in ``folder``."""

    def git(*arguments: str) -> bytes:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, check=True, capture_output=True, timeout=30).stdout

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # else: installed somewhere inside another repository
        sha, changes = git("rev-parse", "HEAD").decode().strip(), git("diff", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"sha": sha, "diff_hash": hashlib.sha256(changes).hexdigest()[:16] if changes else "clean"}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
