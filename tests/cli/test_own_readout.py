"""The readout of docs/guided.md: written to a file, named by an arm, exact."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch
import yaml
from cli_tools import VOCAB, Config, Dgd, byte_tokenizer, predictions
from tiny import hf_model, make_draft

from dgd_lightning import guided_generate, load_pair
from dgd_lightning.draft.checkpoint import save_draft
from dgd_lightning.target.model import Target

DOC = Path(__file__).parents[2] / "docs" / "guided.md"


def test_the_documented_readout_is_an_arm_and_exact(
    config: Config, dgd: Dgd, contexts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = DOC.read_text().split("## A readout of your own")[1]
    code, arms = (re.search(rf"```{kind}\n(.*?)```", section, re.S) for kind in ("python", "yaml"))
    assert code is not None
    assert arms is not None
    (tmp_path / "my_readouts.py").write_text(code[1])
    monkeypatch.syspath_prepend(tmp_path)
    target, draft = tmp_path / "target", tmp_path / "draft"
    deep = hf_model(vocab_size=VOCAB, num_hidden_layers=6)  # the documented readout reads layers 2 and 4
    deep.save_pretrained(target)
    byte_tokenizer().save_pretrained(target)
    save_draft(make_draft(Target(deep)), draft)
    model = {
        "target": str(target),
        "draft": str(draft),
        "arms": [{"name": "target", "method": "Autoregressive"}, *yaml.safe_load(arms[1])],
    }
    run = dgd("predict", "--config", config(model, {"path": str(contexts)}))
    assert run.code == 0, run.err

    rows = predictions(tmp_path / "logs" / "run" / "version_0")
    told = {arm: [row["dgd"] for row in rows if row["dgd"]["arm"] == arm] for arm in ("target", "mean")}
    mean = importlib.import_module("my_readouts").MeanLens((2, 4))
    pair = load_pair(target, draft, device="cpu")
    for row in told["mean"]:
        (slow,) = guided_generate(
            pair, [torch.tensor(row["prompt_ids"])], beta=0.2, readout=mean, max_new_tokens=12, speculative=False
        )
        assert row["output_ids"] == slow.tokens.tolist()
        assert row["settings"]["readout"] == {"class_path": "my_readouts.MeanLens", "init_args": {"read": [2, 4]}}
    assert [row["output_ids"] for row in told["mean"]] != [row["output_ids"] for row in told["target"]]
