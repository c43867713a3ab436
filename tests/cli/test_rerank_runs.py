"""`method: rerank` arms of `dgd predict`: what `rerank_generate` gives, with all candidates in the rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import SHORT_FIT, Config, Dgd, TinyPair, check_error, predictions

from dgd_lightning import (
    Blend,
    LogitLens,
    WithoutContext,
    guided_generate,
    load_adapter,
    load_pair,
    rerank_generate,
    run_folder,
)
from dgd_lightning.methods.guided import Guided
from dgd_lightning.methods.speculative import Speculative
from dgd_lightning.modules.arms import Arm, row_seed
from dgd_lightning.modules.rows import DivergenceSettings, divergence_record

SAME = 1e-8  # fp64, in batches of other sizes
TASKS = 3
LENS = {"class_path": "LogitLens", "init_args": {"layer": 2}}
CAD = {"class_path": "WithoutContext"}


def drawn(name: str, **settings: Any) -> dict[str, Any]:
    method = {"class_path": "Rerank", "init_args": {"num_answers": 3, **settings}}
    return {"name": name, "method": method, "temperature": 1.0}


ARMS: list[dict[str, Any]] = [
    {"name": "target", "method": "Autoregressive"},
    drawn("best", rank_by="target"),
    drawn("by lens", rank_by="blend", beta=0.5, readout=LENS, candidates=20),
    drawn("by cad", rank_by="blend", beta=-0.5, readout=CAD),
    {"name": "betas", "method": {"class_path": "Rerank", "init_args": {"betas": [-0.5, 0.0, 0.5]}}},
]


def folder_of(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "run" / "version_0"


def by_arm(folder: Path) -> dict[str, list[dict[str, Any]]]:
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in predictions(folder):
        rows.setdefault(row["dgd"]["arm"], []).append(row)
    return rows


def test_rerank_arms_give_what_the_function_gives(
    config: Config, dgd: Dgd, tiny_pair: TinyPair, contexts: Path, tmp_path: Path
) -> None:
    data = {"path": str(contexts), "batch_size": 2, "limit": TASKS}
    path = config({"arms": ARMS, "warmup": True}, data, trainer={"callbacks": [{"class_path": "CaseStudies"}]})
    run = dgd("predict", "--config", path)
    assert run.code == 0, run.err
    rows = by_arm(folder_of(tmp_path))
    pair = load_pair(tiny_pair.target, tiny_pair.draft, device="cpu")
    drawn: dict[str, Any] = {"temperature": 1.0, "num_answers": 3}
    for name, knobs in {
        "best": {**drawn, "rank_by": "target"},
        "by lens": {**drawn, "rank_by": "blend", "blend": Blend(0.5, candidates=20), "readout": LogitLens(2)},
        "by cad": {**drawn, "rank_by": "blend", "blend": Blend(-0.5)},
        "betas": {"temperature": 0.0, "betas": [-0.5, 0.0, 0.5]},
    }.items():
        assert len(rows[name]) == TASKS
        for row in rows[name]:
            record = row["dgd"]
            if name == "by cad":
                knobs |= {"readout": WithoutContext([torch.tensor(record["without_context_ids"])])}
            seed = row_seed(0, row["idx"], Arm(name, Speculative(), temperature=knobs["temperature"]))
            prompt = torch.tensor(record["prompt_ids"])
            (output,) = rerank_generate(pair, [prompt], max_new_tokens=12, seed=[seed], **knobs)
            assert record["output_ids"] == output.tokens.tolist()
            expected = output.trace.answers
            assert expected is not None
            found = record["answers"]
            texts = [pair.tokenizer.decode(one.tokens, skip_special_tokens=True) for one in expected]  # type: ignore[union-attr]
            assert [one["text"] for one in found] == texts
            assert [one["tokens"] for one in found] == [len(one.tokens) for one in expected]
            assert [one["beta"] for one in found] == [one.beta for one in expected]
            assert [one["seed"] for one in found] == [one.seed for one in expected]
            assert [one["stop_reason"] for one in found] == [one.stop_reason for one in expected]
            scores = [float("-inf") if one["score"] is None else one["score"] for one in found]
            assert scores == pytest.approx([one.score for one in expected], abs=SAME)
            assert record["chosen"] == scores.index(max(scores))
            assert found[record["chosen"]]["text"] == row["model_output"]
    assert {row["dgd"]["chosen"] for name in ("best", "by lens") for row in rows[name]} != {0}
    assert [r["dgd"]["answers"] for r in rows["best"]] != [r["dgd"]["answers"] for r in rows["by lens"]]
    assert rows["by lens"][0]["dgd"]["settings"]["candidates"] == 20  # the constraint
    assert "candidates" not in rows["best"][0]["dgd"]["settings"]
    assert rows["best"][0]["dgd"]["blends"] is False

    for row in run_folder.read_predictions(folder_of(tmp_path)):
        record = row["dgd"]
        if "answers" in record:
            assert record["tokens_per_second"] is None
            parts = [record[f"{part}_seconds"] for part in ("prefill", "decode", "rank")]
            assert record["seconds"] == pytest.approx(sum(parts))
            assert record["rank_seconds"] > 0
    assert "those of the chosen answers" in (folder_of(tmp_path) / "summary.txt").read_text()
    page = (folder_of(tmp_path) / "case_studies.html").read_text()
    assert page.count("<summary>3 answers, of which number ") == TASKS * 4


def test_divergence_of_a_candidate_with_a_beta_is_that_of_its_guided_arm(
    config: Config, dgd: Dgd, tiny_pair: TinyPair, contexts: Path, tmp_path: Path
) -> None:
    data = {"path": str(contexts), "batch_size": 2, "limit": 2}
    assert dgd("predict", "--config", config({"arms": [ARMS[1], ARMS[4]], "divergence": {}}, data)).code == 0
    pair = load_pair(tiny_pair.target, tiny_pair.draft, device="cpu")
    for name, rows in by_arm(folder_of(tmp_path)).items():
        for record in (row["dgd"] for row in rows):
            beta = record["answers"][record["chosen"]]["beta"]
            guidance = None if name == "best" else Guided(beta).guidance_of({})
            prompt, answer = torch.tensor(record["prompt_ids"]), torch.tensor(record["output_ids"])
            assert record["divergence"] == divergence_record(pair, guidance, prompt, answer, DivergenceSettings())
            if name == "betas":
                (output,) = guided_generate(pair, [prompt], max_new_tokens=12, beta=beta)
                assert output.tokens.tolist() == record["output_ids"]


def test_candidates_of_an_adapted_arm_are_blended_with_the_adapted_draft(
    config: Config, dgd: Dgd, tiny_pair: TinyPair, contexts: Path, tmp_path: Path
) -> None:
    arms = [
        {
            "name": name,
            "method": {"class_path": "Rerank", "init_args": {"betas": [-0.5, 0.5]}},
            "ttt": name == "adapted",
        }
        for name in ("plain", "adapted")
    ]
    data = {"path": str(contexts), "batch_size": 2, "clbench": False, "limit": 2}
    assert dgd("predict", "--config", config({"arms": arms, "ttt": SHORT_FIT}, data)).code == 0
    rows = by_arm(folder_of(tmp_path))
    pair = load_pair(tiny_pair.target, tiny_pair.draft, device="cpu")
    different = 0
    for plain, adapted in zip(rows["plain"], rows["adapted"], strict=True):
        prompt = torch.tensor(adapted["dgd"]["prompt_ids"])
        adapter = load_adapter(folder_of(tmp_path) / "adapters" / adapted["metadata"]["context_id"])
        with pair.adapter(adapter):
            (output,) = rerank_generate(pair, [prompt], max_new_tokens=12, betas=[-0.5, 0.5], temperature=0.0)
        assert adapted["dgd"]["output_ids"] == output.tokens.tolist()
        assert plain["dgd"]["ttt"] is None
        different += plain["dgd"]["answers"] != adapted["dgd"]["answers"]
    assert different > 0


def test_without_a_draft(config: Config, dgd: Dgd, contexts: Path, tmp_path: Path) -> None:
    data = {"path": str(contexts), "batch_size": 2, "limit": TASKS}
    assert dgd("predict", "--config", config({"arms": ARMS[1:3], "draft": None}, data)).code == 0
    assert [row["dgd"]["block_size"] for row in by_arm(folder_of(tmp_path))["best"]] == [None] * TASKS


def test_mistakes_are_one_line(config: Config, dgd: Dgd) -> None:
    run = dgd("predict", "--config", config({"arms": [{"name": "x", "method": "Rerank"}]}))
    check_error(run, "model.arms[x].temperature", "above 0", "betas")
    speculative = {"class_path": "Speculative", "init_args": {"betas": [0.1]}}
    run = dgd("predict", "--config", config({"arms": [{"name": "x", "method": speculative}]}))
    check_error(run, "model.arms[x].method.betas", "a key of Speculative")
