"""What is typed last is what runs: a list replaces a list, and another class drops the old one's settings.

These tests also say whether a new version of jsonargparse still merges where :mod:`dgd_lightning.commands.reading`
expects it.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from pydoc import locate
from typing import Any, NoReturn

import pytest
import quick_parser
import yaml
from jsonargparse import ArgumentParser

from dgd_lightning.commands.lightning import ProjectCLI, import_plugins
from dgd_lightning.commands.reading import replacing
from dgd_lightning.commands.sweep import parse_options

ROOT = Path(__file__).parents[2] / "configs"
CONFIGS = sorted(ROOT.rglob("*.yaml"))
RUNS = [path for path in CONFIGS if path.parent.name != "sweeps"]


class Built(Exception):
    """Raised with the parser, where it would begin to read."""


class BuildOnly(ProjectCLI):
    def parse_arguments(self, parser: Any, args: Any) -> NoReturn:
        raise Built(parser)


@pytest.fixture(scope="module", autouse=True)
def _quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patches:
        quick_parser.patch(patches)
        yield


@cache
def parser(subcommand: str) -> ArgumentParser:
    import_plugins()
    with pytest.raises(Built) as built:
        BuildOnly([subcommand])
    return built.value.args[0]


def resolved(subcommand: str, *argv: str) -> dict[str, Any]:
    """What is read, without the defaults of what nobody named."""
    with replacing():
        return as_it_is(subcommand, *argv)


def as_it_is(subcommand: str, *argv: str) -> dict[str, Any]:
    """The same by jsonargparse alone."""
    found = parser(subcommand).parse_args([subcommand, *argv], defaults=False)[subcommand].as_dict()
    found.pop("config", None)
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain


def lists_in(value: Any, path: str = "") -> Iterator[tuple[str, list[Any]]]:
    """The lists that a key of the command line names."""
    if isinstance(value, list):
        yield path, value
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from lists_in(one, f"{path}.{key}".lstrip("."))


def spoilt(value: Any, kind: Any = None) -> Any:
    """Another value of the same shape that sets all that a class has numbers and switches for."""
    if isinstance(value, list):
        return [spoilt(one, kind) for one in value[1:] + value[:1]]
    if not isinstance(value, dict):
        return value
    if "class_path" in value:
        inner = spoilt(value.get("init_args", {}), locate(value["class_path"]))
        return {**value, "init_args": inner}
    usual = {key: one.default for key, one in inspect.signature(kind).parameters.items()} if kind else {}
    more = {key: one + 1 for key, one in usual.items() if type(one) in (int, float)}
    more |= {key: not one for key, one in usual.items() if isinstance(one, bool)}
    return more | {key: spoilt(one) for key, one in value.items()}


def kind_of_entries(config: dict[str, Any], key: str) -> Any:
    """The class of a list's entries where they do not name it: `Arm` of ``model.init_args.arms``."""
    part, *inner = key.split(".")
    if part == "trainer" or len(inner) > 2:
        return None
    hint = typing.get_type_hints(locate(config[part]["class_path"]).__init__)[inner[-1]]
    return next(filter(dataclasses.is_dataclass, typing.get_args(hint)), None)


def as_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6)


def set_at(value: dict[str, Any], path: str, one: Any) -> dict[str, Any]:
    *parents, last = path.split(".")
    holder = value
    for name in parents:
        holder = holder.setdefault(name, {})
    holder[last] = one
    return value


LENGTHS = {"same": lambda one: one, "shorter": lambda one: one[:-1], "longer": lambda one: one + one[:1]}


