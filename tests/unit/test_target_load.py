"""load_target: what loads, what is refused by name, and all that can be absent or broken in a checkpoint."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import hf_model

from dgd_lightning.errors import InputError
from dgd_lightning.target.load import check_family, check_placement, load_target


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    hf_model("qwen3", dtype=torch.float32, num_hidden_layers=2, eos_token_id=[3, 5]).save_pretrained(tmp_path / "t")
    return tmp_path / "t"


def test_loads(folder: Path) -> None:
    target = load_target(folder, device="cpu")
    assert (target.vocab_size, target.hidden_size, target.num_layers, target.max_positions) == (64, 32, 2, 512)
    assert target.dtype == torch.float32
    assert target.stop_token_ids == (3, 5)
    assert load_target(str(folder), dtype="float64", device="cpu").dtype == torch.float64
    assert load_target(folder, dtype=torch.bfloat16, device=torch.device("cpu")).dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3_moe"])
def test_other_families_load(family: str, tmp_path: Path) -> None:
    hf_model(family, dtype=torch.float32, num_hidden_layers=2).save_pretrained(tmp_path)
    target = load_target(tmp_path, dtype="float64", device="cpu")
    ids, positions = torch.tensor([[1, 2, 3]]), torch.arange(3)[None]
    logits = target.step(ids, positions, target.new_cache(1, 3), max_length=3).logits
    assert logits is not None
    assert logits.isfinite().all()


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "qwen3_next", "architectures": ["Qwen3NextForCausalLM"]},
        {"model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"]},
        {"model_type": "qwen3_5_moe"},
        {"model_type": "lfm2"},
        {"model_type": "mamba2"},
        {"model_type": "falcon_mamba"},
        {"model_type": "jamba"},
        {"model_type": "qwen3", "layer_types": ["full_attention", "linear_attention"]},
    ],
    ids=lambda c: c["model_type"],
)
def test_recurrent_targets_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="hybrid or linear-attention") as caught:
        check_family(config)
    assert config["model_type"] in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
        {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
        {"model_type": "qwen3", "architectures": ["DFlashDraftModel"]},
        {"model_type": "qwen3", "architectures": ["Qwen3ForSequenceClassification"]},
        {},
    ],
    ids=str,
)
def test_other_architectures_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="Qwen3ForCausalLM, Qwen3MoeForCausalLM, LlamaForCausalLM"):
        check_family(config)


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "flex_attention", "kernels/fa"])
def test_attention_implementations_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="sdpa or eager") as caught:
        load_target("anything", attn_implementation=name)
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c", "~/nowhere", "a--b"])
def test_missing_folder(name: str) -> None:
    with pytest.raises(InputError, match=r"target: expected a folder .* received .*no such folder") as caught:
        load_target(name)
    assert "\n" not in str(caught.value)


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"'someone/model-that-is-not-here': no such folder, no cached copy"):
        load_target("someone/model-that-is-not-here")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("RepositoryNotFoundError", "unknown to the Hub"),
        ("GatedRepoError", "gated"),
        ("RevisionNotFoundError", "revision: expected one of someone/model, received v9"),
        ("LocalEntryNotFoundError", "no answer from the Hub"),
        ("OfflineModeIsEnabled", "no answer from the Hub"),
    ],
)
def test_what_the_hub_may_say(error: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    kind = getattr(errors, error)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(InputError, match=words):
        load_target("someone/model", revision="v9")


def test_incomplete_folders(folder: Path) -> None:
    weights = folder / "model.safetensors"
    state = load_file(weights)
    kept = {k: v for k, v in state.items() if "layers.1.mlp" not in k}
    save_file(kept, weights, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"missing or misshapen: model\.layers\.1\.mlp"):
        load_target(folder, device="cpu")
    weights.write_bytes(b"version https://git-lfs")
    with pytest.raises(InputError, match="readable checkpoint"):
        load_target(folder, device="cpu")
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin.*pickled weights are never loaded"):
        load_target(folder, device="cpu")
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"a folder with config\.json"):
        load_target(folder, device="cpu")


def test_remote_code_is_never_run(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    assert type(load_target(folder, device="cpu").model).__name__ == "Qwen3ForCausalLM"


def test_options_are_checked(folder: Path) -> None:
    with pytest.raises(InputError, match="dtype: expected auto or float16"):
        load_target(folder, dtype="half")
    with pytest.raises(InputError, match="device: expected auto, cpu"):
        load_target(folder, device="gpu")
    with pytest.raises(InputError, match=r"device: expected one of \d+ CUDA devices"):
        load_target(folder, device="cuda:99")


def test_stop_tokens_are_those_of_generate(tmp_path: Path) -> None:
    """LlamaConfig has eos_token_id 2 where its file has none; transformers' generate never asks it."""
    hf_model("llama", dtype=torch.float32, num_hidden_layers=2).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["eos_token_id"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text("{}")
    target = load_target(tmp_path, device="cpu")
    assert target.model.config.eos_token_id == 2
    assert target.stop_token_ids == ()
    ids = torch.tensor([[5, 6]])
    output = target.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, pad_token_id=0)
    assert output.shape[1] == 42
    (tmp_path / "generation_config.json").unlink()  # without one transformers fills it from config.json
    assert load_target(tmp_path, device="cpu").stop_token_ids == ()
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": 5}))
    assert load_target(tmp_path, device="cpu").stop_token_ids == (5,)


