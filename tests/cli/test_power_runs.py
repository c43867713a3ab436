"""Power sampling in `dgd predict`: what `power_generate` gives, in rows, tables, curves and pages; resumed runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import Config, Dgd, TinyPair, check_error, predictions
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dgd_lightning import load_pair, power_generate

LIMIT = 8


def power(**init: Any) -> dict[str, Any]:
    return {"class_path": "Power", "init_args": {"alpha": 2.0, "blocks": 2} | init}


ARMS: list[dict[str, Any]] = [
    {"name": "target", "method": "Autoregressive"},
    {"name": "chain", "method": power(steps=4)},
    {"name": "guided chain", "method": power(steps=2, beta=0.5)},
    {"name": "noise chain", "method": power(steps=2, beta=0.5, readout={"class_path": "Noise"})},
    {"name": "particles", "method": power(mode="smc", particles=3)},
    {
        "name": "vote",
        "temperature": 1.0,
        "method": {
            "class_path": "Majority",
            "init_args": {"num_answers": 3, "result": "dgd_lightning.scoring.final_results.last_line"},
        },
    },
]


def test_rows_tables_curves_and_pages(
    config: Config, dgd: Dgd, tiny_pair: TinyPair, contexts: Path, tmp_path: Path
) -> None:
    data = {"path": str(contexts), "batch_size": 2, "limit": 4}
    path = config({"arms": ARMS, "max_new_tokens": LIMIT}, data)
    callbacks = ["--trainer.callbacks+", "CaseStudies"]
    run = dgd("predict", "--config", path, *callbacks)
    assert run.code == 0, run.err
    folder = tmp_path / "logs" / "run" / "version_0"
    rows = predictions(folder)
    pair = load_pair(tiny_pair.target, tiny_pair.draft, device="cpu")
    knobs: dict[str, dict[str, Any]] = {
        "chain": {"steps": 4},
        "guided chain": {"steps": 2, "beta": 0.5},
        "particles": {"mode": "smc", "particles": 3},
    }
    for row in rows:
        record = row["dgd"]
        if (given := knobs.get(record["arm"])) is None:
            continue
        prompt, seed = torch.tensor(record["prompt_ids"]), [record["seed"]]
        (output,) = power_generate(pair, [prompt], max_new_tokens=LIMIT, alpha=2.0, blocks=2, seed=seed, **given)
        assert record["output_ids"] == output.tokens.tolist()
        found = record["power"]
        assert output.trace.details is not None
        assert found["log_p"] == pytest.approx(output.trace.details["log_p"], abs=1e-4)
        assert found["tokens_drawn"] >= record["tokens"]
        assert record["spent_forwards"]["target"] == record["target_forwards"]
        if "steps" in found:
            assert record["states"][-1] == row["model_output"]
            assert len(record["states"]) == 1 + sum(found["steps"]["accepted"]) + (
                max(found["steps"]["limit"]) != min(found["steps"]["limit"])
            )
    by_arm = {row["dgd"]["arm"]: row["dgd"] for row in rows}
    assert by_arm["noise chain"]["control_of"] == "guided chain"
    assert by_arm["vote"]["spent_forwards"]["target"] > by_arm["vote"]["target_forwards"]
    assert by_arm["chain"]["settings"]["alpha"] == 2.0
    assert "particles" not in by_arm["chain"]["settings"]
    summary = (folder / "summary.txt").read_text()
    assert "Compute per answer" in summary
    assert "Power sampling" in summary
    page = (folder / "case_studies.html").read_text()
    assert "answers that the chain was at" in page
    events = EventAccumulator(str(folder)).Reload()
    tags = events.Tags()
    assert {"chain/power/acceptance_rate", "chain/power/log_p_by_step"} <= {*tags["scalars"]}
    assert "particles/power/effective_sample_size_by_block" in tags["scalars"]
    assert "chain/power/chain" in tags["images"]
    # killed behind half of its rows, in the middle of a write: the same command gives the same answers
    shard, text = folder / "predictions.rank0.jsonl", (folder / "predictions.jsonl").read_text()
    lines = text.splitlines(keepends=True)
    (folder / "predictions.jsonl").unlink()
    (folder / "DONE").unlink()
    shard.write_text("".join(lines[: len(lines) // 2]) + lines[-1][:40])
    again = dgd("predict", "--config", path, *callbacks)
    assert again.code == 0, again.err
    assert "continuing" in again.out
    answers = {(row["idx"], row["dgd"]["arm"]): row["dgd"]["output_ids"] for row in map(json.loads, lines)}
    assert {(row["idx"], row["dgd"]["arm"]): row["dgd"]["output_ids"] for row in predictions(folder)} == answers


@pytest.mark.parametrize(
    ("arm", "argument", "words"),
    [
        ({"method": power(alpha=0)}, "model.arms[x].method.alpha", ("above 0",)),
        ({"method": power(), "temperature": 0.5}, "model.arms[x].temperature", ("at temperature 1/α",)),
        ({"method": power(), "top_k": 5}, "model.arms[x].top_k", ("a filter would change",)),
        ({"method": power(), "online_every": 8}, "model.arms[x].online_every", ("stays the same",)),
        ({"method": power(steps=0)}, "model.arms[x].method.steps", ("at least 1",)),
        ({"method": power(readout={"class_path": "Noise"})}, "model.arms[x].method.readout", ("with β 0 nothing",)),
        (
            {"method": {"class_path": "Majority", "init_args": {"result": "no.rule"}}, "temperature": 1.0},
            "model.arms[x].method.result",
            ("a function's import path",),
        ),
        ({"method": "Majority"}, "model.arms[x].temperature", ("above 0",)),
    ],
)
def test_mistakes_are_one_line(
    config: Config, dgd: Dgd, contexts: Path, arm: dict[str, Any], argument: str, words: tuple[str, ...]
) -> None:
    run = dgd("predict", "--config", config({"arms": [{"name": "x", **arm}]}, {"path": str(contexts)}))
    check_error(run, argument, *words)
