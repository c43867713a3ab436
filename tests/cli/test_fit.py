"""`dgd fit`, `validate`, `test`: a draft trains on what the target really read, and a resumed run is the same run."""

from __future__ import annotations

import json
import os
import shlex
import signal
from pathlib import Path

import pytest
import torch
from cli_tools import SHORT, Config, Dgd, TinyPair, predictions, write_jsonl, write_training

from dgd_lightning.callbacks import FitInterrupted
from dgd_lightning.data.responses import ResponsesData
from dgd_lightning.draft.checkpoint import load_draft
from dgd_lightning.modules.draft_training import DraftTraining


@pytest.mark.filterwarnings("ignore")
def test_predictions_carry_the_prompt_that_was_fed(config: Config, dgd: Dgd, tiny_pair: TinyPair, tmp_path: Path):
    path = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": text} for text in ("Hm?", "y" * 600)])
    data = {"path": str(path), "template": "Say: {prompt}!", "system": "Be brief.", "batch_size": 2}
    arms = [{"name": "ar", "method": "Autoregressive"}]
    written = config({"arms": arms, "draft": None, "too_long": "truncate_left"}, data, data_class="PromptsData")
    assert dgd("predict", "--config", written).code == 0
    folder = tmp_path / "logs" / "run" / "version_0"
    rows = predictions(folder)
    responses = ResponsesData(str(folder / "predictions.jsonl"), str(tiny_pair.target), val_share=0.0)
    responses.setup("fit")
    assert responses.train_set is not None
    short, long = (prompt for prompt, _ in responses.train_set)
    from transformers import AutoTokenizer

    text = AutoTokenizer.from_pretrained(tiny_pair.target).decode(short)
    assert "Be brief." in text
    assert "Say: Hm?!" in text
    assert len(long) == 512 - SHORT  # cut as the target's was
    assert [len(short), len(long)] == [min(row["dgd"]["prompt_tokens"], 512 - SHORT) for row in rows]

    training = tmp_path / "train.yaml"
    training.write_text(f"""
name: train
logs_dir: {tmp_path / "logs"}
model:
  class_path: DraftTraining
  init_args: {{target: {tiny_pair.target}, draft: {tiny_pair.draft}, dtype: float32, val_max_new_tokens: 8}}
data:
  class_path: ResponsesData
  init_args: {{path: {folder / "predictions.jsonl"}, target: {tiny_pair.target}, val_share: 0.5}}
trainer: {{accelerator: cpu, devices: 1}}
""")
    for stage in ("test", "validate"):
        run = dgd(stage, "--config", training)
        assert run.code == 0, run.err
        assert ("test" if stage == "test" else "val") + "/tau_micro" in run.out


@pytest.mark.parametrize("logs", ["relative", "absolute"])
def test_a_resumed_fit_goes_on_in_its_version_and_keeps_its_best(
    dgd: Dgd, tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logs: str
) -> None:
    checkpoint = {"monitor": "val/tau_micro", "mode": "min", "save_last": True}
    trainer = {
        "val_check_interval": 1,
        "num_sanity_val_steps": 0,
        "callbacks": [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoint}],
    }
    # τ of a new draft soon is 1, the least there is, and no later step beats it; a run that forgot takes one of its own
    config = write_training(tmp_path, tiny_pair, model={"export_dir": str(tmp_path / "draft")}, trainer=trainer)
    monkeypatch.chdir(tmp_path)
    run = dgd("fit", "--config", config)
    assert run.code == 0
    (exported,) = (line for line in run.out.splitlines() if line.startswith("exported the draft of step"))
    root = tmp_path / "logs" / "train"
    first = load_draft(tmp_path / "draft").fc.weight

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    arguments = ["--logs_dir", "../logs" if logs == "relative" else str(tmp_path / "logs")]
    last = "version_0/checkpoints/last.ckpt"
    arguments += ["--ckpt_path", os.path.join(os.path.relpath(root) if logs == "relative" else root, last)]
    run = dgd("fit", "--config", config, *arguments, "--trainer.max_steps", "5")
    assert run.code == 0, run.err
    assert all(line.startswith("INFO: ") for line in run.err.splitlines()), run.err  # no warning of anything
    assert [path.name for path in root.iterdir()] == ["version_0"]
    assert "training: step 5/5, train/loss " in run.out  # stdout is no terminal here
    assert exported in run.out
    assert f"run folder: {root / 'version_0'}" in run.out
    assert torch.equal(load_draft(tmp_path / "draft").fc.weight, first)
    state = torch.load(root / last, weights_only=False)
    assert state["global_step"] == 5
    record = json.loads((root / "version_0" / "provenance.json").read_text())
    assert len(record["sessions"]) == 2
    assert record["sessions"][0]["data_hash"] == record["sessions"][1]["data_hash"] == record["data_hash"]


