"""Weights that would be read as what they are not, tokens that would count twice, and rows that nothing uses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import hf_model, make_draft, make_pair, make_target
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dgd_lightning.data.chat import prompt_ids
from dgd_lightning.draft.checkpoint import Adapter, load_draft, save_draft
from dgd_lightning.errors import InputError
from dgd_lightning.modules.new_draft import unused_row
from dgd_lightning.pair import check_pair, load_pair
from dgd_lightning.target.load import load_target
from dgd_lightning.target.model import Target
from dgd_lightning.types import Task


def word_tokenizer(
    size: int, *, added: tuple[str, ...] = ("<s>", "</s>"), begins: bool = False
) -> PreTrainedTokenizerFast:
    """So many words w0, w1, …, and special tokens behind them; with ``begins`` a text gets <s> in front."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in added])
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", size)])
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=template
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target with a tokenizer of 42 ids, of which it has 64 rows, and a draft."""
    folder = tmp_path_factory.mktemp("pair")
    model = hf_model(dtype=torch.float32)
    model.save_pretrained(folder / "target")
    word_tokenizer(40).save_pretrained(folder / "target")
    save_draft(make_draft(Target(model)), folder / "draft")
    return folder / "target", folder / "draft"


def copied(source: Path, to: Path, weights: Callable[[dict[str, Tensor]], None] | None = None, **config: Any) -> Path:
    shutil.copytree(source, to)
    raw = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(raw | config))
    if weights is not None:
        stored = load_file(to / "model.safetensors")
        weights(stored)
        save_file(stored, to / "model.safetensors", {"format": "pt"})
    return to


QUANTISED = [
    ({"quantization_config": {"quant_method": method}}, f"quantised by {method} (quantization_config in config.json)")
    for method in ("gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors", "mxfp4")
] + [
    ({"quantization_config": {"load_in_8bit": True}}, "quantised by an unnamed method"),
    ({"compression_config": {"quant_method": "compressed-tensors"}}, "compression_config in config.json"),
]


@pytest.mark.parametrize(("settings", "words"), QUANTISED)
@pytest.mark.parametrize("part", ["target", "draft"])
def test_quantised_checkpoints_are_refused_by_name(
    settings: dict[str, Any], words: str, part: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = copied(folders[part == "draft"], tmp_path / part, **settings)
    with pytest.raises(InputError) as caught:
        load_target(folder) if part == "target" else load_draft(folder)
    assert str(caught.value).startswith(f"{part}: expected weights in float16, bfloat16, float32, float64, received ")
    assert words in str(caught.value)


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("part", ["target", "draft"])
def test_integer_and_fp8_weights_are_refused(
    kind: torch.dtype, part: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    name = "model.layers.1.mlp.up_proj.weight" if part == "target" else "layers.1.mlp.up_proj.weight"

    def narrow(weights: dict[str, Tensor]) -> None:
        weights[name] = weights[name].to(kind)

    folder = copied(folders[part == "draft"], tmp_path / part, narrow)
    for dtype in ("auto", "float32"):
        with pytest.raises(InputError, match=rf"^{part}: expected weights in .*{name} in [IFU]8.*not supported"):
            load_target(folder, dtype=dtype) if part == "target" else load_draft(folder, dtype=dtype)


@pytest.mark.parametrize(("vocabulary", "fits"), [(42, True), (50, True), (64, True), (99, True), (41, False)])
def test_a_vocabulary_may_differ_by_unused_rows(
    vocabulary: int, fits: bool, folders: tuple[Path, Path], tmp_path: Path
):
    """It is what a draft was trained for: it has the target's embedding and head."""
    draft = copied(folders[1], tmp_path / "draft", vocab_size=vocabulary)
    if fits:
        loaded = load_pair(folders[0], draft).require_draft()
        assert torch.equal(loaded.fc.weight, load_file(draft / "model.safetensors")["fc.weight"])
        return
    with pytest.raises(InputError, match=r"^draft\.vocab_size: expected 64, the target's, received 41"):
        load_pair(folders[0], draft)


def test_without_a_tokenizer_vocabularies_must_agree() -> None:
    target = make_target()
    with pytest.raises(InputError, match=r"^draft\.vocab_size"):
        check_pair(target, make_draft(target, vocab_size=65).config)


@pytest.mark.parametrize(
    ("task", "wanted"),
    [
        (Task("a", None, "w3 w4", {}), [40, 3, 4]),
        (Task("a", None, "<s> w3 w4", {}), [40, 3, 4]),  # once: [40, 40, 3, 4]
        (Task("a", None, "<s><s> w3", {}), [40, 40, 3]),  # as it was written
        (Task("a", [{"role": "user", "content": " w3"}], None, {}), [40, 3]),  # the template's own
    ],
)
def test_a_prompt_begins_once(task: Task, wanted: list[int]) -> None:
    assert prompt_ids(word_tokenizer(40, begins=True), task, enable_thinking=False).tolist() == wanted


RESERVED = ("<s>", "</s>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>")


@pytest.mark.parametrize(
    ("tokenizer", "data", "wanted", "why"),
    [
        (word_tokenizer(40), [], 42, "the first row beyond the tokenizer's 42 ids"),
        (word_tokenizer(60, added=RESERVED), [], 63, "a reserved token that the data does not have"),
        (word_tokenizer(60, added=RESERVED), [(torch.tensor([3, 63]),)], 62, "a reserved token"),
        (word_tokenizer(62), [(torch.tensor([3, 61]), torch.tensor([59]))], 60, "the last id that the training data"),
        (None, [(torch.arange(5, 64),)], 4, "the last id that the training data does not have"),
        (word_tokenizer(62), [(torch.arange(62),)], None, "every id is in the training data"),
        (word_tokenizer(62), [], None, "the training data is not known"),
    ],
)
def test_the_default_mask_token_is_no_token_in_use(
    tokenizer: Any, data: list[tuple[Tensor, ...]], wanted: int | None, why: str
) -> None:
    """Once the last row: an end token, or a word of the answers."""
    target: Any = SimpleNamespace(vocab_size=64, stop_token_ids=(63,))
    if wanted is not None:
        row, said = unused_row(target, tokenizer, data)
        assert row == wanted
        assert why in said
        return
    with pytest.raises(InputError, match=rf"^model\.mask_token_id: expected a row that no token uses.*{why}"):
        unused_row(target, tokenizer, data)


@pytest.mark.parametrize(("ends", "warns"), [([7], True), ([7, 41], False), (41, False), (None, False)])
def test_an_end_token_that_does_not_end_answers_is_warned_of(
    ends: Any, warns: bool, folders: tuple[Path, Path], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    target = copied(folders[0], tmp_path / "target")
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    load_pair(target, None)
    told = [str(one.message) for one in recwarn if "end token" in str(one.message)]
    assert len(told) == warns
    assert all("</s> (41) does not end answers" in one and "7 alone" in one for one in told)


@pytest.mark.parametrize("rank", [-1, 0])
def test_an_adapter_of_no_rank_is_refused(rank: int) -> None:
    pair = make_pair()
    with (
        pytest.raises(InputError, match=rf"^rank: expected an integer of at least 1, received {rank}"),
        pair.adapter(Adapter({}, rank, 1.0, ("fc",), None)),
    ):
        pass
