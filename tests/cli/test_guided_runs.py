"""Guided arms of `dgd predict`: what `guided_generate` gives, told in the rows, and mistakes in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import SHORT, Config, Dgd, TinyPair, check_error, predictions

from dgd_lightning import Adaptive, DraftReadout, LogitLens, Noise, guided_generate, load_pair


def made(kind: str, **init: Any) -> dict[str, Any]:
    """An object as YAML names it."""
    return {"class_path": kind, "init_args": init}


ARMS: list[dict[str, Any]] = [
    {"name": "target", "method": "Autoregressive"},
    {"name": "nothing", "method": {"class_path": "Guided", "init_args": {"beta": 0.0}}},
    {"name": "draft", "method": {"class_path": "Guided", "init_args": {"beta": 0.5}}},
    {"name": "slow", "method": {"class_path": "Guided", "init_args": {"beta": 0.5, "speculative": False}}},
    {"name": "lens", "method": made("Guided", beta=-0.5, readout=made("LogitLens", layer=2))},
    {"name": "noise", "method": made("Guided", beta=0.5, schedule=made("Adaptive", by="kl"),
                                     readout=made("Noise", like=made("DraftReadout", block_size=3)))},
]  # fmt: skip
LENS = {"class_path": "dgd_lightning.decode.readouts.logit_lens.LogitLens", "init_args": {"layer": 2, "norm": True}}


def test_guided_arms_give_what_the_function_gives(
    config: Config, dgd: Dgd, tiny_pair: TinyPair, contexts: Path, tmp_path: Path
) -> None:
    data = {"path": str(contexts), "batch_size": 2, "limit": 4}
    run = dgd("predict", "--config", config({"arms": ARMS, "warmup": True}, data))
    assert run.code == 0, run.err
    rows = predictions(tmp_path / "logs" / "run" / "version_0")
    by_arm = {arm["name"]: {row["idx"]: row["dgd"] for row in rows if row["dgd"]["arm"] == arm["name"]} for arm in ARMS}
    pair = load_pair(tiny_pair.target, tiny_pair.draft, device="cpu")
    expected: dict[str, dict[str, Any]] = {
        "nothing": {"beta": 0.0},
        "draft": {"beta": 0.5},
        "slow": {"beta": 0.5, "speculative": False},
        "lens": {"beta": -0.5, "readout": LogitLens(2)},
        "noise": {"beta": 0.5, "readout": Noise(DraftReadout(3)), "schedule": Adaptive("kl")},
    }
    for name, knobs in expected.items():
        for row in by_arm[name].values():
            prompt = torch.tensor(row["prompt_ids"])
            (output,) = guided_generate(pair, [prompt], max_new_tokens=SHORT, **knobs)
            assert row["output_ids"] == output.tokens.tolist()
    tokens = {name: [row["output_ids"] for row in rows.values()] for name, rows in by_arm.items()}
    assert tokens["nothing"] == tokens["target"]
    assert tokens["slow"] == tokens["draft"]
    assert tokens["draft"] != tokens["target"]
    assert tokens["noise"] != tokens["draft"]
    lens = next(iter(by_arm["lens"].values()))
    assert (lens["settings"]["beta"], lens["settings"]["readout"]) == (-0.5, LENS)
    assert "beta" not in next(iter(by_arm["target"].values()))


@pytest.mark.parametrize(
    ("arm", "argument", "words"),
    [
        ({"method": "Guided"}, "model.arms[x].method.beta", ("a value", "received nothing")),
        ({"method": made("Speculative", beta=0.3)}, "model.arms[x].method.beta", ("a key of Speculative",)),
        ({"method": made("Guided", beta=float("inf"))}, "model.arms[x].method.beta", ("finite",)),
        (
            {"method": made("Guided", beta=0.3, candidates=0)},
            "model.arms[x].method.candidates",
            ("a token must be left",),
        ),
        (
            {"method": made("Guided", beta=0.3, readout="drfat")},
            "model.arms[x].method.readout",
            ("draft, or a Readout",),
        ),
        ({"method": made("Guided", beta=0.3), "online_every": 8}, "model.arms[x].online_every", ("stays the same",)),
        (
            {"method": made("Guided", beta=0.3, readout=made("LogitLens", layer=99))},
            "model.arms[x].method.readout.layer",
            ("0…",),
        ),
        (
            {"method": made("Guided", beta=0.3, readout=made("LogitLens"))},
            "model.arms[x].method.readout.layer",
            ("received nothing",),
        ),
    ],
)
def test_bad_guidance_is_one_line(
    config: Config, dgd: Dgd, contexts: Path, arm: dict[str, Any], argument: str, words: tuple[str, ...]
) -> None:
    run = dgd("predict", "--config", config({"arms": [{"name": "x", **arm}]}, {"path": str(contexts)}))
    check_error(run, argument, *words)


def test_another_readout_is_another_run(config: Config, dgd: Dgd, contexts: Path, tmp_path: Path) -> None:
    for layer in (1, 2):
        arm = {"name": "x", "method": made("Guided", beta=0.3, readout=made("LogitLens", layer=layer))}
        path = config({"arms": [arm], "max_new_tokens": 2}, {"path": str(contexts)})
        assert dgd("predict", "--config", path).code == 0
    hashes = {
        row["dgd"]["config_hash"]
        for version in (0, 1)
        for row in predictions(tmp_path / "logs" / "run" / f"version_{version}")
    }
    assert len(hashes) == 2
