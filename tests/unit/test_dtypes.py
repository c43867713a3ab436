"""``dtype: auto``: the checkpoint's where the device computes it natively, else float32; what a run says of it."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import hf_model

from dgd_lightning import run_folder
from dgd_lightning.commands.configs import packaged
from dgd_lightning.methods.autoregressive import Autoregressive
from dgd_lightning.modules.arms import Arm
from dgd_lightning.modules.decoding import Decoding
from dgd_lightning.modules.pair_source import PairSource
from dgd_lightning.target import dtypes
from dgd_lightning.target.load import load_target

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint in bfloat16."""
    hf_model("llama", dtype=torch.bfloat16, num_hidden_layers=1).save_pretrained(tmp_path / "t")
    return tmp_path / "t"


@pytest.fixture(autouse=True)
def warned_of_nothing() -> Iterator[None]:
    dtypes.warn_if_slow.cache_clear()
    yield
    dtypes.warn_if_slow.cache_clear()


def trainer(precision: str = "32-true") -> Any:
    strategy = SimpleNamespace(root_device=CPU, broadcast=lambda value: value)
    return SimpleNamespace(strategy=strategy, precision=precision, world_size=1)


def native(monkeypatch: pytest.MonkeyPatch, *kinds: torch.dtype) -> None:
    """A CPU with instructions for these half-width dtypes only."""
    monkeypatch.setattr(dtypes, "_cpu_has", lambda dtype: dtype in kinds)


def test_auto_is_the_checkpoints_where_that_is_native(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native(monkeypatch, torch.bfloat16)
    assert load_target(folder, device="cpu").dtype == torch.bfloat16
    native(monkeypatch)
    with pytest.warns(UserWarning, match=r"^dtype auto: float32, as this cpu does not compute .* bfloat16 natively$"):
        assert load_target(folder, device="cpu").dtype == torch.float32


def test_the_checkpoints_dtype_is_found_without_its_name_too(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert dtypes.stored_dtype(folder, config) == torch.bfloat16
    assert dtypes.stored_dtype(folder, {"torch_dtype": "float16"}) == torch.float16
    assert dtypes.stored_dtype(folder, {}) == torch.bfloat16  # of the weights


@pytest.mark.parametrize(
    ("capability", "dtype", "fine"),
    [((8, 0), "bfloat16", True), ((7, 5), "bfloat16", False), ((7, 5), "float16", True), ((9, 0), "float64", True)],
)
def test_of_a_gpu_its_capability_tells(
    capability: tuple[int, int], dtype: str, fine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert dtypes.is_native(getattr(torch, dtype), torch.device("cuda", 0)) is fine


def test_other_devices() -> None:
    assert not dtypes.is_native(torch.float64, torch.device("mps"))
    assert all(dtypes.is_native(kind, torch.device("mps")) for kind in (torch.float16, torch.bfloat16, torch.float32))
    assert all(dtypes.is_native(kind, CPU) for kind in (torch.float32, torch.float64))


def test_an_explicit_slow_dtype_warns_once_with_how_slow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native(monkeypatch)
    monkeypatch.setattr(dtypes, "seconds_of_product", {torch.bfloat16: 6.4, torch.float32: 1.0}.__getitem__)
    with pytest.warns(UserWarning, match=r"^dtype bfloat16 on a CPU .* took 6\.4 times as long as in float32"):
        load_target(folder, dtype="bfloat16", device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_target(folder, dtype="bfloat16", device="cpu").dtype == torch.bfloat16
    with pytest.warns(UserWarning, match=r"^trainer\.precision bf16-mixed on a CPU .* 6\.4 times"):
        PairSource(str(folder), None, dtype="float32").load(trainer("bf16-mixed"))


def test_products_are_timed() -> None:
    assert dtypes.seconds_of_product(torch.float32) > 0


def test_a_run_says_and_hashes_what_auto_came_to(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hashes = []
    data = SimpleNamespace(fingerprint=lambda: "of the data")
    for kinds, dtype in ([torch.bfloat16], "auto"), ([], "auto"), ([], "float32"), ([], "bfloat16"):
        native(monkeypatch, *kinds)
        module: Any = Decoding(str(folder), None, [Arm("plain", Autoregressive())], dtype=dtype)
        by_word = run_folder.config_hash(module, data)
        module.trainer = trainer()
        hashes.append(run_folder.config_hash(module, data))
        assert (hashes[-1] == by_word) == (dtype != "auto")
        if dtype == "auto":
            assert str(module.source.load(module.trainer).target.dtype) in ("torch.bfloat16", "torch.float32")
    assert hashes[1] == hashes[2] != hashes[0] == hashes[3]
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("dtype")]
    assert said == [
        "dtype auto: bfloat16, the checkpoint's",
        "dtype auto: float32, as this cpu does not compute the checkpoint's bfloat16 natively",
    ]
    (tmp_path / "run" / "version_0").mkdir(parents=True)
    (tmp_path / "run" / "version_0" / "provenance.json").write_text('{"config_hash": "word"}')
    assert run_folder.choose_version(tmp_path / "run", "now", "word") == 1
    assert "version_0 is unfinished, but began when `dtype: auto`" in capsys.readouterr().out


def test_templates_for_a_cpu_have_no_bfloat16() -> None:
    texts = {name: path.read_text(encoding="utf-8") for name, path in packaged().items()}
    on_cpu = {name for name, text in texts.items() if "cpu" in name or re.search("accelerator: cpu|target: lab", text)}
    assert on_cpu
    assert not [name for name in on_cpu if re.search("bfloat16|bf16", texts[name])]
