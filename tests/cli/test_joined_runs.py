"""`model.join_arms` of `dgd predict`: several guided arms are one batch, with the rows of runs without it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_tools import SHORT_FIT, Config, Dgd, predictions

from dgd_lightning import run_folder
from dgd_lightning.methods import guided as guided_module

SWEEP = Path(__file__).parents[2] / "configs" / "guided" / "sweep.yaml"
CAD = {"class_path": "WithoutContext"}
TASKS, GROUPS = 4, 2  # in batches of two: the second group's arms are decoded in the opposite order


def made(kind: str, **init: Any) -> dict[str, Any]:
    return {"class_path": kind, "init_args": init}


def guided(name: str, beta: float, *, temperature: float = 0.0, ttt: bool = False, **settings: Any) -> dict[str, Any]:
    return {"name": name, "method": made("Guided", beta=beta, **settings), "temperature": temperature, "ttt": ttt}


ARMS: list[dict[str, Any]] = [
    {"name": "target", "method": "Autoregressive"},
    guided("nothing", 0.0),
    guided("draft", 0.5),
    guided("slow", 0.5, speculative=False),
    guided("lens", -0.5, readout=made("LogitLens", layer=2), plausibility=0.1),
    guided("warm", 0.5, temperature=0.9),
    guided("noise", 0.5, readout=made("Noise"), schedule=made("Adaptive", by="kl")),
    guided("shuffled", 0.5, readout=made("DraftReadout", features="shuffled")),
    guided("cad", -0.5, readout=CAD),
    guided("more cad", -1.0, readout=CAD, space="log_probs"),
    guided("warm cad", -0.5, readout=CAD, temperature=0.9),
    guided("slow noise", -0.5, readout=made("Noise"), speculative=False),
    {"name": "best", "method": made("Rerank", num_answers=3), "temperature": 0.9},
]
TOGETHER = [
    ["nothing", "draft", "lens", "noise", "shuffled", "cad", "more cad"],
    ["slow", "slow noise"],
    ["warm", "warm cad"],
]
OTHERS = {name: [other for other in group if other != name] for group in TOGETHER for name in group}


class Sweeps:
    """How many variants, and how many different readouts, each batch of joined arms had."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.variants: list[int] = []
        self.readouts: list[int] = []
        sweep = guided_module.sweep

        def counted(pair: Any, prompts: Any, variants: Sequence[Any], *more: Any) -> Any:
            self.variants.append(len(variants))
            self.readouts.append(len({id(variant.readout) for variant in variants}))
            return sweep(pair, prompts, variants, *more)

        monkeypatch.setattr(guided_module, "sweep", counted)


def folder_of(tmp_path: Path, version: int) -> Path:
    return tmp_path / "logs" / "run" / f"version_{version}"


def check_equal(joined: list[dict[str, Any]], alone: list[dict[str, Any]], others: dict[str, list[str]]) -> None:
    """Rows are the same but for what is said of the batch; of that the right thing is said."""
    assert len(joined) == len(alone)
    for ours, theirs in zip(joined, alone, strict=True):
        assert ours["dgd"].pop("joined_with", []) == others.get(ours["dgd"]["arm"], [])
        assert "joined_with" not in theirs["dgd"]
        for row in (ours, theirs):
            row["dgd"] |= {"batch_tokens": 0, "config_hash": ""}
        assert ours == theirs


