"""`dgd sweep`: trials are real runs, a killed sweep goes on, the best configuration runs."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_tools import Config, Dgd, check_told

pytest.importorskip("optuna")
ARMS = [
    {"name": "plain", "method": "speculative"},
    {"name": "adapted", "method": "speculative", "ttt": True},
]


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
def base(config: Config, contexts: Path) -> Path:
    ttt = {"steps": 1, "lr": 0.02, "rank": 2, "anchors_per_step": 4}
    return config(
        {"arms": ARMS, "ttt": ttt, "max_new_tokens": 6},
        {"path": str(contexts), "clbench": False, "batch_size": 6},
    )


def trials(folder: Path) -> list[dict[str, str]]:
    with (folder / "trials.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_killed_sweep_goes_on_and_its_best_runs(base: Path, dgd: Dgd, tmp_path: Path) -> None:
    path, folder = sweep_yaml(tmp_path, base), tmp_path / "logs" / "hunt"
    command = [sys.executable, "-m", "dgd_lightning.cli", "sweep", "--config", str(path)]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not list(folder.glob("trial_*/version_0/predictions.jsonl")):  # the first trial is as good as done
        assert process.poll() is None, "the sweep ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()

    run = dgd("sweep", "--config", path)
    assert run.code == 0, run.err
    rows = trials(folder)
    assert sorted(row["model.ttt.steps"] for row in rows) == ["0", "2"]
    assert float(next(row["tau_gain_median"] for row in rows if row["model.ttt.steps"] == "0")) == 0.0
    assert (folder / "curve_steps.png").stat().st_size > 5_000
    again = dgd("sweep", "--config", path)
    assert again.code == 0, again.err
    assert "2 trials are there already" in again.out
    assert trials(folder) == rows

    best = yaml.safe_load((folder / "best.yaml").read_text())
    assert best["model"]["init_args"]["ttt"]["steps"] in (0, 2)
    assert dgd("predict", "--config", folder / "best.yaml", "--logs_dir", tmp_path / "other").code == 0


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"search": {"model.ttt.lr": {"low": 1.0, "high": 0.1}}}, "search.model.ttt.lr"),
        ({"search": {"model.ttt.lr": []}}, "search.model.ttt.lr"),
        ({"base": "nowhere.yaml"}, "base"),
        ({"trials": 0}, "trials"),
        ({"against": None}, "against"),
        ({"search": {"model.ttt.lr": {"low": 0.1, "high": 1.0}}}, "sampler"),
    ],
)
def test_bad_sweeps_are_one_line(base: Path, dgd: Dgd, tmp_path: Path, changes: dict[str, Any], argument: str) -> None:
    check_told(dgd("sweep", "--config", sweep_yaml(tmp_path, base, **changes)), argument)
