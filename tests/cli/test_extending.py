"""The examples of docs/extending.md: written to files, named in one YAML, run; each at most 40 lines."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from cli_tools import VOCAB, Config, Dgd, byte_tokenizer, chat_row, predictions, write_jsonl
from tiny import hf_model, make_draft

from dgd_lightning import guided_generate, load_pair
from dgd_lightning.draft.checkpoint import save_draft
from dgd_lightning.scoring.score_run import grade_run, source
from dgd_lightning.target.model import Target

DOC = Path(__file__).parents[2] / "docs" / "extending.md"
LONGEST = 40


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", DOC.read_text(encoding="utf-8"), re.S)


def test_the_documented_classes_run_from_one_yaml(
    config: Config, dgd: Dgd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = {match[1]: text for text in blocks("python") if (match := re.match(r"# (\w+)\.py\n", text))}
    assert sorted(code) == ["my_grader", "my_methods", "my_metrics", "my_readouts"]
    assert all(len(text.splitlines()) <= LONGEST for text in code.values())
    for name, text in code.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    documented = [yaml.safe_load(text) for text in blocks("yaml")]
    arms = [part[0] for part in documented if isinstance(part, list)]
    (trainer,) = [part["trainer"] for part in documented if isinstance(part, dict)]
    assert [arm["name"] for arm in arms] == ["vote", "mean"]

    target, draft = tmp_path / "target", tmp_path / "draft"
    deep = hf_model(vocab_size=VOCAB, num_hidden_layers=6)  # the documented readout reads layers 2 and 4
    deep.save_pretrained(target)
    byte_tokenizer().save_pretrained(target)
    save_draft(make_draft(Target(deep)), draft)
    model = {
        "target": str(target),
        "draft": str(draft),
        "arms": [{"name": "target", "method": "Autoregressive"}, *arms],
        "max_new_tokens": 3,
    }
    tasks = [chat_row(context, task) for context in range(2) for task in range(2)]
    data = write_jsonl(tmp_path / "tasks.jsonl", tasks)
    run = dgd("predict", "--config", config(model, {"path": str(data)}, trainer))
    assert run.code == 0, run.err
    assert "distinct-2" in run.out

    folder = tmp_path / "logs" / "run" / "version_0"
    rows = predictions(folder)
    said = {name: [row["dgd"] for row in rows if row["dgd"]["arm"] == name] for name in ("target", "vote", "mean")}
    mean = importlib.import_module("my_readouts").MeanLens((2, 4))
    pair = load_pair(target, draft, device="cpu")
    for row in said["mean"]:
        (slow,) = guided_generate(
            pair, [torch.tensor(row["prompt_ids"])], beta=0.2, readout=mean, max_new_tokens=3, speculative=False
        )
        assert row["output_ids"] == slow.tokens.tolist()
        assert row["settings"]["readout"] == {"class_path": "my_readouts.MeanLens", "init_args": {"read": [2, 4]}}
    assert [row["output_ids"] for row in said["mean"]] != [row["output_ids"] for row in said["target"]]

    for row in said["vote"]:
        assert (row["method"], row["settings"]) == ("my_methods.MajorityVote", {"num_answers": 3})
        texts = [answer["text"] for answer in row["answers"]]
        assert len(texts) == 3
        assert Counter(texts)[texts[row["chosen"]]] == max(Counter(texts).values())
    assert len({answer["seed"] for row in said["vote"] for answer in row["answers"]}) == 3 * len(said["vote"])

    grader = importlib.import_module("my_grader").ExactMatch()
    gold = {row["idx"]: row["model_output"] for row in rows if row["dgd"]["arm"] == "target"}
    for row in rows:
        row["metadata"]["gold"] = gold[row["idx"]].strip()
    graded = grade_run(source(write_jsonl(tmp_path / "answers.jsonl", rows)), [grader])
    scores = {arm: [one.score for one in graded.scores if one.arm == arm] for arm in said}
    assert scores["target"] == [1.0] * len(tasks)
    assert 0.0 in scores["mean"]
