"""load_pair: what travels together, and every way two checkpoints may not belong together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_pair

from dgd_lightning.draft.checkpoint import save_draft
from dgd_lightning.errors import InputError
from dgd_lightning.methods.speculative import speculative_generate
from dgd_lightning.pair import load_pair, load_tokenizer
from dgd_lightning.target.folder import bundled


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    pair = make_pair(dtype=torch.float32)
    assert pair.draft is not None
    pair.target.model.save_pretrained(tmp_path / "target")
    return tmp_path / "target", save_draft(pair.draft, tmp_path / "draft", dtype=torch.bfloat16)


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_draft_follows_target(folders: tuple[Path, Path]) -> None:
    target, draft = folders
    pair = load_pair(target, draft, device="cpu")
    assert pair.draft is not None
    assert pair.target.dtype == pair.draft.dtype == torch.float32  # the draft was stored in bfloat16
    assert pair.tokenizer is None
    double = load_pair(str(target), str(draft), dtype="float64", device="cpu")
    assert double.draft is not None
    assert double.draft.dtype == torch.float64
    assert load_pair(target, None, device="cpu").draft is None


def test_tokenizer_where_there_is_one(folders: tuple[Path, Path]) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    target, _ = folders
    words = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(target)
    tokenizer = load_pair(target, None, device="cpu").tokenizer
    assert tokenizer is not None
    assert tokenizer("b")["input_ids"] == [1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 65}, "draft.vocab_size: expected 64, the target's, received 65"),
        ({"num_target_layers": 7}, "draft.num_target_layers: expected 4, the target's, received 7"),
        (
            {"dflash_config": {"mask_token_id": 64, "target_layer_ids": [1, 3]}},
            "draft.mask_token_id: expected a row of the target's embedding, 0…63, received 64",
        ),
        ({"dflash_config": {"mask_token_id": 63, "target_layer_ids": [1, 4]}}, "0…3, received [1, 4]"),
        ({"head_dim": 8}, "misshapen: layers.0.self_attn.k_norm.weight [6] for [8]"),
    ],
)
def test_mismatches(folders: tuple[Path, Path], changes: dict[str, Any], words: str) -> None:
    target, draft = folders
    edit(draft, **changes)
    with pytest.raises(InputError) as caught:
        load_pair(target, draft, device="cpu")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_hidden_size(folders: tuple[Path, Path], tmp_path: Path) -> None:
    other = make_pair(dtype=torch.float32, hidden_size=16).draft
    assert other is not None
    with pytest.raises(InputError, match=r"draft\.hidden_size: expected 32, the target's, received 16"):
        load_pair(folders[0], save_draft(other, tmp_path / "other"), device="cpu")


def test_swapped_arguments(folders: tuple[Path, Path]) -> None:
    target, draft = folders
    with pytest.raises(InputError, match=r"target: expected a causal LM .*DFlashDraftModel"):
        load_pair(draft, target, device="cpu")
    with pytest.raises(InputError, match=r"draft: expected a DFlash draft .*Qwen3ForCausalLM"):
        load_pair(target, target, device="cpu")


def test_copy_of_the_targets_embedding(folders: tuple[Path, Path]) -> None:
    target, draft = folders
    table = load_file(target / "model.safetensors")["model.embed_tokens.weight"]
    weights = load_file(draft / "model.safetensors")
    save_file(weights | {"embed_tokens.weight": table}, draft / "model.safetensors")
    assert load_pair(target, draft, device="cpu").draft is not None
    save_file(weights | {"embed_tokens.weight": table + 1}, draft / "model.safetensors")
    with pytest.raises(InputError, match="its own embed_tokens"):
        load_pair(target, draft, device="cpu")


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"model": 5}'])
def test_malformed_tokenizer(folders: tuple[Path, Path], text: str) -> None:
    target, _ = folders
    (target / "tokenizer.json").write_text(text)
    with pytest.raises(InputError, match=r"^target: expected a readable tokenizer \(tokenizer\.json") as caught:
        load_tokenizer(target)
    assert "\n" not in str(caught.value)


def test_draft_in_a_dtype_of_its_own(folders: tuple[Path, Path]) -> None:
    pair = load_pair(*folders, dtype="bfloat16", draft_dtype="float32", device="cpu")
    assert pair.draft is not None
    assert (pair.target.dtype, pair.draft.dtype) == (torch.bfloat16, torch.float32)
    expected = r"^draft_dtype: expected torch\.bfloat16, the target's: .* received torch\.float32"
    with pytest.raises(InputError, match=expected):
        speculative_generate(pair, [torch.tensor([1, 2])], max_new_tokens=4)


def test_lab_is_the_bundled_pair() -> None:
    by_name, by_path = load_tokenizer("lab"), load_tokenizer(bundled("lab", "target"))
    assert by_name is not None
    assert by_path is not None
    assert by_name.get_vocab() == by_path.get_vocab()
    assert load_pair("lab", None, device="cpu").target.vocab_size >= len(by_name)
    assert bundled("Qwen/Qwen3-8B", "target") == "Qwen/Qwen3-8B"
