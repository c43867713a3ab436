"""Prefix reuse through `dgd predict`: the same answers from fewer prompt tokens, and what rows and the run tell."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import Config, Dgd, chat_row, predictions, write_jsonl
from torch import Tensor

from dgd_lightning import run_folder
from dgd_lightning.target.model import Target

ARMS: list[dict[str, Any]] = [
    {"name": "ar", "method": "Autoregressive"},
    {"name": "warm", "method": "Speculative", "temperature": 0.8},
    {"name": "draft", "method": {"class_path": "Guided", "init_args": {"beta": 0.3}}},
    {
        "name": "lens",
        "method": {
            "class_path": "Guided",
            "init_args": {"beta": 0.2, "readout": {"class_path": "LogitLens", "init_args": {"layer": 2}}},
        },
    },
    {
        "name": "noise",
        "method": {"class_path": "Guided", "init_args": {"beta": 0.3, "readout": {"class_path": "Noise"}}},
    },
    {
        "name": "bare",
        "method": {"class_path": "Guided", "init_args": {"beta": -0.3, "readout": {"class_path": "WithoutContext"}}},
    },
]
FIT = {"steps": 3, "lr": 0.02, "rank": 2, "anchors_per_step": 4, "eval_every": 3, "validation_texts": 0}
READ = re.compile(r"(to be read|prefill): ([\d,]+) prompt tokens[^;:]*; ([\d,]+) without model.reuse_prefix")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def lengthened(tmp_path: Path) -> Path:
    """Three tasks of one context, two of another, one of a third."""
    pairs = [(0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2)]
    rows = [chat_row(*pair) for pair in pairs]
    for row in rows:
        row["messages"][0]["content"] = f"Of {row['metadata']['context_id']}: " + "one, two, three. " * 4
    return write_jsonl(tmp_path / "long.jsonl", rows)


def answers(folder: Path) -> dict[run_folder.Key, Any]:
    kept = ("output_ids", "acceptance_lengths", "prompt_tokens")
    return {run_folder.key(row): [row["dgd"][name] for name in kept] for row in predictions(folder)}


def reads(out: str) -> dict[str, tuple[int, int]]:
    """(read, whole prompts) by what was printed."""
    found = {kind: (read, whole) for kind, read, whole in READ.findall(" ".join(out.split()))}
    return {kind: (int(read.replace(",", "")), int(whole.replace(",", ""))) for kind, (read, whole) in found.items()}


@pytest.mark.parametrize(
    ("batch_size", "model"),
    [
        (1, {"arms": ARMS}),
        (4, {"arms": ARMS, "join_arms": True}),
        (3, {"arms": [ARMS[0], {"name": "adapted", "method": "Speculative", "ttt": True}], "ttt": FIT,
             "accept_clbench_license": True}),
    ],
    ids=["one by one", "batches, arms joined", "adapted"],
)  # fmt: skip
def test_the_same_answers_from_fewer_tokens(
    batch_size: int,
    model: dict[str, Any],
    config: Config,
    dgd: Dgd,
    lengthened: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokens: list[int] = []
    prefill = Target.prefill

    def counted(self: Target, ids: Tensor, lengths: Any, *args: Any, **options: Any) -> Any:
        tokens.append(sum(map(int, lengths)))
        return prefill(self, ids, lengths, *args, **options)

    monkeypatch.setattr(Target, "prefill", counted)
    made, read, outs = [], [], []
    for version, reuse in enumerate((True, False)):
        tokens.clear()
        settings = {**model, "reuse_prefix": reuse, "max_new_tokens": 5}
        run = dgd(
            "predict", "--config", config(model=settings, data={"path": str(lengthened), "batch_size": batch_size})
        )
        assert (run.code, run.err) == (0, "")
        folder = tmp_path / "logs" / "run" / f"version_{version}"  # another configuration: a new version
        made.append(answers(folder))
        read.append(sum(tokens))
        outs.append(reads(run.out + (folder / "summary.txt").read_text()))
    assert made[0] == made[1]
    assert outs[1] == {}

    rows = list(run_folder.read_predictions(tmp_path / "logs" / "run" / "version_0"))
    records = [row["dgd"] for row in rows]
    known = {row["metadata"]["context_id"]: row["dgd"]["prefix_tokens"] for row in rows}
    assert known["c2"] == 0  # its only task shares nothing
    assert min(known["c0"], known["c1"]) > 80
    readings = 3 if "join_arms" in model else len(model["arms"])  # ar, warm, and the guided arms together
    whole = sum(record["prompt_tokens"] for record in records) * readings // len(model["arms"])
    reused = sum(record["prefix_tokens"] for record in records) * readings // len(model["arms"])
    expected = whole - reused + known["c0"] + known["c1"]
    assert outs[0] == {"to be read": (expected, whole), "prefill": (expected, whole)}
    shared = known["c0"] + known["c1"] if "ttt" in model else 0  # what is adapted to is read once for both
    assert read[1] - read[0] == whole - expected + shared  # by the target's own count
    # The one read of each of the two beginnings is reported by the arms that waited for it, and by no others.
    waited = {(row["metadata"]["context_id"], row["dgd"]["prefix_seconds"]) for row in rows}
    if "ttt" in model:  # or by the adaptation, which comes first
        waited = {(row["metadata"]["context_id"], row["dgd"].get("ttt_prefill_seconds", 0)) for row in rows}
    assert sorted(context for context, seconds in waited if seconds > 0 and known[context]) == ["c0", "c1"]
    for record in records:
        parts = [record[f"{name}_seconds"] for name in ("prefix", "prefill", "decode")]
        assert record["seconds"] == pytest.approx(sum(parts))


def test_nothing_to_share_changes_nothing(config: Config, dgd: Dgd, tmp_path: Path) -> None:
    """The null: prompts without contexts are read as they are, and nothing is said."""
    path = write_jsonl(
        tmp_path / "p.jsonl", [{"prompt": "the same beginning of two prompts, " * 2 + end} for end in "ab"]
    )
    run = dgd("predict", "--config", config(data={"path": str(path)}, data_class="PromptsData"))
    assert (run.code, run.err, reads(run.out)) == (0, "", {})
    rows = predictions(tmp_path / "logs" / "run" / "version_0")
    assert [row["dgd"]["prefix_tokens"] for row in rows] == [0] * 6


def test_prompts_cut_on_the_left_are_read_whole(config: Config, dgd: Dgd, tmp_path: Path) -> None:
    rows = [chat_row(0, task) for task in range(2)]
    for row in rows:
        row["messages"][0]["content"] = "one, two, three. " * 36  # a token a byte: more than the target's 512 positions
    data = {"path": str(write_jsonl(tmp_path / "long.jsonl", rows))}
    model = {"arms": ARMS[:1], "too_long": "truncate_left", "max_new_tokens": 3}
    run = dgd("predict", "--config", config(model=model, data=data))
    assert (run.code, run.err, reads(run.out)) == (0, "", {})
    for row in predictions(tmp_path / "logs" / "run" / "version_0"):
        assert row["dgd"]["truncated_tokens"] > 0
        assert row["dgd"]["prefix_tokens"] == 0