@pytest.mark.parametrize(
    ("device_map", "words"),
    [
        ({"model.embed_tokens": 0, "model.layers.0": 1, "lm_head": "cpu"}, "lm_head on cpu"),
        ({"": "disk"}, "all on disk"),
        ({"model": "cpu", "lm_head": "disk"}, "lm_head on disk"),
        ({"model": torch.device("cuda:0"), "lm_head": torch.device("cpu")}, "lm_head on cpu"),
    ],
)
def test_offloading_is_refused(
    device_map: dict[str, Any], words: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = f"device: expected a placement on GPUs alone, or on the CPU alone, received .*{words}"
    with pytest.raises(InputError, match=expected):
        load_target(folder, device=device_map)
    # what "balanced" comes to is known once the model is there
    monkeypatch.setattr("dgd_lightning.target.load.as_device_map", lambda device: None)
    monkeypatch.setattr("transformers.Qwen3ForCausalLM.hf_device_map", device_map, raising=False)
    with pytest.raises(InputError, match=expected):
        load_target(folder, device="balanced")


def test_placements_that_stay() -> None:
    for places in ((), ("cpu",), ("cpu", "cpu"), (0, "cuda:1"), (torch.device("cuda:0"),)):
        check_placement({f"model.{i}": place for i, place in enumerate(places)})


@pytest.mark.parametrize(
    ("setting", "neutral"),
    [
        ({"repetition_penalty": 1.05}, {"repetition_penalty": 1.0}),
        ({"no_repeat_ngram_size": 3}, {"no_repeat_ngram_size": 0}),
        ({"bad_words_ids": [[3, 4]]}, {"bad_words_ids": None}),
        ({"suppress_tokens": [3]}, {"suppress_tokens": []}),
    ],
    ids=lambda c: next(iter(c)),
)
def test_what_generate_would_apply_is_warned_of(setting: dict[str, Any], neutral: dict[str, Any], folder: Path) -> None:
    (name, value), file = next(iter(setting.items())), folder / "generation_config.json"
    given = json.loads(file.read_text())
    file.write_text(json.dumps(given | setting))
    with pytest.warns(UserWarning, match="generation config asks for") as caught:
        load_target(folder, device="cpu")
    (ours,) = [str(w.message) for w in caught if "generation config" in str(w.message)]
    assert f"{name} = {value}" in ours
    file.write_text(json.dumps(given | neutral))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_target(folder, device="cpu")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"num_hidden_layers": "6"}, "num_hidden_layers"),
        ({"layer_types": 5}, "target.layer_types: expected a list, received 5"),
        ({"architectures": 5}, "target.architectures: expected a list, received 5"),
        ({"rope_parameters": None, "rope_theta": "x"}, "target.rope_theta: expected a number above 0, received 'x'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "target.rope_parameters.rope_theta"),
        ({"rope_parameters": None, "rope_scaling": "x"}, "target.rope_scaling: expected an object, received 'x'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "target.rope_parameters.low_freq_factor"),
        ({"num_attention_heads": 0}, "target: expected a readable checkpoint"),
        ({"hidden_act": "x"}, "target: expected a readable checkpoint"),
    ],
    ids=str,
)
def test_values_of_another_type(changes: dict[str, Any], words: str, folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(InputError, match="Hint: ") as caught:
        load_target(folder, device="cpu")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("generation_config.json", "{", "target: expected JSON in generation_config.json"),
        ("generation_config.json", "[1]", "target: expected an object in generation_config.json, received list"),
        ("generation_config.json", '{"eos_token_id": "x"}', "target.generation_config.eos_token_id"),
        ("generation_config.json", '{"eos_token_id": [true]}', "target.generation_config.eos_token_id"),
        ("model.safetensors.index.json", '{"weight_map": [1]}', "weight_map: expected an object, received [1]"),
    ],
)
def test_other_malformed_files(name: str, text: str, words: str, folder: Path) -> None:
    if "index" in name:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / name).write_text(text)
    with pytest.raises(InputError, match="Hint: ") as caught:
        load_target(folder, device="cpu")
    assert words in str(caught.value)
