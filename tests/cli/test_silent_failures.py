"""What once gave wrong numbers, or a message that helped nobody, ends with exit code 2 and one line, by the command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli_tools import SHORT_FIT, Config, Dgd, TinyPair, byte_tokenizer, check_error, write_jsonl, write_training
from safetensors.torch import load_file, save_file
from tiny import hf_model

from dgd_lightning.run_folder import read_predictions

AR = [{"name": "ar", "method": "Autoregressive"}]
SPECULATIVE = [{"name": "dflash", "method": "Speculative"}]
WARM = [{"name": "warm", "method": "Autoregressive", "temperature": 1.0}]
GUIDED = [{"name": "dgd", "method": {"class_path": "Guided", "init_args": {"beta": 0.3}}}]
FIT = {**SHORT_FIT, "steps": 2}


def changed(folder: Path, to: Path, change: Callable[[dict[str, Any]], None], **config: Any) -> Path:
    """A copy of a checkpoint with other weights and other fields of its config.json."""
    shutil.copytree(folder, to)
    weights = load_file(to / "model.safetensors")
    change(weights)
    save_file(weights, to / "model.safetensors", {"format": "pt"})
    raw = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(raw | config))
    return to


def too_large(weights: dict[str, Any]) -> None:
    """Logits beyond 65504, where float16 ends."""
    weights["lm_head.weight"] *= 1e5


def no_numbers(weights: dict[str, Any]) -> None:
    weights["norm.weight"].fill_(float("nan"))


@pytest.mark.parametrize("arms", [AR, SPECULATIVE, WARM, GUIDED], ids=lambda arms: arms[0]["name"])
def test_float16_that_overflows(arms: list[Any], dgd: Dgd, config: Config, tiny_pair: TinyPair, tmp_path: Path) -> None:
    """Once: rows of token 0, τ 3.67 and a speed-up, and an IndexError at a temperature."""
    target = changed(tiny_pair.target, tmp_path / "target", too_large)
    run = dgd("predict", "--config", config(model={"target": str(target), "arms": arms, "dtype": "float16"}))
    check_error(
        run, f"task t0-0 ({arms[0]['name']})", "finite logits of the target", "float16", "set dtype (model.dtype)"
    )
    assert not list(tmp_path.glob("logs/**/predictions*"))


def test_a_draft_that_is_no_number(
    dgd: Dgd, config: Config, contexts: Path, tiny_pair: TinyPair, tmp_path: Path
) -> None:
    draft = str(changed(tiny_pair.draft, tmp_path / "draft", no_numbers))
    run = dgd("predict", "--config", config(model={"draft": draft, "arms": SPECULATIVE}))
    check_error(run, "task t0-0 (dflash)", "finite logits of the draft", "at position", "damaged")
    run = dgd("predict", "--config", config(model={"draft": draft, "arms": AR, "divergence": {}}))
    check_error(run, "task t0-0 (ar)", "finite logits of the readout DraftReadout")  # what the draft would have said
    adapted = [{"name": "ttt", "method": "Speculative", "ttt": True}]
    own = {"path": str(contexts), "clbench": False}
    run = dgd("predict", "--config", config(model={"draft": draft, "arms": adapted, "ttt": FIT}, data=own))
    check_error(run, "task t0-0 (ttt)", "finite logits of the draft")  # what it was adapted to is its own again


def test_a_diagnostic_of_a_draft_that_is_no_number(
    dgd: Dgd, config: Config, tiny_pair: TinyPair, tmp_path: Path
) -> None:
    draft = str(changed(tiny_pair.draft, tmp_path / "draft", no_numbers))
    path = write_jsonl(tmp_path / "gold.jsonl", [{"prompt": "two and two", "answer": "four"}])
    written = yaml.safe_load(config(data={"path": str(path)}, data_class="PromptsData").read_text())
    init = {"target": str(tiny_pair.target), "draft": draft, "slots": False}
    written["model"] = {"class_path": "Diagnostic", "init_args": init}
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(written))
    run = dgd("test", "--config", tmp_path / "test.yaml")
    check_error(run, "task gold-1", "finite logits of the readout DraftReadout")


@pytest.mark.parametrize(
    ("lr", "words"),
    [
        (1e30, ["loss", "received nan in step 2", "nothing is exported", "lower model.lr"]),
        (1e9, ["model.lr", "finite weights after the last step"]),  # too large for the target's float16
    ],
)
def test_a_fit_whose_loss_is_no_number_exports_nothing(
    lr: float, words: list[str], dgd: Dgd, tiny_pair: TinyPair, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    steps, kind = (3, "float32") if lr == 1e30 else (1, "float16")
    model, trainer = {"lr": lr, "export_dir": str(out), "dtype": kind}, {"max_steps": steps, "limit_val_batches": 0}
    run = dgd("fit", "--config", write_training(tmp_path, tiny_pair, model=model, trainer=trainer))
    check_error(run, *words, began=True)
    assert not out.exists()


def test_a_token_beyond_the_vocabulary_names_its_task(dgd: Dgd, config: Config, tmp_path: Path) -> None:
    model = hf_model(vocab_size=80, dtype=torch.float64)  # the bytes of an accented letter have larger ids
    model.save_pretrained(tmp_path / "small")
    byte_tokenizer().save_pretrained(tmp_path / "small")
    small = {"target": str(tmp_path / "small"), "draft": None, "arms": AR}
    run = dgd("predict", "--config", config(model=small))
    check_error(run, "task t0-0", "token ids in 0 … 79", "received 257", "the target's own tokenizer")


def test_a_seed_that_numpy_can_t_have(dgd: Dgd, config: Config) -> None:
    check_error(dgd("predict", "--config", config(), "--seed_everything", "-1"), "seed_everything", "received -1")


@pytest.mark.parametrize("command", ["predict", "fit"])
def test_no_devices(command: str, dgd: Dgd, config: Config, tiny_pair: TinyPair, tmp_path: Path) -> None:
    path = config() if command == "predict" else write_training(tmp_path, tiny_pair)
    check_error(dgd(command, "--config", path, "--trainer.devices", "0"), "trainer.devices", "at least 1", "received 0")


def test_a_quantised_target_is_refused(dgd: Dgd, config: Config, tiny_pair: TinyPair, tmp_path: Path) -> None:
    settings = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    target = changed(tiny_pair.target, tmp_path / "target", lambda weights: None, **settings)
    run = dgd("predict", "--config", config(model={"target": str(target)}))
    check_error(run, "target", "weights in float16", "quantised by gptq", "quantised checkpoints are not supported")


def test_the_mask_token_of_a_new_draft_is_no_token_in_use(dgd: Dgd, tiny_pair: TinyPair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = dgd("fit", "--config", write_training(tmp_path, tiny_pair, model={"export_dir": str(out)}))
    assert run.code == 0, run.err
    assert "mask token: 258, the first row beyond the tokenizer's 258 ids" in run.out
    assert json.loads((out / "config.json").read_text())["dflash_config"]["mask_token_id"] == 258


def test_an_end_token_that_nothing_stops_at_is_warned_of(
    dgd: Dgd, config: Config, tiny_pair: TinyPair, tmp_path: Path
) -> None:
    target = changed(tiny_pair.target, tmp_path / "target", lambda weights: None)
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": [7]}))
    with pytest.warns(UserWarning, match=r"the tokenizer's end token <e> \(257\) does not end answers: .* has 7 alone"):
        run = dgd("predict", "--config", config(model={"target": str(target), "arms": AR}), "--data.limit", "1")
    assert run.code == 0, run.err
    assert len(list(read_predictions(tmp_path / "logs" / "run" / "version_0"))) == 1
