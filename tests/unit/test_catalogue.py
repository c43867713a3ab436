"""What sources say of classes is what jsonargparse finds by importing them; what is told of it is certain and quick."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from dgd_lightning.commands import catalogue
from dgd_lightning.commands.given import given
from dgd_lightning.commands.help import text
from dgd_lightning.commands.lightning import import_plugins
from dgd_lightning.commands.mistakes import check_given
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
        model = yaml.safe_load(path.read_text())["model"]["class_path"]
        own = {"Decoding": "predict", "Diagnostic": "test"}.get(model, subcommand)
        missing = told(subcommand, "--config", str(path))
        if own != subcommand:
            assert missing == f"subcommand: run `dgd {own}`"
        else:
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
    "--config {name: a, name: b}": "--config: correct line 1, or the one before it",
    "--config {data: {class_path: LabContexts, init_args: {limit: 1, limit: 2}}}":
        "--config: correct line 1, or the one before it",
    "--config &a {model: *a}": "--config: correct line 1, or the one before it",
    "--config {ckpt_path: [x]}": "ckpt_path: give the path of one, such as logs/NAME/version_N/checkpoints/last.ckpt",
    "--config [1, 2]": "--config: see `dgd configs`",
    "--config": "--config: write --config VALUE",
    "--config=": "--config: write --config VALUE",
    "--config {1: x}": "1: remove it, or see `--help`",
    "--config {data: {class_path: LabContexts, init_args: {1: x}}}": "data.1: remove it, or use one of ",
    "--config {model: {class_path: Decoding, init_args: [1]}}": "model.init_args: write init_args: {key: value}",
    "--config {data: {class_path: LabContexts, seed: 1}}":
        "data: write {class_path: LabContexts, init_args: {seed: 1}}",
    "--config {model: [1, 2]}": "model: see `--model.help`",
    "--config {trainer: [1]}": "trainer: correct the value",
    "--config {seed_everything: x}": "seed_everything: correct the value",
    "--data.limit": "--data.limit: write --data.limit VALUE",
    "--data.limit --verbose": "--data.limit: write --data.limit VALUE",
    "--verbose yes": "--verbose: write --verbose alone",
    "--check=true": "--check: write --check alone",
    "--verbose=": "--verbose: write --verbose alone",
    "--model [1, 2]": "model: see `--model.help`",
    "--model.ttt [1]": "model.ttt: see `--model.ttt.help`",
    "--model.ttt fast": "model.ttt: see `--model.ttt.help`",
    "--model.arms plain": "model.arms: see `--model.arms.help`",
    "--model.arms [{method: Speculative}]":
        "model.arms[0].name: set it in the YAML or on the command line",
    "--model.arms [{name: a, method: Guided}]":
        "model.arms[a].method.beta: set it in the YAML or on the command line",
    "--model.arms [{name: a, method: {class_path: Guided, init_args: {beta: big}}}]":
        "model.arms[a].method.beta: correct the value",
    "--model.arms.temperature warm": "model.arms.temperature: correct the value",
    "--model.arms [{name: a, method: {class_path: Rerank, init_args: {block_size: 1}}}]":
        "model.arms[a].method.block_size: use e.g. 2",
    "--data.limit x": "data.limit: correct the value",
    "--data.limit -1": "data.limit: use e.g. 1",
    "--data.limit=": "data.limit: correct the value",
    "--data.limit 1.5": "data.limit: correct the value",
    "--data.families tariff": "data.families: correct the value",
    "--model.stop_token_ids+ x": "model.stop_token_ids: correct the value",
    "--model.ttt.steps -1": "model.ttt.steps: use e.g. 0",
    "--model.ttt.labels contxt": "model.ttt.labels: did you mean 'context'?",
    "--model.cpu_threads 0": "model.cpu_threads: use e.g. 1",
    "--trainer.max_epochs many": "trainer.max_epochs: correct the value",
    "--trainer.devices 0": "trainer.devices: use 1",
    "--trainer.logger CSVLoger": "trainer.logger: did you mean 'CSVLogger'?",
    "--seed_everything abc": "seed_everything: correct the value",
    "--name ../x": "name: use letters, digits, '-', '_' and '.'; where the folder goes is for logs_dir to say",
    "--data LabContext": "data: did you mean 'LabContexts'?",
    "--model nowhere.Own": "model: check class_path, and that the folder of its file is on PYTHONPATH",
    "--data json.Nowhere": "data: check class_path, and that the folder of its file is on PYTHONPATH",
    "--trainer.callbacks+ lightning.pytorch.callbacks.ModelCheckpoin":
        "trainer.callbacks: check class_path, and that the folder of its file is on PYTHONPATH",
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
    shown = told("predict", "--config", quickstart, *words(options))
    assert shown.startswith(MISTAKES[options]) if MISTAKES[options].endswith(" ") else shown == MISTAKES[options]


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["data.limit", "3"], "write --data.limit"),
        (["data.limit=3"], "write --data.limit"),
        (["-limit", "3"], "see `dgd predict --help`"),
        (["quickstart"], "write --config quickstart"),
        (["own.yaml"], "write --config own.yaml"),
        (["--data.limit", "3", "4"], "see `dgd predict --help`"),
    ],
)
def test_words_without_an_option_are_told(quickstart: str, argv: list[str], hint: str, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").touch()
    assert told("predict", "--config", quickstart, *argv) == f"command line: {hint}"


@pytest.mark.parametrize("content", ["", "# nothing\n", "- a\n", "3\n"])
def test_a_file_that_maps_no_keys_is_told(content: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(content)
    assert told("predict", "--config", "x.yaml") == "--config: see `dgd configs`"


def test_a_configuration_without_a_model_is_told(tmp_path: Path) -> None:
    assert told("predict", "--config", "{name: x}") == "model: set model.class_path"
    os.mkfifo(tmp_path / "pipe")  # which the parser reads: it may name one
    assert told("predict", "--config", "pipe", "--name", "x") == ""


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
        "--data.limit 0x10 --model.ttt.lr 1e-3 --model.warmup yes --data.families+ tariff --name 3",
        "--model.arms.temperature 1.0 --model.arms+ {name: x, method: Speculative} --model.arms.name y",
        "--config {data: {class_path: LabContexts, init_args: {limit: '3', families+: [ledger]}}}",
        "--data PromptsData --data.path /dev/null --data.template {question} --data.system [a] --data.field {a: 1}",
        "--config {model: {class_path: Decoding, init_args: {ttt: {class_path: TTTConfig, init_args: {steps: 3}}}}}",
        "--data.limit -1 --data.limit 2",  # the last one counts
        "--data.limit null --trainer.logger false --trainer.max_epochs -1 --logs_dir - a",
        "--trainer.logger CSVLogger --trainer.logger.save_dir x --trainer.callbacks.output_dir x",
        "--model json.decoder.JSONDecoder --model.x 1",
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
    assert "CSVLogger" in (text(["predict", "--trainer.logger.help"]) or "")
    assert "--trainer.strategy" in (text(["predict", "--trainer.strategy.help"]) or "")
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
