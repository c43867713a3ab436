"""Rows of runs from before version 0.2, as they stand in files: read in today's form, by every reader of rows."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from dgd_lightning import run_folder
from dgd_lightning.analysis.adaptation import collect
from dgd_lightning.analysis.arms import ArmStats
from dgd_lightning.analysis.arms import collect as collect_arm
from dgd_lightning.old_rows import is_old, upgraded
from dgd_lightning.scoring.graded import read_graded
from dgd_lightning.scoring.score_run import rows_of

SCORE = {"loss": 1.5, "tau": 2.0, "acceptance": [0.5]}
TTT = {
    "kept": True, "stopped": "steps", "steps": 8, "held_out_by": "rehearsals", "rehearsals": 4, "rehearsed_answers": 3,
    "train_rehearsals": 2, "held_out_before": SCORE, "held_out_after": SCORE,
}  # fmt: skip
BLEND = {
    "beta": 0.3, "readout": "draft", "space": "logits", "candidates": 50, "plausibility": None, "schedule": None
}  # fmt: skip
DIVERGENCE = {"beta": 0.3, "tokens": ["a"], "js": [0.1], "changed": [1], "moved": [0.25], "top": []}


def old(method: str, **more: Any) -> dict[str, Any]:
    """A row as version 0.1 wrote it, shortened."""
    record = {
        "arm": method, "method": method, "temperature": 0.0, "top_k": None, "top_p": None, "block_size": 4,
        "scheme": "rejection", "ttt": None, "online_every": None, "control_of": None, "prompt_tokens": 9, "tokens": 5,
        "stop_reason": "stop_token", "tau": 2.0, "acceptance_lengths": [3, 1], "verified_lengths": [3, 1],
        "batch_tokens": 8, "decode_seconds": 2.0, "tokens_per_second": 4.0, "config_hash": "0",
    }  # fmt: skip
    return {"idx": "t", "metadata": {"context_id": "c"}, "model_output": "a", "dgd": {**record, **more}}


ANSWERS = [
    {"text": text, "tokens": tokens, "score": -1.0, "beta": None, "seed": 1, "stop_reason": "length"}
    for text, tokens in (("a", 5), ("b", 3))
]
ROWS = {
    "autoregressive": old(
        "autoregressive", block_size=None, acceptance_lengths=[1] * 4, verified_lengths=[1] * 4
    ),
    "speculative": old(
        "speculative", ttt=TTT, ttt_prefill_seconds=1.0, ttt_rehearsal_seconds=0.5, ttt_fit_seconds=3.0,
        ttt_peak_memory=None,
    ),
    "guided": old("guided", **BLEND, token_by_token=False, divergence=DIVERGENCE),
    "rerank": old(
        "rerank", rank_by="blend", num_candidates=2, betas=None, guidance=BLEND, candidates=ANSWERS, chosen=0,
        rank_seconds=0.5,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "name", "settings", "facts", "decoded"),
    [
        ("autoregressive", "Autoregressive", {}, (True, True, False), 4),
        ("speculative", "Speculative", {"block_size": 4, "scheme": "rejection"}, (True, False, False), 4),
        ("guided", "Guided", {**BLEND, "block_size": 4, "speculative": True}, (False, False, True), 4),
        ("rerank", "Rerank", {"rank_by": "blend", "num_answers": 2, "betas": None, "block_size": 4, **BLEND},
         (False, False, True), 4 + 2),
    ],
)  # fmt: skip
def test_a_row_of_each_method(
    method: str, name: str, settings: dict[str, Any], facts: tuple[bool, ...], decoded: int
) -> None:
    row = ROWS[method]
    before = copy.deepcopy(row)
    new = upgraded(row)
    assert row == before  # nothing is changed in place
    record = new["dgd"]
    assert (record["method"], record["settings"]) == (name, settings)
    assert tuple(record[fact] for fact in ("lossless", "baseline", "blends")) == facts
    assert record["decoded_tokens"] == decoded
    assert {key: value for key, value in new.items() if key != "dgd"} == {k: v for k, v in row.items() if k != "dgd"}
    kept = ("arm", "temperature", "block_size", "acceptance_lengths", "decode_seconds", "config_hash", "control_of")
    assert {key: record[key] for key in kept} == {key: row["dgd"][key] for key in kept}
    gone = {"scheme", "guidance", "candidates", "num_candidates", "token_by_token", "ttt_rehearsal_seconds", "beta"}
    assert not gone & set(record)
    assert upgraded(new) is new


def test_old_names_inside_a_row() -> None:
    adapted, guided, reranked = (upgraded(ROWS[name])["dgd"] for name in ("speculative", "guided", "rerank"))
    assert adapted["ttt"]["held_out_by"] == "validation_texts"
    assert [adapted["ttt"][name] for name in ("validation_texts", "validation_answers", "train_texts")] == [4, 3, 2]
    assert adapted["ttt_validation_seconds"] == 0.5
    assert guided["divergence"] == {"beta": 0.3, "tokens": ["a"], "js": [0.1], "argmax_changed": [1],
                                    "tv_target_guided": [0.25], "top": []}  # fmt: skip
    assert reranked["answers"] == ANSWERS
    slow = upgraded(old("guided", **BLEND, token_by_token=True))["dgd"]
    assert slow["settings"]["speculative"] is False
    without = upgraded(old("rerank", rank_by="target", num_candidates=2, guidance=None, candidates=ANSWERS))["dgd"]
    assert without["blends"] is False
    skipped = {"arm": "a", "method": "guided", **BLEND, "ttt": None, "skipped": "too long"}
    assert "decoded_tokens" not in upgraded({"idx": "t", "dgd": skipped})["dgd"]


@pytest.mark.parametrize(
    "record",
    [{"arm": "a"}, {"arm": "a", "method": "Guided"}, {"arm": "a", "method": ["x"]}, {"arm": "diagnostic", "ttt": None}],
)
def test_other_rows_stay_as_they_are(record: dict[str, Any]) -> None:
    row = {"idx": "t", "dgd": record}
    assert upgraded(row) is row
    assert not is_old(row)


def test_whoever_reads_rows_gets_todays_form(tmp_path: Path) -> None:
    path = tmp_path / run_folder.PREDICTIONS
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS.values()))
    names = ["Autoregressive", "Speculative", "Guided", "Rerank"]
    assert [row["dgd"]["method"] for row in run_folder.read_predictions(tmp_path)] == names
    assert [row["dgd"]["method"] for row in rows_of(path)] == names
    stats: dict[str, ArmStats] = {}
    for row in run_folder.read_predictions(tmp_path):
        collect_arm(stats, row)
    assert stats["rerank"].total.seconds == 2.0 * 6 / 8 + 0.5
    _, records = collect(run_folder.read_predictions(tmp_path))
    assert records["c"]["ttt_validation_seconds"] == 0.5
    assert len(read_graded(rows_of(path))[1]) == len(ROWS)


def test_an_unfinished_run_of_before_says_why_it_begins_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "version_0"
    folder.mkdir()
    run_folder.shard(folder, 0).write_text(json.dumps(ROWS["guided"]) + "\n")
    assert run_folder.choose_version(tmp_path, "new hash") == 1
    assert f"{folder} is unfinished, but its rows have the form of before version 0.2" in capsys.readouterr().out
    run_folder.shard(folder, 0).write_text(json.dumps(upgraded(ROWS["guided"])) + "\n")
    assert run_folder.choose_version(tmp_path, "new hash") == 2
    (folder / run_folder.DONE).touch()
    run_folder.shard(folder, 0).write_text(json.dumps(ROWS["guided"]) + "\n")
    assert run_folder.choose_version(tmp_path, "new hash") == 3
    assert capsys.readouterr().out == ""