def test_rows_of_joined_arms_are_those_of_arms_alone(
    config: Config, dgd: Dgd, contexts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweeps = Sweeps(monkeypatch)
    data = {"path": str(contexts), "batch_size": 2, "limit": TASKS}
    model = {"arms": ARMS, "warmup": True, "max_new_tokens": 8}
    assert dgd("predict", "--config", config(model, data)).code == 0
    assert sweeps.variants == []
    run = dgd("predict", "--config", config({**model, "join_arms": True}, data))
    assert run.code == 0, run.err
    assert sorted(sweeps.variants) == sorted((1 + GROUPS) * [7, 2, 2])  # the warm-up, then group by group
    assert max(sweeps.readouts) == 5  # nothing and draft share one, and so do cad and more cad
    alone, joined = (predictions(folder_of(tmp_path, version)) for version in (0, 1))
    assert len({str([r["dgd"]["output_ids"] for r in joined if r["dgd"]["arm"] == name]) for name in OTHERS}) > 8

    # Times are those of the batch, and no arm that shared one has a speed; nor has one with several answers.
    for row in run_folder.read_predictions(folder_of(tmp_path, 1)):
        assert (row["dgd"]["tokens_per_second"] is not None) is (row["dgd"]["arm"] == "target")
    group = joined[: 2 * len(ARMS)]
    first = [row["dgd"] for row in group if row["dgd"]["arm"] in TOGETHER[0]]
    assert {record["batch_tokens"] for record in first} == {sum(record["tokens"] - 1 for record in first)}
    assert "11 arms were decoded together" in (folder_of(tmp_path, 1) / "summary.txt").read_text()
    check_equal(joined, alone, OTHERS)


def test_a_killed_run_goes_on(config: Config, dgd: Dgd, contexts: Path, tmp_path: Path) -> None:
    arms = [ARMS[0], ARMS[2], ARMS[6], ARMS[-1]]
    data = {"path": str(contexts), "batch_size": 2, "limit": TASKS}
    path = config({"arms": arms, "join_arms": True}, data)
    assert dgd("predict", "--config", path).code == 0
    folder = folder_of(tmp_path, 0)
    before = predictions(folder)
    lines = (folder / run_folder.PREDICTIONS).read_text().splitlines(keepends=True)
    (folder / "DONE").unlink()
    (folder / run_folder.PREDICTIONS).unlink()
    kept = len(arms) * 2 + 1  # two tasks, and one of the arms that share a batch
    run_folder.shard(folder, 0).write_text("".join(lines[:kept]) + lines[-1][:200])
    run = dgd("predict", "--config", path)
    assert run.code == 0
    assert f"continuing {folder}: {kept} of {TASKS * len(arms)} rows are there" in run.out
    assert predictions(folder) == before
    assert not folder_of(tmp_path, 1).exists()


def test_adapted_arms_are_joined_with_adapted_ones(config: Config, dgd: Dgd, contexts: Path, tmp_path: Path) -> None:
    arms = [
        guided("plain", 0.5),
        guided("plain noise", 0.5, readout=made("Noise")),
        guided("adapted", 0.5, ttt=True),
        guided("adapted noise", 0.5, readout=made("Noise"), ttt=True),
    ]
    data = {"path": str(contexts), "batch_size": 2, "clbench": False, "limit": 3}
    for join in (False, True):
        assert dgd("predict", "--config", config({"arms": arms, "ttt": SHORT_FIT, "join_arms": join}, data)).code == 0
    alone, joined = (predictions(folder_of(tmp_path, version)) for version in (0, 1))
    tokens = {
        name: [r["dgd"]["output_ids"] for r in joined if r["dgd"]["arm"] == name] for name in ("plain", "adapted")
    }
    assert tokens["plain"] != tokens["adapted"]
    pairs = (("plain", "plain noise"), ("adapted", "adapted noise"))
    check_equal(joined, alone, {one: [other] for pair in pairs for one, other in (pair, pair[::-1])})


def test_the_labs_sweep(dgd: Dgd, tmp_path: Path) -> None:
    """Arms of the shipped file on two tasks, in fp32, greedy and drawn."""
    settings = yaml.safe_load(SWEEP.read_text())
    init = settings["model"]["init_args"]
    drawn = [guided("warm", 0.3, temperature=0.8), guided("warm noise", 0.3, temperature=0.8, readout=made("Noise"))]
    init |= {"arms": [*init["arms"][::4], *drawn], "max_new_tokens": 20}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(settings))
    for name in ("true", "false"):
        limits = ["--data.limit", "2", "--trainer.accelerator", "cpu", "--logs_dir", tmp_path / name]
        run = dgd("predict", "--config", tmp_path / "sweep.yaml", *limits, "--model.join_arms", name)
        assert run.code == 0, run.err
    joined, alone = (predictions(tmp_path / name / "guided-sweep" / "version_0") for name in ("true", "false"))
    _, one, other, *warm = dict.fromkeys(row["dgd"]["arm"] for row in joined)
    pairs = ((one, other), tuple(warm))
    assert (one, other) == ("draft 0.3", "shuffled -0.2")
    check_equal(joined, alone, {name: [twin] for pair in pairs for name, twin in (pair, pair[::-1])})
