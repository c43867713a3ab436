"""What sources say of classes is what jsonargparse finds by importing them; what is told of it is certain and quick."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from dgd_lightning.commands import catalogue
from dgd_lightning.commands.given import check_given, given
from dgd_lightning.commands.help import text
from dgd_lightning.commands.lightning import import_plugins
from dgd_lightning.decode.blending import Schedule
from dgd_lightning.decode.readouts.base import Readout
from dgd_lightning.errors import InputError
from dgd_lightning.methods.base import Method
from dgd_lightning.modules.arms import Arm
from dgd_lightning.modules.rows import DivergenceSettings
from dgd_lightning.ttt.config import TTTConfig

import_plugins()
KINDS: tuple[type, ...] = (LightningModule, LightningDataModule, Callback, Method, Readout, Schedule)
CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))


def subclasses(kind: type) -> Iterator[type]:
    for one in kind.__subclasses__():
        yield one
        yield from subclasses(one)


@pytest.mark.parametrize("kind", KINDS)
def test_classes_and_what_they_take_are_as_imported(kind: type) -> None:
    found = {one for one in subclasses(kind) if one.__module__.startswith("dgd_lightning.")}
    assert {one.__name__ for one in found} == set(catalogue.below(kind.__name__))
    for one in found:
        assert set(ArgumentParser().add_class_arguments(one)) == (catalogue.parameters(one.__name__) or {}).keys(), one


@pytest.mark.parametrize("kind", [TTTConfig, Arm, DivergenceSettings, Trainer])
def test_so_are_settings_and_the_trainer(kind: type) -> None:
    found = catalogue.trainer_parameters() if kind is Trainer else catalogue.parameters(kind.__name__)
    assert found is not None
    parser = ArgumentParser()
    assert {name.partition(".")[0] for name in parser.add_class_arguments(kind)} == found.keys()
    assert all(one.about for name, one in found.items() if name != "model_registry")


def told(*argv: str) -> str:
    """The argument and the hint of what is refused; empty where nothing is."""
    try:
        check_given(argv[0], given(argv))
    except InputError as error:
        return f"{error.argument}: {error.hint}"
    return ""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("subcommand", ["predict", "fit", "test", "validate"])
def test_no_packaged_configuration_is_refused(path: Path, subcommand: str) -> None:
    if path.parent.name != "sweeps":
        missing = told(subcommand, "--config", str(path))
        assert missing == "" or missing == "data.path: check the path"  # a path for the user to fill in


BASE = ("predict", "--config", "quickstart")
MISTAKES = {
    "--model.targt x": "model.targt: did you mean 'target'?",
    "--model.init_args.targt=x": "model.targt: did you mean 'target'?",
    "--model.ttt.stps 3": "model.ttt.stps: did you mean 'steps'?",
    "--model.ttt {stps: 3}": "model.ttt.stps: did you mean 'steps'?",
    "--data.subset.shre 0.1": "data.subset.shre: did you mean 'share'?",
    "--nme x": "--nme: did you mean 'name'?",
    "--trainer.deviecs 2": "--trainer.deviecs: did you mean 'trainer.devices'?",
    "--model Decodng": "model: did you mean 'Decoding'?",
    "--data.class_path PromptData": "data.class_path: did you mean 'PromptsData'?",
    "--trainer.callbacks+ DecodeMetric": "trainer.callbacks: did you mean 'DecodeMetrics'?",
    "--trainer.callbacks [ModelCheckpoin]": "trainer.callbacks[0]: did you mean 'ModelCheckpoint'?",
    "--model.arms [{name: a, method: Guidd}]": "model.arms[a].method: did you mean 'Guided'?",
    "--model.arms+ {name: a, methd: Guided}": "model.arms.methd: did you mean 'method'?",
    "--model.arms [{name: a, method: {class_path: Guided, init_args: {bta: 1}}}]":
        "model.arms[a].method.bta: did you mean 'beta'?",
    "--model.arms [{name: a, method: {class_path: Guided, init_args: {schedule: {class_path: WarmUpp}}}}]":
        "model.arms[a].method.schedule.class_path: did you mean 'WarmUp'?",
    "--data PromptsData --data.path nowhere.txt": "data.path: check the path",
    "--data ContextsData --data.path nowhere.jsonl": "data.path: check the path",
    "--model.target ./nowhere": "target: check the path",
    "--ckpt_path nowhere.ckpt": "ckpt_path: give the path of one, such as logs/NAME/version_N/checkpoints/last.ckpt",
}  # fmt: skip


def words(options: str) -> list[str]:
    """Options and their values, which may hold spaces."""
    parts = [f"--{part}".strip() for part in options.split("--")[1:]]
    return [word for part in parts for word in (part.split(" ", 1) if "=" not in part.split(" ")[0] else [part])]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def quickstart() -> str:
    return str(next(path for path in CONFIGS if path.stem == "quickstart"))


@pytest.mark.parametrize("options", MISTAKES)
def test_what_is_misspelt_or_missing_is_told_with_the_nearest_name(quickstart: str, options: str) -> None:
    assert told("predict", "--config", quickstart, *words(options)) == MISTAKES[options]


@pytest.mark.parametrize(
    "options",
    [
        "--model json.JSONDecoder --data Promps",  # a module of one's own may have it
        "--data.sizes [3] --data PromptsData --data.path /dev/null",  # LabContexts' is dropped by the parser
        "--trainer.logger.save_dir x --trainer.callbacks ModelCheckpoint --trainer.callbacks.monitor x",
        "--trainer.callbacks OnEpochEnd.yaml",
        "--data HubData --data.path owner/data.jsonl",
        "--data HubData --data.path squad",
        "--model.target no/where",
        "--model.arms [{name: a, method: {class_path: Guided, init_args: {beta: 1, readout: drfat}}}]",
        "--trainer.callbacks LambdaCallback",
        "--trainer.callbacks SaveConfigCallback",  # of another of Lightning's files
        "--verbose --print_config=skip_default --return_predictions true",
        "--ckpt_path best",
    ],
)
def test_what_is_not_certain_is_left_to_the_parser(quickstart: str, options: str, tmp_path: Path) -> None:
    (tmp_path / "best").touch()
    assert told("predict", "--config", quickstart, *words(options)) == ""


def test_help_of_a_class_has_all_that_it_takes_with_its_docstring() -> None:
    shown = text(["predict", "--model.arms.help"]) or ""
    for name in ("name", "method", "temperature", "top_k", "top_p", "ttt", "online_every"):
        assert f"--model.arms.{name} " in shown or f"--model.arms.{name}\n" in shown
    assert "0 for greedy decoding. (float, default 0.0)" in shown
    assert "optimiser steps; 0 adapts nothing. (int, default 10)" in (text(["predict", "--model.ttt.help"]) or "")
    assert "--model.ttt.steps" in (text(["fit", "--model", "TestTimeTraining", "--model.ttt.help"]) or "")
    for argv in (["--data.help", "HubData"], ["--data.help=dgd_lightning.data.prompts.HubData"]):
        shown = text(["predict", *argv]) or ""
        assert all(f"--data.{name}" in shown for name in ("path", "split", "field", "batch_size", "clbench"))
    assert "LogitLens" in (text(["predict", "--model.arms.method.readout.help"]) or "")
    assert "--trainer.devices" in (text(["predict", "--help.trainer"]) or "")
    assert text(["predict", "--model.help", "my.Own"]) is None  # the parser imports it
    assert text(["predict", "--model.target", "x"]) is None


@pytest.mark.parametrize("subcommand", ["predict", "fit", "test", "validate"])
def test_help_is_short_and_names_what_can_be_used(subcommand: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    shown = text([subcommand, "--help"]) or ""
    assert len(shown.splitlines()) < 100
    assert max(map(len, shown.splitlines())) <= 120
    for name in ("--name", "--config", "Decoding", "PromptsData", "Guided", "Noise", "WarmUp", "CaseStudies"):
        assert name in shown
    for base in ("TaskData", "LicensedData", "FinishedRows", "RankZeroProgress", "FailedStart", "--trainer.devices"):
        assert base not in shown


def spent(*argv: str) -> tuple[int, float, str]:
    """Exit code, CPU seconds, and what a process of the command printed."""
    program = "import sys; from dgd_lightning.cli import main; code = main(sys.argv[1:]); "
    program += "assert 'torch' not in sys.modules; sys.exit(code)"
    before = os.times()
    run = subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, text=True, check=False)
    after = os.times()
    used: Any = after.children_user + after.children_system - before.children_user - before.children_system
    return run.returncode, used, run.stdout + run.stderr


def test_help_and_mistakes_cost_little() -> None:
    """In processes of their own: torch alone would take longer, and is not imported."""
    code, seconds, shown = spent("predict", "--help")
    assert (code, shown.startswith("usage: dgd predict")) == (0, True)
    assert seconds < 3  # a third of it, where nothing else wants the machine
    code, seconds, shown = spent(*BASE, "--trainer.callbacks", "ModelCheckpoin")  # the dearest: Lightning is looked at
    assert (code, shown.count("\n")) == (2, 1)
    assert seconds < 3
