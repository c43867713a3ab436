"""Test-time training through the command: `fit` and `predict` make the same adapters and keep them apart."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli_tools import Config, Dgd, TinyPair, chat_row, check_error, predictions, ranks_of, write_training
from fork_server import launched
from safetensors.torch import save_file

from dgd_lightning import TTTConfig, load_adapter, load_pair, ttt_adapt
from dgd_lightning.data.contexts import parse_rows
from dgd_lightning.data.one_context import FileContext, common_prefix
from dgd_lightning.data.prompts import HubData
from dgd_lightning.data.rows import Row
from dgd_lightning.modules.adaptation import safe_name

FIT = {"steps": 6, "lr": 0.02, "rank": 2, "anchors_per_step": 8, "eval_every": 2, "validation_texts": 0}
ARMS = [
    {"name": "ar", "method": "Autoregressive"},
    {"name": "plain", "method": "Speculative"},
    {"name": "adapted", "method": "Speculative", "ttt": True},
]
LAUNCH_SECONDS = 300  # to import everything twice on a crowded core
RANKS = 1e-9  # fp64 gradients, summed in another order, and what AdamW makes of it
TEXT = "The heron haunts the marsh. The otter eats eels. The lynx haunts the cliff and eats mice. " * 2


def fit_yaml(tmp_path: Path, pair: TinyPair, data: dict[str, Any], **model: Any) -> Path:
    settings = {
        "name": "fit",
        "logs_dir": str(tmp_path / "logs"),
        "model": {
            "class_path": "TestTimeTraining",
            "init_args": {"target": str(pair.target), "draft": str(pair.draft), "ttt": FIT, **model},
        },
        "data": {"class_path": "FileContext", "init_args": data},
        "trainer": {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "gradient_clip_val": 1.0,
                    "enable_checkpointing": False, "log_every_n_steps": 1},
    }  # fmt: skip
    path = tmp_path / "fit.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "guide.txt"
    path.write_text(TEXT)
    return path


def test_fit_makes_the_adapter_of_ttt_adapt(dgd: Dgd, tiny_pair: TinyPair, tmp_path: Path) -> None:
    path = fit_yaml(tmp_path, tiny_pair, {"path": str(text_file(tmp_path))}, export_dir=str(tmp_path / "out"))
    run = dgd("fit", "--config", path)
    assert run.code == 0, run.err
    assert "held out, the context’s end: loss" in run.out
    folder = tmp_path / "logs" / "fit" / "version_0"
    ours = load_adapter(folder / "adapters" / "guide")

    pair = load_pair(tiny_pair.target, tiny_pair.draft, device="cpu")
    _, (ids,) = FileContext(str(tmp_path / "guide.txt")).prompts(pair.tokenizer)
    result = ttt_adapt(pair, ids, TTTConfig(**FIT))
    assert ours.weights.keys() == result.adapter.weights.keys()
    assert result.kept
    for key, weight in result.adapter.weights.items():
        assert torch.equal(ours.weights[key], weight), key
        assert torch.equal(load_adapter(tmp_path / "out").weights[key], weight)
    trace = json.loads((folder / "adapters" / "guide" / "trace.json").read_text())
    assert trace["losses"] == result.trace.losses
    assert [score["loss"] for score in trace["scores"]] == [score.loss for score in result.trace.scores]
    assert len(trace["losses"]) == FIT["steps"]


@pytest.mark.slow
def test_two_ranks_share_the_blocks_of_a_step(tiny_pair: TinyPair, tmp_path: Path) -> None:
    adapters = []
    for ranks in (1, 2):
        out = tmp_path / f"out{ranks}"
        data = {"path": str(text_file(tmp_path))}
        path = fit_yaml(tmp_path, tiny_pair, data, export_dir=str(out))
        # Real interpreters, where the other tests fork theirs.
        command = [sys.executable, "-m", "dgd_lightning.cli", "fit", "--config", path, *ranks_of(ranks)]
        subprocess.run(command, check=True, timeout=LAUNCH_SECONDS, capture_output=True)
        adapters.append(load_adapter(out).weights)
    one, two = adapters
    for key in one:
        assert torch.allclose(one[key], two[key], rtol=0, atol=RANKS), key
    assert any((one[key] != 0).any() for key in one if "lora_B" in key)


def test_predict_adapts_each_context_and_changes_no_token(
    config: Config, dgd: Dgd, tiny_pair: TinyPair, contexts: Path, tmp_path: Path
) -> None:
    data = {"path": str(contexts), "batch_size": 3, "clbench": False}
    path = config({"arms": ARMS, "ttt": FIT, "warmup": True}, data)
    run = dgd("predict", "--config", path)
    assert run.code == 0, run.err
    folder = tmp_path / "logs" / "run" / "version_0"
    kept = (folder / "summary.txt").read_text()
    assert "paired by context" in kept
    assert "validation s" in kept
    rows = predictions(folder)
    by_arm = {arm["name"]: {row["idx"]: row["dgd"] for row in rows if row["dgd"]["arm"] == arm["name"]} for arm in ARMS}
    assert all(len(one) == 6 for one in by_arm.values())
    for idx, row in by_arm["adapted"].items():
        assert row["output_ids"] == by_arm["plain"][idx]["output_ids"] == by_arm["ar"][idx]["output_ids"]
        assert row["ttt"]["steps"] == FIT["steps"]
        assert row["ttt"]["held_out_after"]["loss"] <= row["ttt"]["held_out_before"]["loss"]
    assert any(row["ttt"]["kept"] for row in by_arm["adapted"].values())
    assert all(row["ttt"] is None for name in ("ar", "plain") for row in by_arm[name].values())

    for place in (folder / "adapters").iterdir():  # what was not kept is no adapter
        kept_it = json.loads((place / "trace.json").read_text())["kept"]
        assert (place / "adapter_model.safetensors").exists() is kept_it

    # The adapter of a context is what its tasks' common tokens give, whatever was adapted before.
    pair = load_pair(tiny_pair.target, tiny_pair.draft, device="cpu")
    _, prompts = FileContext(str(contexts), context_id="c3").prompts(pair.tokenizer)
    expected = ttt_adapt(pair, common_prefix(prompts), TTTConfig(**FIT), avoid=prompts).adapter.weights
    saved = load_adapter(folder / "adapters" / "c3").weights
    assert all(torch.equal(saved[key], expected[key]) for key in expected)

    # The same with the saved adapters in place of fits.
    old = ["--model.ttt", "null", "--model.adapters"]
    for name, source in (("saved", folder), ("subfolder", folder / "adapters")):
        run = dgd("predict", "--config", path, *old, source, "--name", name)
        assert run.code == 0, run.err
        saved = {
            (row["idx"], row["dgd"]["arm"]): row["dgd"] for row in predictions(tmp_path / f"logs/{name}/version_0")
        }
        assert not (tmp_path / f"logs/{name}/version_0/adapters").exists()
        for row in rows:
            other = saved[row["idx"], row["dgd"]["arm"]]
            assert other["acceptance_lengths"] == row["dgd"]["acceptance_lengths"]
            assert (other["ttt"] or {}).get("kept") == (row["dgd"]["ttt"] or {}).get("kept")

    # Groups of another size are other batches, not other adapters.
    alone = dgd("predict", "--config", path, "--data.batch_size", "1", "--name", "alone")
    assert alone.code == 0, alone.err
    again = {(row["idx"], row["dgd"]["arm"]): row["dgd"] for row in predictions(tmp_path / "logs/alone/version_0")}
    for row in rows:
        other = again[row["idx"], row["dgd"]["arm"]]
        assert other["ttt"] == row["dgd"]["ttt"]
        assert other["acceptance_lengths"] == row["dgd"]["acceptance_lengths"]


def test_an_adapter_of_a_fit_serves_all_contexts_and_what_does_not_fit_is_one_line(
    config: Config, dgd: Dgd, tiny_pair: TinyPair, contexts: Path, tmp_path: Path
) -> None:
    fit = fit_yaml(tmp_path, tiny_pair, {"path": str(text_file(tmp_path))}, export_dir=str(tmp_path / "out"))
    assert dgd("fit", "--config", fit).code == 0
    data = {"path": str(contexts), "clbench": False, "limit": 2}
    guided = {"method": {"class_path": "Guided", "init_args": {"beta": 0.9}}}  # a readout shows what τ 1 does not
    arms = [{"name": "plain", **guided}, {"name": "adapted", "ttt": True, **guided}]
    path = config({"arms": arms, "adapters": str(tmp_path / "out")}, data)
    run = dgd("predict", "--config", path)
    assert run.code == 0, run.err
    rows = {(row["idx"], row["dgd"]["arm"]): row["dgd"] for row in predictions(tmp_path / "logs/run/version_0")}
    assert {arm: record["ttt"] and record["ttt"]["kept"] for (_, arm), record in rows.items()} == {
        "plain": None, "adapted": True
    }  # fmt: skip
    tasks = {idx for idx, _ in rows}
    assert any(rows[t, "plain"]["output_ids"] != rows[t, "adapted"]["output_ids"] for t in tasks)

    def refused(argument: str, *words: str, **model: Any) -> None:
        check_error(dgd("predict", "--config", config({"arms": arms, **model}, data)), argument, *words)

    refused("model.adapters", "a folder with adapters", "nowhere", adapters=str(tmp_path / "nowhere"))
    refused("model.adapters", "each of 2 contexts", "none of 2 of them, such as c0", adapters=str(tmp_path / "logs"))
    refused("model.adapters", "null beside model.ttt", adapters=str(tmp_path / "out"), ttt=FIT)
    refused("model.adapters", "to use them", adapters=str(tmp_path / "out"), arms=ARMS[:2])
    weights = tmp_path / "out" / "adapter_model.safetensors"
    tensors = {f"base_model.model.{key}": one for key, one in load_adapter(tmp_path / "out").weights.items()}
    save_file(tensors, weights, {"format": "pt", "base": "another"})
    refused(
        "model.adapters", "one of this draft", f"{tmp_path / 'out'}: one of another", adapters=str(tmp_path / "out")
    )
    weights.write_bytes(b"torn")
    refused("model.adapters", "a PEFT adapter", str(tmp_path / "out"), adapters=str(tmp_path / "out"))


@pytest.mark.slow
def test_predict_on_two_ranks_gives_the_rows_of_one(config: Config, contexts: Path, tmp_path: Path) -> None:
    # One thread on both sides: sums over two threads end in other bits of the losses.
    path = config(
        {"arms": ARMS, "ttt": FIT, "cpu_threads": 1}, {"path": str(contexts), "batch_size": 2, "clbench": False}
    )
    found = []
    for ranks in (1, 2):
        launched("predict", "--config", path, "--name", f"r{ranks}", *ranks_of(ranks)).check_returncode()
        found.append(predictions(tmp_path / "logs" / f"r{ranks}" / "version_0"))
    for rows in found:
        for row in rows:
            row["dgd"].pop("config_hash")
    assert found[0] == found[1]


REHEARSED = {"steps": 16, "lr": 1e-2, "rank": 16, "eval_every": 8, "anchors_per_step": 32}
REHEARSED |= {"validation_texts": 4, "train_texts": 1, "validation_tokens": 40, "min_gain": 0.02}


def lab_fit(tmp_path: Path, out: Path) -> Path:
    """A fit on a context of the lab that is judged by validation texts."""
    nothing = TinyPair(Path("lab"), Path("lab"))
    path = fit_yaml(tmp_path, nothing, {}, export_dir=str(out), ttt=REHEARSED, cpu_threads=1)
    settings = yaml.safe_load(path.read_text())
    settings["data"] = {"class_path": "LabOneContext", "init_args": {"family": "ledger"}}
    path.write_text(yaml.safe_dump(settings))
    return path


def test_fit_and_predict_by_validation_texts_make_one_adapter(dgd: Dgd, config: Config, tmp_path: Path) -> None:
    run = dgd("fit", "--config", lab_fit(tmp_path, tmp_path / "out"))
    assert run.code == 0, run.err
    assert "held out, 4 validation texts: loss" in run.out
    fitted = load_adapter(tmp_path / "out").weights
    assert any((weight != 0).any() for key, weight in fitted.items() if "lora_B" in key)
    model = {
        "target": "lab",
        "draft": "lab",
        "arms": ARMS[1:],
        "ttt": REHEARSED,
        "cpu_threads": 1,
        "max_new_tokens": 8,
    }
    path = config(model, {"families": ["ledger"], "contexts_per_family": 1})
    settings = yaml.safe_load(path.read_text())
    settings["data"]["class_path"] = "LabContexts"
    path.write_text(yaml.safe_dump(settings))
    run = dgd("predict", "--config", path)
    assert run.code == 0, run.err
    folder = tmp_path / "logs" / "run" / "version_0"
    assert "validation s" in (folder / "summary.txt").read_text()
    adapted = load_adapter(folder / "adapters" / "lab-ledger-0-0").weights
    assert adapted.keys() == fitted.keys()
    assert all(torch.equal(adapted[key], fitted[key]) for key in fitted)
    row = next(row["dgd"] for row in predictions(folder) if row["dgd"]["arm"] == "adapted")
    assert row["ttt"]["held_out_by"] == "validation_texts"
    assert (row["ttt"]["validation_texts"], row["ttt"]["train_texts"]) == (4, 1)


@pytest.mark.slow
def test_two_ranks_write_the_texts_of_one(tmp_path: Path) -> None:
    found = []
    for ranks in (1, 2):
        path = lab_fit(tmp_path, tmp_path / f"out{ranks}")
        launched("fit", "--config", path, *ranks_of(ranks)).check_returncode()
        trace = json.loads((tmp_path / f"out{ranks}" / "trace.json").read_text())
        found.append((trace["validation_texts"], trace["train_texts"], trace["scores"][0]))
        assert trace["losses"]
    assert found[0] == found[1]


def test_a_context_that_is_too_short_is_recorded_and_the_run_goes_on(
    config: Config, dgd: Dgd, contexts: Path, tmp_path: Path
) -> None:
    long = {**FIT, "holdout": 0.95}
    run = dgd("predict", "--config", config({"arms": ARMS, "ttt": long}, {"path": str(contexts), "clbench": False}))
    assert run.code == 0, run.err
    rows = [
        row["dgd"] for row in predictions(tmp_path / "logs" / "run" / "version_0") if row["dgd"]["arm"] == "adapted"
    ]
    assert len(rows) == 6
    assert all("context_ids: expected a context of at least" in row["ttt"]["error"] and row["tokens"] for row in rows)


def test_clbench_is_never_adapted_to_without_permission(
    config: Config, dgd: Dgd, tiny_pair: TinyPair, contexts: Path, tmp_path: Path
) -> None:
    path = config({"arms": ARMS, "ttt": FIT, "max_new_tokens": 2}, {"path": str(contexts)})
    check_error(dgd("predict", "--config", path), "model.ttt", "licence", "clbench: false", "accept_clbench_license")
    assert dgd("predict", "--config", path, "--model.accept_clbench_license", "true").code == 0
    fit = fit_yaml(tmp_path, tiny_pair, {"path": str(contexts)})
    check_error(dgd("fit", "--config", fit), "model.ttt", "licence")
    upper = contexts.rename(contexts.with_name("ROWS.JSONL"))
    check_error(dgd("fit", "--config", fit_yaml(tmp_path, tiny_pair, {"path": str(upper)})), "model.ttt", "licence")
    (tmp_path / "rows.json").write_text(json.dumps([chat_row(0, 0)]))
    array = fit_yaml(tmp_path, tiny_pair, {"path": str(tmp_path / "rows.json")})
    check_error(dgd("fit", "--config", array), "model.ttt", "licence")
    hub = {"path": "json", "split": "train", "format": "contexts"}
    data = HubData(**hub, clbench=None)  # type: ignore[arg-type]
    data.__dict__["tasks"] = parse_rows([Row("row", 1, chat_row(0, 0))])
    assert data.is_clbench
    upper.rename(contexts)
    no_adapter = config({"arms": ARMS[:2], "max_new_tokens": 2}, {"path": str(contexts)})
    assert dgd("predict", "--config", no_adapter).code == 0  # decoding is fine

    training = write_training(
        tmp_path, tiny_pair, [{**chat_row(0, i), "model_output": "Four score."} for i in range(8)]
    )
    check_error(dgd("fit", "--config", training), "data.path", "licence", "clbench: false")
    assert dgd("fit", "--config", training, "--data.clbench", "false").code == 0


@pytest.mark.parametrize(
    ("model", "argument", "words"),
    [
        ({"arms": ARMS}, "model.ttt", ("null",)),
        ({"arms": ARMS[:2], "ttt": FIT}, "model.ttt", ("ttt: true",)),
        ({"arms": [{**ARMS[0], "ttt": True}], "ttt": FIT}, "model.arms[ar].ttt", ()),
        ({"arms": ARMS, "ttt": {**FIT, "rank": 0}}, "model.ttt.rank", ("at least 1",)),
        ({"arms": ARMS, "ttt": {**FIT, "modules": ["w1"]}}, "model.ttt.modules", ("fc",)),
    ],
)
def test_bad_settings_are_one_line(
    config: Config, dgd: Dgd, contexts: Path, model: dict[str, Any], argument: str, words: tuple[str, ...]
) -> None:
    run = dgd("predict", "--config", config(model, {"path": str(contexts), "clbench": False}))
    check_error(run, argument, *words)


def test_inference_mode_is_refused_in_a_line(config: Config, dgd: Dgd, contexts: Path) -> None:
    path = config({"arms": ARMS, "ttt": FIT}, {"path": str(contexts), "clbench": False}, {"inference_mode": True})
    check_error(dgd("predict", "--config", path), "trainer.inference_mode", "inference_mode: false")


def test_an_unknown_context_is_an_error_and_leaves_no_version_behind(
    dgd: Dgd, tiny_pair: TinyPair, contexts: Path, tmp_path: Path
) -> None:
    path = fit_yaml(tmp_path, tiny_pair, {"path": str(contexts), "context_id": "c9", "clbench": False})
    check_error(dgd("fit", "--config", path), "data.context_id", "c0, c1, c2, c3", "received c9")
    assert not list((tmp_path / "logs").rglob("version_*"))


def test_context_ids_become_safe_folder_names() -> None:
    assert safe_name("c-3.x_y") == "c-3.x_y"
    names = {safe_name(name) for name in ("../../etc", "a/b", "a b", "a_b", "", "..", "é" * 300)}
    assert len(names) == 7
    assert all("/" not in name and not name.startswith(".") and 0 < len(name) < 100 for name in names)
