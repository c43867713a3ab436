"""Bad input of `dgd fit`: one line before the first step, naming the row or the argument."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from cli_tools import Dgd, TinyPair, answered_rows, byte_tokenizer, check_error, write_training

PROMPT = [1, 2, 3]
MODULES = {"DraftTraining": "draft_training", "TargetPretraining": "target_pretraining"}


def row(prompt: Any = PROMPT, output: Any = (4, 5, 6), **changes: Any) -> dict[str, Any]:
    written = {"prompt_ids": prompt, "output_ids": list(output) if isinstance(output, tuple) else output}
    return {"idx": "bad", "model_output": "text", "dgd": written, **changes}


BAD_ROWS = {
    "dgd text": (row(dgd="text"), "'dgd' to be an object", "str 'text'"),
    "dgd list": (row(dgd=[]), "'dgd' to be an object", "list"),
    "answer number": (row(model_output=5), "'model_output' to be a text", "int '5'"),
    "answer list": (row(model_output=[]), "'model_output' to be a text", "list"),
    "prompt of texts": (row(["a"]), "prompt_ids to be a list of the target's ids, 0…287", "['a']"),
    "prompt of fractions": (row([1.5, 2.0]), "prompt_ids to be a list", "[1.5, 2.0]"),
    "prompt text": (row("12"), "prompt_ids to be a list", "12"),
    "nested prompt": (row([[1], [2]]), "prompt_ids to be a list", "[[1], [2]]"),
    "no prompt": (row([]), "a prompt of at least one token", "none"),
    "null id": (row([1, None]), "prompt_ids to be a list", "None"),
    "huge id": (row([10**30]), "prompt_ids to be a list", "1000"),
    "foreign id": (row(output=(1, 288)), "output_ids to be a list of the target's ids, 0…287", "received 288"),
    "negative id": (row(output=(1, -1)), "output_ids to be a list", "received -1"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows(dgd: Dgd, tiny_pair: TinyPair, tmp_path: Path, case: str) -> None:
    bad, expected, received = BAD_ROWS[case]
    config = write_training(tmp_path, tiny_pair, [*answered_rows(2), bad])
    check_error(dgd("fit", "--config", config), "data.path line 3", expected, received)
    assert not list((tmp_path / "logs").rglob("version_*"))


@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        (["--data.val_batch_size", "0"], "data.val_batch_size"),
        (["--data.num_workers", "-1"], "data.num_workers"),
        (["--model.num_anchors", "0"], "model.num_anchors"),
        (["--model.val_max_new_tokens", "0"], "model.val_max_new_tokens"),
        (["--model.lr", "-1"], "model.lr"),
        (["--model.lr", ".nan"], "model.lr"),
        (["--ckpt_path", "nowhere.ckpt"], "ckpt_path"),
        (["--ckpt_path", "last"], "ckpt_path"),
    ],
)  # fmt: skip
def test_bad_arguments(dgd: Dgd, tiny_pair: TinyPair, tmp_path: Path, arguments: list[str], argument: str) -> None:
    config = write_training(tmp_path, tiny_pair)
    check_error(dgd("fit", "--config", config, *arguments), argument, arguments[1].lstrip("."))


@pytest.mark.parametrize("has", ["no tokenizer", "no end token"])
def test_encoding_an_answer_takes_a_tokenizer_with_an_end(
    dgd: Dgd, tiny_pair: TinyPair, tmp_path: Path, has: str
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").write_text((tiny_pair.target / "config.json").read_text())
    if has == "no end token":
        tokenizer = byte_tokenizer()
        tokenizer.eos_token = None
        tokenizer.save_pretrained(target)
    rows = [row(dgd={"prompt_ids": PROMPT})]
    config = write_training(tmp_path, tiny_pair, rows, data={"target": str(target)})
    check_error(dgd("fit", "--config", config), "data.target", "data.path line 1")


@pytest.mark.parametrize("spelling", ["another", "the same"])
def test_data_of_another_target_is_refused(
    dgd: Dgd, tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    if spelling == "another":
        run = dgd("fit", "--config", write_training(tmp_path, tiny_pair, data={"target": "lab"}))
        check_error(run, "data.target", str(tiny_pair.target), "received lab")
        return
    monkeypatch.chdir(tmp_path)
    data = {"target": os.path.relpath(tiny_pair.target) + "/."}
    assert dgd("fit", "--config", write_training(tmp_path, tiny_pair, data=data)).code == 0


@pytest.mark.parametrize("model", ["DraftTraining", "TargetPretraining"])
def test_unwritable_export_folder_is_told_before_training(
    dgd: Dgd, tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    (tmp_path / "file").touch()
    config = write_training(tmp_path, tiny_pair, model={"export_dir": str(tmp_path / "file" / "draft")})
    if model == "TargetPretraining":
        shares = {"long_share": 0.2, "recall_share": 0.5, "contradict": 0.1, "families": ["glossary"]}
        stages = [{"steps": 1, "sequence_length": 48, "batch_size": 2, "sizes": [3, 3], **shares}]
        init_args = {"export_dir": str(tmp_path / "file" / "draft"), "compile": False}
        config.write_text(json.dumps({
            "name": "train",
            "logs_dir": str(tmp_path / "logs"),
            "model": {"class_path": model, "init_args": init_args},
            "data": {"class_path": "LabTargetData", "init_args": {"stages": stages, "num_workers": 0}},
            "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 1},
        }))  # fmt: skip
    started: list[Any] = []
    monkeypatch.setattr(f"dgd_lightning.modules.{MODULES[model]}.{model}.training_step", lambda *a: started.append(a))
    check_error(dgd("fit", "--config", config), "model.export_dir", str(tmp_path / "file"))
    assert not started
    assert not list((tmp_path / "logs").rglob("version_*"))