def test_a_checkpoint_of_another_run_starts_a_new_version(dgd: Dgd, tiny_pair: TinyPair, tmp_path: Path) -> None:
    config = write_training(tmp_path, tiny_pair)
    assert dgd("fit", "--config", config).code == 0
    (path,) = (tmp_path / "logs" / "train" / "version_0" / "checkpoints").iterdir()
    more = ["--ckpt_path", path, "--trainer.max_steps", "3", "--name", "other"]
    assert dgd("fit", "--config", config, *more).code == 0
    assert (tmp_path / "logs" / "other" / "version_0" / "checkpoints").is_dir()


def test_data_hash_follows_the_file_and_how_it_is_read(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"idx": "1"}])
    first = ResponsesData(str(path), "lab").fingerprint()
    assert ResponsesData(str(path), "lab", num_workers=3).fingerprint() == first
    assert ResponsesData(str(path), "lab", seed=1).fingerprint() != first
    write_jsonl(path, [{"idx": "2"}])
    assert ResponsesData(str(path), "lab").fingerprint() != first


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("gathered", [1, 2], ids=["each step", "gradients of two batches"])
def test_an_interrupted_fit_prints_what_continues_it_to_the_same_weights(
    dgd: Dgd,
    tiny_pair: TinyPair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    code: int,
    gathered: int,
) -> None:
    trainer = {"max_steps": 5, "num_sanity_val_steps": 0, "accumulate_grad_batches": gathered}
    config = write_training(tmp_path, tiny_pair, model={"export_dir": str(tmp_path / "draft")}, trainer=trainer)
    assert dgd("fit", "--config", config).code == 0
    whole = load_draft(tmp_path / "draft").state_dict()

    step, given, handlers = DraftTraining.training_step, [], [signal.getsignal(n) for n in (2, 15)]

    def interrupted(self: DraftTraining, batch: object, batch_idx: int) -> object:
        loss = step(self, batch, batch_idx)
        if self.global_step == 2 and not given:
            given.append(number)
            os.kill(os.getpid(), number)
        return loss

    monkeypatch.setattr(DraftTraining, "training_step", interrupted)
    run = dgd("fit", "--config", config, "--model.export_dir", tmp_path / "other")
    assert run.code == code, run.err
    assert [signal.getsignal(n) for n in (2, 15)] == handlers
    assert "ending after this step" in run.err
    (line,) = (line for line in run.out.splitlines() if line.startswith("continue:"))
    words = shlex.split(line.partition(":")[2])
    assert words[:2] == ["dgd", "fit"]
    saved = torch.load(words[-1], weights_only=False)
    assert saved["global_step"] == 3  # the step that it came in
    run = dgd(*words[1:])
    assert run.code == 0, run.err
    found = load_draft(tmp_path / "other").state_dict()
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def test_a_fit_that_is_interrupted_in_its_last_step_ends_and_exports(
    dgd: Dgd, tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a checkpoint of the last step Lightning would run nothing, the export neither."""
    step = DraftTraining.training_step

    def interrupted(self: DraftTraining, batch: object, batch_idx: int) -> object:
        if self.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(DraftTraining, "training_step", interrupted)
    config = write_training(tmp_path, tiny_pair, model={"export_dir": str(tmp_path / "draft")})
    run = dgd("fit", "--config", config)
    assert run.code == 0, run.err
    assert load_draft(tmp_path / "draft") is not None
    assert "continue:" not in run.out


def test_a_command_that_has_continued_continues() -> None:
    callback = FitInterrupted(["fit", "--ckpt_path", "a b.ckpt", "-c", "x.yaml", "--ckpt_path=c.ckpt"])
    assert callback.command(Path("d e.ckpt")) == "dgd fit -c x.yaml --ckpt_path 'd e.ckpt'"
