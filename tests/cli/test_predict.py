"""`dgd predict` from end to end on a tiny random pair: rows, resuming, ranks, changed configurations."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import SHORT, VOCAB, Config, Dgd, TinyPair, byte_tokenizer, chat_row, predictions, ranks_of, write_jsonl
from fork_server import Launched, launch
from tiny import hf_model

from dgd_lightning import run_folder
from dgd_lightning.modules.group_decoder import GroupDecoder

QUESTION = {"role": "user", "content": "Hm?"}
LAUNCH_SECONDS = 300  # to write the first row; a second on a free core


def run_of(tmp_path: Path, version: int = 0, logs: str = "logs") -> Path:
    return tmp_path / logs / "run" / f"version_{version}"


def test_context_rows(config: Config, dgd: Dgd, contexts: Path, tmp_path: Path) -> None:
    run = dgd("predict", "--config", config({"warmup": True}))
    assert (run.code, run.err) == (0, "")
    folder = run_of(tmp_path)
    assert f"run folder: {folder}" in run.out
    assert "tensorboard --logdir" in run.out

    rows = predictions(folder)
    inputs = [json.loads(line) for line in contexts.read_text().splitlines()]
    keys = [(row["metadata"]["task_id"], arm) for row in inputs for arm in ("ar", "dflash", "warm")]
    assert [run_folder.key(row) for row in rows] == keys
    for row, source in zip(rows, (row for row in inputs for _ in range(3)), strict=True):
        assert {name: row[name] for name in source} == source
        record = row["dgd"]
        assert record["tokens"] == len(record["output_ids"]) == sum(record["acceptance_lengths"]) + 1
        assert isinstance(row["model_output"], str)
    by_key = {run_folder.key(row): row for row in rows}
    for idx, _ in keys:  # lossless, through the whole command
        assert by_key[idx, "ar"]["dgd"]["output_ids"] == by_key[idx, "dflash"]["dgd"]["output_ids"]
        assert by_key[idx, "ar"]["dgd"]["seed"] is None
        assert by_key[idx, "warm"]["dgd"]["seed"] is not None
    assert sorted(path.name for path in folder.iterdir() if "tfevents" not in path.name) == [
        "DONE",
        "config.yaml",
        "hparams.yaml",
        "predictions.jsonl",
        "provenance.json",
        "summary.txt",
    ]


def test_results_do_not_depend_on_batches(config: Config, dgd: Dgd, contexts: Path, tmp_path: Path) -> None:
    assert dgd("predict", "--config", config()).code == 0
    data = {"path": str(contexts), "batch_size": 5}
    assert dgd("predict", "--config", config(data=data)).code == 0
    without = [
        [{**row["dgd"], "batch_tokens": 0, "config_hash": ""} for row in predictions(run_of(tmp_path, v))]
        for v in (0, 1)
    ]
    assert without[0] == without[1]


def test_prompts(config: Config, dgd: Dgd, tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "gsm.jsonl", [{"question": "1 + 1?", "answer": "2"}, {"question": "2 + 2?", "answer": "4"}]
    )
    run = dgd("predict", "--config", config(data={"path": str(path), "field": "question"}, data_class="PromptsData"))
    assert (run.code, run.err) == (0, "")
    rows = predictions(run_of(tmp_path))
    assert [row["idx"] for row in rows[::3]] == ["gsm-1", "gsm-2"]
    assert rows[0]["answer"] == "2"


def test_answers_end_before_stop_strings(config: Config, dgd: Dgd, tmp_path: Path) -> None:
    letters = [chr(code) for code in range(32, 127, 2)]  # answers of a random model are random bytes
    assert dgd("predict", "--config", config({"stop_strings": letters, "stop_token_ids": []})).code == 0
    ended, text = 0, byte_tokenizer().decode
    for row in predictions(run_of(tmp_path)):
        ids, reason = row["dgd"]["output_ids"], row["dgd"]["stop_reason"]
        assert not set(text(ids[:-1])) & set(letters)
        assert (reason == "stop") is (text(ids[-1:]) in letters)
        assert row["model_output"] == text(ids[:-1] if reason == "stop" else ids, skip_special_tokens=True)
        ended += reason == "stop"
    assert ended >= 3


def test_a_complete_run_is_never_touched(config: Config, dgd: Dgd, tmp_path: Path) -> None:
    path = config({"max_new_tokens": 4})
    for version in (0, 1):
        assert dgd("predict", "--config", path).code == 0
        assert (run_of(tmp_path, version) / "DONE").exists()
    assert predictions(run_of(tmp_path, 0)) == predictions(run_of(tmp_path, 1))


CONTEXTS = 6
GROUPS = [{f"t{context}-0", f"t{context}-1"} for context in range(CONTEXTS)]  # as `many` is batched by two
ROWS = len(GROUPS) * 2 * 3  # three arms


@pytest.fixture
def many(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "many.jsonl", [chat_row(c, t) for c in range(CONTEXTS) for t in range(2)])


def kill_after_first_rows(process: Launched, folder: Path) -> None:
    deadline = time.monotonic() + LAUNCH_SECONDS
    while not any(path.stat().st_size for path in folder.glob("predictions.rank*.jsonl")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)  # launched ranks too: of theirs, none gets to finish its group
    process.communicate()


# The same command again, and another number of ranks: the configuration's hash does not know how many there are.
@pytest.mark.parametrize(
    ("ranks", "resumed"),
    [(1, 1), pytest.param(2, 2, marks=pytest.mark.slow), pytest.param(2, 1, marks=pytest.mark.slow)],
)
def test_killed_run_continues(
    config: Config, dgd: Dgd, many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, resumed: int
) -> None:
    data = {"path": str(many), "batch_size": 2}
    path = config(data=data, model={"max_new_tokens": 24})
    folder = run_of(tmp_path)
    kill_after_first_rows(launch("predict", "--config", path, *ranks_of(ranks)), folder)
    shards = [run_folder.shard(folder, rank) for rank in range(ranks)]
    kept = [row for shard in shards for _, row in run_folder.read_rows(shard)]
    assert 0 < len(kept) < ROWS
    with shards[-1].open("a") as file:  # as if the kill had come in the middle of a write
        file.write('{"idx": "t5-1", "model_out')

    if resumed == 1:
        decoded: list[int] = []
        decode = GroupDecoder._decode
        monkeypatch.setattr(GroupDecoder, "_decode", lambda *a: (decoded.append(len(a[3])), decode(*a))[1])
        assert dgd("predict", "--config", path).code == 0
        whole = sum(len([row for row in kept if row["idx"] in group]) == 6 for group in GROUPS)
        assert sum(decoded) == ROWS - 6 * whole  # groups with all their rows were left alone
    else:
        process = launch("predict", "--config", path, *ranks_of(resumed))
        out, err = process.communicate(timeout=LAUNCH_SECONDS)
        assert process.returncode == 0, out + err
    assert not (tmp_path / "logs/run/version_1").exists()
    assert (folder / "DONE").exists()
    merged = {run_folder.key(row): row for row in run_folder.read_predictions(folder)}
    assert all(merged[run_folder.key(row)] == row for row in kept)  # to the timing: not decoded again
    assert len(json.loads((folder / "provenance.json").read_text())["sessions"]) == 2

    assert dgd("predict", "--config", path, "--logs_dir", tmp_path / "whole").code == 0
    assert predictions(folder) == predictions(run_of(tmp_path, logs="whole"))
    assert len(merged) == ROWS


def test_two_ranks_equal_one(config: Config, dgd: Dgd, tmp_path: Path) -> None:
    path = config({"warmup": True})
    two = launch("predict", "--config", path, *ranks_of(2), "--logs_dir", tmp_path / "two")
    assert dgd("predict", "--config", path).code == 0
    out, err = two.communicate(timeout=LAUNCH_SECONDS)
    assert two.returncode == 0, out + err
    assert predictions(run_of(tmp_path, logs="two")) == predictions(run_of(tmp_path))
    assert out.count("run folder:") == 1


def unfinished(folder: Path) -> None:
    """Makes a complete run look as if it had been killed before its merge."""
    (folder / "DONE").unlink()
    (folder / "predictions.jsonl").rename(run_folder.shard(folder, 0))


@pytest.mark.parametrize("change", ["model", "arms", "data", "weights", "nothing"])
def test_changed_configuration_starts_anew(
    config: Config, dgd: Dgd, contexts: Path, tiny_pair: TinyPair, tmp_path: Path, change: str
) -> None:
    arms = [{"name": "ar", "method": "Autoregressive"}]
    model: dict[str, Any] = {"arms": arms, "max_new_tokens": 3}
    assert dgd("predict", "--config", config(model=model)).code == 0
    unfinished(run_of(tmp_path))
    if change == "model":
        model["max_new_tokens"] = 2
    elif change == "arms":
        model["arms"] = [{"name": "ar", "method": "Autoregressive", "temperature": 0.5}]
    elif change == "data":
        contexts.write_text(contexts.read_text().replace("Question 0", "Question 7"))
    elif change == "weights":
        generation = tiny_pair.target / "generation_config.json"
        before = generation.read_text()
        generation.write_text(before + "\n")
    assert dgd("predict", "--config", config(model=model)).code == 0
    if change == "weights":
        generation.write_text(before)
    assert (tmp_path / "logs/run/version_1").exists() is (change != "nothing")
    assert (run_of(tmp_path) / "DONE").exists() is (change == "nothing")


def test_name_with_a_slash(config: Config, dgd: Dgd, tmp_path: Path) -> None:
    """The folder that is looked through for a version to continue is the one that is written."""
    path = config(model={"arms": [{"name": "ar", "method": "Autoregressive"}], "draft": None, "max_new_tokens": 2})
    assert dgd("predict", "--config", path, "--name", "exp/a").code == 0
    folder = tmp_path / "logs/exp/a/version_0"
    unfinished(folder)
    assert dgd("predict", "--config", path, "--name", "exp/a").code == 0
    assert (folder / "DONE").exists()
    assert [path.name for path in (tmp_path / "logs/exp").rglob("version_*")] == ["version_0"]


def test_warm_up_fits_a_short_target(config: Config, dgd: Dgd, tmp_path: Path) -> None:
    model = hf_model(vocab_size=VOCAB, max_position_embeddings=64, dtype=torch.float64)
    model.save_pretrained(tmp_path / "short")
    byte_tokenizer().save_pretrained(tmp_path / "short")
    long = chat_row(0, 0)
    long["messages"][1]["content"] = "x" * 100
    data = {"path": str(write_jsonl(tmp_path / "mixed.jsonl", [long, chat_row(1, 0, messages=[QUESTION])]))}
    arms = [{"name": "ar", "method": "Autoregressive"}]
    short = {"target": str(tmp_path / "short"), "draft": None, "arms": arms, "too_long": "skip", "warmup": True}
    run = dgd("predict", "--config", config(model=short, data=data))
    assert (run.code, run.err) == (0, "")
    assert "(1 skipped)" in run.out


def test_too_long(config: Config, dgd: Dgd, tmp_path: Path) -> None:
    long = chat_row(0, 0)
    long["messages"][1]["content"] = "x" * 600  # of 512 positions
    path = str(write_jsonl(tmp_path / "long.jsonl", [chat_row(1, 0), long]))
    arms = [{"name": "dflash", "method": "Speculative"}]

    run = dgd("predict", "--config", config(model={"arms": arms}, data={"path": path}))
    assert run.code == 2
    assert run.err.startswith(f"dgd: error: task t0-0: expected at most {512 - SHORT} prompt tokens")

    run = dgd("predict", "--config", config(model={"arms": arms, "too_long": "skip"}, data={"path": path}))
    assert run.code == 0
    assert "(1 skipped)" in run.out
    skipped = predictions(run_of(tmp_path, 0))[1]
    assert skipped["model_output"] is None
    assert f"at most {512 - SHORT} fit" in skipped["dgd"]["skipped"]

    run = dgd("predict", "--config", config(model={"arms": arms, "too_long": "truncate_left"}, data={"path": path}))
    assert run.code == 0
    record = predictions(run_of(tmp_path, 1))[1]["dgd"]
    assert record["prompt_tokens"] - record["truncated_tokens"] == 512 - SHORT
