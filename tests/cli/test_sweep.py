"""`dgd sweep`: trials are real runs, a killed sweep goes on with other draws, one folder is one sweep's."""

from __future__ import annotations

import csv
import io
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_tools import Config, Dgd, chat_row, check_error, write_jsonl
from fork_server import launch
from rich.console import Console

from dgd_lightning.cli import main
from dgd_lightning.commands.sweep import parse_options, read_setting
from dgd_lightning.commands.trials import LOCK, Sweep, alone
from dgd_lightning.errors import InputError
from dgd_lightning.report.sweep import curve, leaders

ARMS = [
    {"name": "plain", "method": "Speculative"},
    {"name": "adapted", "method": "Speculative", "ttt": True},
]
LAUNCH_SECONDS = 200  # to import everything on a crowded core
RANGE = {"model.ttt.lr": {"low": 0.001, "high": 0.1, "log": True}}


def sweep_yaml(tmp_path: Path, start: Path, /, **changes: Any) -> Path:
    settings = {
        "name": "hunt",
        "logs_dir": str(tmp_path / "logs"),
        "base": str(start),
        "arm": "adapted",
        "against": "plain",
        "trials": 2,
        "sampler": "grid",
        "search": {"model.ttt.steps": [0, 2]},
        **changes,
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def base(config: Config, tmp_path: Path) -> Path:
    two = write_jsonl(tmp_path / "two.jsonl", [chat_row(1, 0), chat_row(2, 0)])
    return config(
        {"arms": ARMS, "ttt": {"steps": 1, "lr": 0.02, "rank": 2, "anchors_per_step": 4}, "max_new_tokens": 4},
        {"path": str(two), "clbench": False, "batch_size": 2},
    )


def open_sweep(path: Path) -> Sweep:
    options = parse_options(["--config", str(path)])
    settings = [read_setting(key, value) for key, value in options.search.items()]
    return Sweep(options, settings, Path(options.logs_dir) / options.name)


def trials(folder: Path) -> list[dict[str, str]]:
    with (folder / "trials.csv").open() as file:
        return list(csv.DictReader(file))


class Stopped(Exception):
    """What ends a sweep in the middle."""


@pytest.fixture
def no_runs(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Trials that run nothing; returns the countdown after which one breaks, and how many there were."""
    state = {"until": 10**6, "stored": 0}

    def predict(self: Sweep, folder: str, chosen: dict[str, Any], device: int | None) -> int:
        state["stored"] += 1
        if state["stored"] >= state["until"]:
            raise Stopped
        return 0

    monkeypatch.setattr(Sweep, "_predict", predict)
    monkeypatch.setattr(Sweep, "_value", lambda self, folder: 0.5)
    monkeypatch.setattr(Sweep, "_write", lambda self: None)
    return state


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_its_best_runs(
    base: Path, dgd: Dgd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs stay in this process, where everything is imported already, but for the trial that is killed."""
    folder = tmp_path / "logs" / "hunt"
    with monkeypatch.context() as here:
        here.setattr(Sweep, "_predict", lambda self, folder, chosen, device: main(self._command(folder, chosen)))
        run = dgd("sweep", "--config", sweep_yaml(tmp_path, base, trials=1))
        assert run.code == 0, run.err
    finished = trials(folder)
    assert [row["trial"] for row in finished] == ["trial_000"]

    path = sweep_yaml(tmp_path, base)
    process = launch("sweep", "--config", path)
    deadline = time.monotonic() + LAUNCH_SECONDS
    while not list(folder.glob("trial_001/version_0/predictions*.jsonl")):  # the second trial is under way
        assert process.poll() is None, "the sweep ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()

    monkeypatch.setattr(Sweep, "_predict", lambda self, folder, chosen, device: main(self._command(folder, chosen)))
    run = dgd("sweep", "--config", path)
    assert run.code == 0, run.err
    assert "1 trials are there already" in run.out
    rows = trials(folder)
    assert rows[0] == finished[0]
    assert [row["trial"] for row in rows] == ["trial_000", "trial_001"]
    assert sorted(row["model.ttt.steps"] for row in rows) == ["0", "2"]
    assert float(next(row["tau_gain_median"] for row in rows if row["model.ttt.steps"] == "0")) == 0.0
    assert (folder / "curve_model_ttt_steps.png").stat().st_size > 5_000
    again = dgd("sweep", "--config", path)
    assert again.code == 0, again.err
    assert "2 trials are there already" in again.out
    assert trials(folder) == rows

    best = yaml.safe_load((folder / "best.yaml").read_text())
    assert best["model"]["init_args"]["ttt"]["steps"] in (0, 2)
    assert dgd("predict", "--config", folder / "best.yaml", "--logs_dir", tmp_path / "other").code == 0


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_stopped_sweep_draws_nothing_twice(base: Path, tmp_path: Path, no_runs: dict[str, int], sampler: str) -> None:
    path = sweep_yaml(tmp_path, base, sampler=sampler, trials=8, search=RANGE)
    no_runs["until"] = 4
    with pytest.raises(Stopped):
        open_sweep(path).run()
    no_runs["until"] = 10**6
    sweep = open_sweep(path)
    sweep.run()
    drawn = [trial.params["model.ttt.lr"] for trial in sweep.study.get_trials()]
    assert len(sweep._finished()) == 8
    assert len(set(drawn)) == len(drawn) == 9  # the one that broke as well


def test_a_trial_that_breaks_ends_the_sweep(base: Path, tmp_path: Path, no_runs: dict[str, int]) -> None:
    no_runs["until"] = 2
    sweep = open_sweep(sweep_yaml(tmp_path, base, sampler="random", trials=30, search=RANGE))
    with pytest.raises(Stopped):
        sweep.run()
    assert [trial.state.name for trial in sweep.study.get_trials()] == ["COMPLETE", "FAIL"]
    assert no_runs["stored"] == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"search": {"model.ttt.steps": [0, 2, 4]}},
        {"objective": "tau"},
        {"arm": "plain"},
        {"against": "adapted"},
        {"sampler": "random"},
        "base",
    ],
)
def test_a_folder_is_one_sweeps(
    base: Path, tmp_path: Path, no_runs: dict[str, int], changes: dict[str, Any] | str
) -> None:
    open_sweep(sweep_yaml(tmp_path, base)).run()
    assert len(open_sweep(sweep_yaml(tmp_path, base, trials=3, parallel=2))._finished()) == 2  # the same question
    if isinstance(changes, str):
        base.write_text(base.read_text() + "# another word\n")
    with pytest.raises(InputError, match=r"^name: .*logs/hunt.*another --name"):
        open_sweep(sweep_yaml(tmp_path, base, **({} if isinstance(changes, str) else changes)))


