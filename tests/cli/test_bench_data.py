"""Real data sets through `dgd predict` with the bundled pair. It only decodes: CL-bench must never be trained on."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from cli_tools import Config, Dgd, predictions, write_jsonl

from dgd_lightning.data.rows import STALE

TOKENS = 4  # new ones per task: what is read and written is tested here, not how well it is answered
ARMS = [{"name": "ar", "method": "Autoregressive"}, {"name": "dflash", "method": "Speculative"}]


@pytest.fixture
def decode(config: Config, dgd: Dgd, tmp_path: Path) -> Any:
    """Runs data through the bundled pair and gives the rows, one per task and arm."""
    model = {
        "target": "lab",
        "draft": "lab",
        "max_new_tokens": TOKENS,
        "too_long": "skip",
        "warmup": False,
    }

    def run(data_class: str, arms: list[dict[str, str]], **data: Any) -> list[dict[str, Any]]:
        done = dgd("predict", "--config", config(model={**model, "arms": arms}, data=data, data_class=data_class))
        assert (done.code, done.err) == (0, "")
        return predictions(tmp_path / "logs" / "run" / "version_0")

    return run


def check(rows: list[dict[str, Any]], ids: list[str], arms: list[dict[str, str]]) -> None:
    """Every task is answered by every arm, in order; nothing was too long."""
    assert [(row["idx"], row["dgd"]["arm"]) for row in rows] == [(idx, arm["name"]) for idx in ids for arm in arms]
    for row in rows:
        record = row["dgd"]
        assert "skipped" not in record
        assert 1 <= record["tokens"] == len(record["output_ids"]) <= TOKENS
        assert record["tokens"] == sum(record["acceptance_lengths"]) + 1
        assert record["prompt_tokens"] == len(record["prompt_ids"])
        assert isinstance(row["model_output"], str)


@pytest.mark.slow
def test_clbench(decode: Any, bench_data: Path, tmp_path: Path) -> None:
    lines = (bench_data / "clbench" / "graded_sample.jsonl").read_text().splitlines()
    sources = [json.loads(line) for line in sorted(lines, key=len)[:2]]
    arms = ARMS[1:]  # thousands of tokens are read per task and arm
    rows = decode("ContextsData", arms, path=str(write_jsonl(tmp_path / "clbench.jsonl", sources)))
    check(rows, [source["metadata"]["task_id"] for source in sources], arms)
    for row, source in zip(rows, sources, strict=True):
        kept = {name: value for name, value in source.items() if name not in STALE}
        assert set(kept) >= {"messages", "rubrics", "metadata"}
        assert {name: row[name] for name in kept} == kept
        # an earlier model's answer and its grades are not carried on
        assert set(row) == {*kept, "idx", "model_output", "dgd"}
        assert row["dgd"]["prompt_tokens"] > 1000


@pytest.mark.slow
def test_gsm8k(decode: Any, bench_data: Path) -> None:
    path = bench_data / "gsm8k_test.jsonl"
    rows = decode("PromptsData", ARMS, path=str(path), field="question", limit=3)
    check(rows, ["gsm8k_test-1", "gsm8k_test-2", "gsm8k_test-3"], ARMS)
    sources = [json.loads(line) for line in path.read_text().splitlines()[:3]]
    for row, source in zip(rows, (source for source in sources for _ in ARMS), strict=True):
        assert {name: row[name] for name in source} == source


@pytest.mark.slow
def test_humaneval(decode: Any, bench_data: Path) -> None:
    path = bench_data / "HumanEval.jsonl.gz"
    rows = decode("PromptsData", ARMS, path=str(path), field="prompt", id_field="task_id", limit=3)
    check(rows, ["HumanEval/0", "HumanEval/1", "HumanEval/2"], ARMS)
    with gzip.open(path, "rt") as file:
        sources = [json.loads(line) for line, _ in zip(file, range(3), strict=False)]
    for row, source in zip(rows, (source for source in sources for _ in ARMS), strict=True):
        assert {name: row[name] for name in source} == source