@pytest.mark.parametrize("path", RUNS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_list_of_every_configuration_is_what_was_typed_last(path: Path) -> None:
    """Whatever the list before it held, in a file or on the command line; those in an entry of a list with it."""
    wanted = resolved("predict", "--config", str(path))
    lists = dict(lists_in(wanted))
    typed: dict[str, Any] = {}
    for key, one in lists.items():
        set_at(typed, key, one)
    for change in LENGTHS.values():
        before = copy.deepcopy(wanted)
        for key, one in lists.items():
            set_at(before, key, change(spoilt(one, kind_of_entries(wanted, key))))
        for last in ([f"--{key}={as_yaml(one)}" for key, one in lists.items()], ["--config", as_yaml(typed)]):
            assert resolved("predict", "--config", as_yaml(before), *last) == wanted


BASE = """
model:
  class_path: Decoding
  init_args:
    target: lab
    draft: lab
    ttt: {steps: 3, modules: [fc, q_proj]}
    arms:
    - {name: a, method: {class_path: Guided, init_args: {beta: 0.3, plausibility: 0.5}}, temperature: 1.0}
    - {name: b, method: Speculative}
data:
  class_path: LabContexts
  init_args: {families: [tariff], batch_size: 3}
trainer:
  callbacks: [{class_path: Timer, init_args: {verbose: false}}]
  logger: {class_path: CSVLogger, init_args: {save_dir: x}, dict_kwargs: {flush_logs_every_n_steps: 7}}
"""
A, B = yaml.safe_load(BASE)["model"]["init_args"]["arms"]
B["method"] = {"class_path": "Speculative"}
C = "{name: c, method: {class_path: Guided, init_args: {beta: 0.1}}}"
TYPED = {  # what is typed behind it: a key, and what there is then
    f"--model.arms=[{C}]": ("arms", [yaml.safe_load(C)]),
    f"--model.arms=[{C}, {C}]": ("arms", [yaml.safe_load(C)] * 2),
    f"--model={{init_args: {{arms: [{C}, {C}]}}}}": ("arms", [yaml.safe_load(C)] * 2),
    "--model.arms=[]": ("arms", []),
    f"--model.arms+={C}": ("arms", [A, B, yaml.safe_load(C)]),
    f"--model.arms+=[{C}, {C}]": ("arms", [A, B, yaml.safe_load(C), yaml.safe_load(C)]),
    f"--config={{model: {{init_args: {{arms+: [{C}]}}}}}}": ("arms", [A, B, yaml.safe_load(C)]),
    "--model.arms.temperature=0.5": ("arms", [A, {**B, "temperature": 0.5}]),  # of the last one
    "--model.arms.method=Autoregressive": ("arms", [A, {**B, "method": {"class_path": "Autoregressive"}}]),
    f"--model.arms=[{C}] --model.arms.method=Speculative": (
        "arms", [{"name": "c", "method": {"class_path": "Speculative"}}]
    ),
    "--model.ttt.steps=4": ("ttt", {"steps": 4, "modules": ["fc", "q_proj"]}),
    "--model.ttt={steps: 4}": ("ttt", {"steps": 4, "modules": ["fc", "q_proj"]}),
    "--model.ttt.modules=[k_proj]": ("ttt", {"steps": 3, "modules": ["k_proj"]}),
    "--data.seed=1": (
        "data", {"class_path": "LabContexts", "init_args": {"families": ["tariff"], "batch_size": 3, "seed": 1}}
    ),
    "--data=dgd_lightning.lab.contexts.LabContexts": (
        "data", {"class_path": "LabContexts", "init_args": {"families": ["tariff"], "batch_size": 3}}
    ),
    "--data=PromptsData --data.path=x": ("data", {"class_path": "PromptsData", "init_args": {"path": "x"}}),
    "--config={data: {class_path: PromptsData, init_args: {path: x}}}": (
        "data", {"class_path": "PromptsData", "init_args": {"path": "x"}}
    ),
    "--trainer.callbacks=[Timer]": ("callbacks", [{"class_path": "Timer"}]),
    "--trainer.callbacks=[LearningRateMonitor]": ("callbacks", [{"class_path": "LearningRateMonitor"}]),
    "--trainer.callbacks=Timer": ("callbacks", {"class_path": "Timer"}),
    "--trainer.callbacks.interval=epoch": (
        "callbacks", [{"class_path": "Timer", "init_args": {"verbose": False, "interval": "epoch"}}]
    ),
    "--trainer.logger={class_path: TensorBoardLogger, init_args: {save_dir: y}}": (
        "logger", {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "y"}}
    ),
    "--trainer.logger.name=z": (
        "logger",
        {"class_path": "CSVLogger", "init_args": {"save_dir": "x", "name": "z", "flush_logs_every_n_steps": 7}},
    ),
}  # fmt: skip


def short(value: Any) -> Any:
    """Class paths as people write them, and no ``init_args`` where there are none."""
    if isinstance(value, list):
        return [short(one) for one in value]
    if not isinstance(value, dict):
        return value
    kept = {key: short(one) for key, one in value.items() if one != {}}
    return {key: one.rpartition(".")[2] if key == "class_path" else one for key, one in kept.items()}


@pytest.mark.parametrize("typed", TYPED)
def test_what_is_typed_replaces_what_it_names_and_nothing_else(typed: str) -> None:
    options = [f"--{one}" for one in typed.removeprefix("--").split(" --")]
    before, found = (short(resolved("predict", "--config", BASE, *more)) for more in ([], options))
    part = found["model"]["init_args"] | found["trainer"] | {"data": found["data"]}
    name, wanted = TYPED[typed]
    assert part.pop(name) == wanted
    untouched = before["model"]["init_args"] | before["trainer"] | {"data": before["data"]}
    assert part == {key: one for key, one in untouched.items() if key != name}


def test_jsonargparse_alone_would_mix_them() -> None:
    """Else `reading.py` is not needed any more."""
    argv = (
        "predict",
        "--config",
        BASE,
        "--model.arms=[{name: c, method: Speculative}, {name: d, method: Speculative}]",
    )
    for found, temperatures in ((as_it_is, [1.0, None]), (resolved, [None, None])):
        arms = found(*argv)["model"]["init_args"]["arms"]
        assert [arm.get("temperature") for arm in arms] == temperatures


def test_a_sweep_searches_the_values_that_were_typed_last() -> None:
    given = str(next(path for path in CONFIGS if path.parent.name == "sweeps"))
    search = yaml.safe_load(Path(given).read_text())["search"]
    lists = {key: one for key, one in search.items() if isinstance(one, list)}
    for change in LENGTHS.values():
        typed = {key: change(one[::-1]) for key, one in lists.items()}
        for last in (["--search", as_yaml(typed)], ["--config", as_yaml({"search": typed})]):
            assert parse_options(["--config", given, *last]).search == typed