def test_a_sweep_that_has_no_trial_yet_may_change(base: Path, tmp_path: Path, no_runs: dict[str, int]) -> None:
    with pytest.raises(InputError, match=r"^sampler: "):
        open_sweep(sweep_yaml(tmp_path, base, search=RANGE)).run()
    open_sweep(sweep_yaml(tmp_path, base, search=RANGE, sampler="random")).run()


def test_two_sweeps_of_one_name_do_not_run_at_once(base: Path, dgd: Dgd, tmp_path: Path) -> None:
    folder = tmp_path / "logs" / "hunt"
    with alone(folder):
        check_error(dgd("sweep", "--config", sweep_yaml(tmp_path, base)), "name", str(folder), "another --name")
    with alone(folder):  # and it is free again
        assert (folder / LOCK).exists()


def test_curves_of_keys_that_end_alike_stay_apart(tmp_path: Path) -> None:
    rows = [{"data.seed": 0, "model.ttt.seed": 1, "tau": 2.0}, {"data.seed": 1, "model.ttt.seed": 1, "tau": 2.5}]
    paths = [curve(rows, key, "tau", tmp_path, listed=[0, 1]) for key in ("data.seed", "model.ttt.seed")]
    assert [path.name for path in paths] == ["curve_data_seed.png", "curve_model_ttt_seed.png"]
    assert all(path.is_file() for path in paths)


