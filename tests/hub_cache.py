"""A Hugging Face Hub cache built on disk, so that revisions can be tested without the network."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

OLD, NEW = "a" * 40, "b" * 40  # commits


def add_snapshot(cache: Path, hub_id: str, commit: str, folder: Path) -> None:
    """Puts a checkpoint into the cache as this commit's files."""
    shutil.copytree(folder, _repository(cache, hub_id) / "snapshots" / commit)


def set_ref(cache: Path, hub_id: str, name: str, commit: str) -> None:
    """Makes a branch or tag stand for a commit."""
    path = _repository(cache, hub_id) / "refs" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(commit)


def use(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the Hub's client read this cache, offline; for another process set HF_HUB_CACHE and HF_HUB_OFFLINE."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))


def _repository(cache: Path, hub_id: str) -> Path:
    return cache / f"models--{hub_id.replace('/', '--')}"
