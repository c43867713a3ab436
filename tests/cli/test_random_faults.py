"""Random faults at any point of predict and score, and the same command again: no row lost, doubled or changed.

Faults are SIGKILL at a random moment, a disk that is full at a random byte of whatever is written, and last lines of
files torn in between. The long form has 500 of them.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from cli_tools import Config, chat_row, predictions, write_jsonl
from fault_tools import Command, Weather, start, timed
from fork_server import launched
from judge_tools import KEY, judge_server, make_row

from dgd_lightning import run_folder

GSM8K = {"question": "How many?", "answer": "She has 9 * 8 = <<9*8=72>>72.\n#### 72"}
ARMS = [
    {"name": "ar", "method": "Autoregressive"},
    {"name": "warm", "method": "Speculative", "temperature": 0.8},
    {"name": "guided", "method": {"class_path": "Guided", "init_args": {"beta": 0.3}}},
]


def graded(path: Path) -> list[dict[str, Any]]:
    """Graded rows without what no two runs share: how long a judge took, and whether its verdict was stored before."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        for name in ("seconds", "cached"):
            row["dgd"]["grading"].pop(name, None)
    return rows


@pytest.mark.parametrize("least", [8, pytest.param(250, marks=pytest.mark.slow)])
def test_predict(config: Config, tmp_path: Path, least: int) -> None:
    rows = [chat_row(c, t) for c in range(4) for t in range(2)]
    data = {"path": str(write_jsonl(tmp_path / "many.jsonl", rows)), "batch_size": 2}
    path = config(data=data, model={"max_new_tokens": 8, "arms": ARMS})
    said = tmp_path / "said.txt"

    def command(logs: Path) -> Command:
        argv = ["predict", "--config", str(path), "--logs_dir", str(logs)]
        return Command(argv, said, lambda: sorted(logs.glob("run/version_*/predictions.rank*.jsonl")), size)

    size = 0
    whole = tmp_path / "whole"
    timed(command(whole))  # what is imported late is read from the disk once
    shutil.rmtree(whole)
    seconds = timed(command(whole))
    expected = predictions(whole / "run/version_0")
    assert len(expected) == len(rows) * len(ARMS)
    size = (whole / "run/version_0/predictions.jsonl").stat().st_size

    weather = Weather(random.Random(least))
    stories = 0
    while sum(weather.faults.values()) < least:
        logs = tmp_path / f"logs{stories}"
        weather.run(command(logs), seconds)
        finished = [folder for folder in logs.glob("run/version_*") if (folder / "DONE").exists()]
        assert finished
        for folder in finished:
            assert predictions(folder) == expected
        shutil.rmtree(logs)
        stories += 1
    print(f"predict: {dict(weather.faults)} in {stories} stories")
    assert weather.unclear == []


@pytest.mark.parametrize("least", [5, pytest.param(250, marks=pytest.mark.slow)])
def test_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, least: int) -> None:
    """Rows for a judge that takes its time, mixed with rows that a program grades."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    rows = [make_row(number) for number in range(40)]
    rows += [{**GSM8K, "idx": f"gsm{number}", "model_output": f"#### {70 + number % 4}"} for number in range(20)]
    said = tmp_path / "said.txt"
    with judge_server(delay=0.02) as server:

        def command(folder: Path) -> Command:
            folder.mkdir(exist_ok=True)
            path, cache = write_jsonl(folder / "answers.jsonl", rows), folder / "verdicts.jsonl"
            argv = ["score", str(path), "--judge.model=fair", f"--judge.base_url={server.url}", "--judge.workers=4"]
            argv += [f"--judge.cache={cache}"]
            return Command(argv, said, lambda: [folder / "answers.scores.jsonl", cache], size)

        size = 0
        whole = tmp_path / "whole"
        timed(command(whole))
        shutil.rmtree(whole)
        seconds = timed(command(whole))
        expected = graded(whole / "answers_graded.jsonl")
        assert {row["score"] for row in expected} == {0, 1}
        size = (whole / "answers_graded.jsonl").stat().st_size

        weather = Weather(random.Random(least))
        stories = 0
        while sum(weather.faults.values()) < least:
            folder = tmp_path / f"story{stories}"
            weather.run(command(folder), seconds)
            assert graded(folder / "answers_graded.jsonl") == expected
            shutil.rmtree(folder)
            stories += 1
    print(f"score: {dict(weather.faults)} in {stories} stories")
    assert weather.unclear == []


def test_sigterm_ends_a_run_amid_a_group(config: Config, tmp_path: Path) -> None:
    rows = [chat_row(c, t) for c in range(6) for t in range(2)]
    data = {"path": str(write_jsonl(tmp_path / "many.jsonl", rows)), "batch_size": 2}
    path = config(data=data, model={"max_new_tokens": 200, "arms": ARMS})  # a minute
    logs = tmp_path / "logs"
    command = Command(["predict", "--config", str(path), "--logs_dir", str(logs)], tmp_path / "said.txt", list, 0)
    process = start(command)
    shard = run_folder.shard(logs / "run/version_0", 0)
    while not (shard.exists() and shard.stat().st_size):
        assert process.poll() is None, command.said.read_text()
        time.sleep(0.01)
    process.terminate()
    assert process.wait(20) == 143, command.said.read_text()
    said = command.said.read_text()
    assert "Traceback" not in said
    assert "dgd: terminated; the same command continues it" in said
    assert not (logs / "run/version_0/DONE").exists()


def test_sigterm_ends_a_run_whose_exception_was_dropped() -> None:
    """As Python drops it amid a destructor: now and then, so here by hand."""
    program = """
import os, signal, time
from dgd_lightning.commands.main import ended_by_sigterm
with ended_by_sigterm("predict"):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except SystemExit:
        pass
    time.sleep(60)
"""
    ended = launched(code=program, timeout=50)
    assert ended.returncode == 143
    assert ended.stderr.startswith("dgd: terminated; the same command continues")