def test_curves_of_lists_and_ranges(tmp_path: Path) -> None:
    rows = [
        {"modules": ["fc"], "lr": 0.01, "tau": 2.0},
        {"modules": ["q_proj"], "lr": 0.5, "tau": 1.5},
    ]
    listed = [["q_proj"], ["fc"], [f"layer_{i}" for i in range(20)]]
    for path in (
        curve(rows, "modules", "tau", tmp_path, listed=listed),
        curve(rows, "lr", "tau", tmp_path, log=True),
    ):
        assert path.stat().st_size > 5_000


def test_the_best_trials_fit_a_terminal() -> None:
    modules = ["fc", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = {"model.ttt.lr": 1e-3, "model.ttt.modules": modules, "model.ttt.labels": "context"}
    scores = [0.1, -0.25, 0.3]
    rows = [{"trial": f"trial_{i:03d}", "tau_gain_median": score, **settings} for i, score in enumerate(scores)]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(leaders(rows, "tau_gain_median", list(settings)))
    lines = console.export_text().splitlines()
    found = [line.split()[:2] for line in lines if line.strip().startswith("trial_")]
    assert found == [["trial_002", "+0.3000"], ["trial_000", "+0.1000"], ["trial_001", "-0.2500"]]
    words = set(" ".join(lines).replace(",", " ").split())
    assert {*modules, "lr", "labels", "0.001", "context"} <= words
    twice = [{**row, "data.seed": 1, "model.ttt.seed": 2} for row in rows]
    columns = leaders(twice, "tau_gain_median", ["data.seed", "model.ttt.seed", "model.ttt.lr"]).columns
    assert [column.header for column in columns][2:] == ["data.seed", "model.ttt.seed", "lr"]


def test_failures_say_why_and_fixed_settings_are_not_told(
    base: Path, tmp_path: Path, no_runs: dict[str, int], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def fail(self: Sweep, folder: str, chosen: dict[str, Any], device: int | None) -> int:
        (self.root / f"{folder}.log").write_text("Traceback\ndgd: error: it is too hot\n")
        return 2

    monkeypatch.setattr(Sweep, "_predict", fail)
    search = {"model.ttt.steps": [0, 2], "data.seed": [1]}
    with pytest.raises(InputError, match="no trial that ended well"):
        open_sweep(sweep_yaml(tmp_path, base, search=search, trials=1)).run()
    assert capsys.readouterr().out == "trial_000: failed (dgd: error: it is too hot)  {'model.ttt.steps': 0}\n"


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"search": {"model.ttt.lr": {"low": 1.0, "high": 0.1}}}, "search.model.ttt.lr"),
        ({"search": {"model.ttt.lr": []}}, "search.model.ttt.lr"),
        ({"base": "nowhere.yaml"}, "base"),
        ({"trials": 0}, "trials"),
        ({"against": None}, "against"),
        ({"against": "plian"}, "against"),
        ({"arm": "adapter"}, "arm"),
        ({"search": {"model.ttt.lr": {"low": 0.1, "high": 1.0}}}, "sampler"),
    ],
)
def test_bad_sweeps_are_one_line(base: Path, dgd: Dgd, tmp_path: Path, changes: dict[str, Any], argument: str) -> None:
    check_error(dgd("sweep", "--config", sweep_yaml(tmp_path, base, **changes)), argument)


def test_a_base_without_arms_is_one_line(dgd: Dgd, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    for text in ("model: {class_path: Decoding}\n", "model: [\n", "", "\xff"):
        bad.write_bytes(text.encode("latin-1"))
        check_error(dgd("sweep", "--config", sweep_yaml(tmp_path, bad)), "base", "model.init_args.arms")
