"""DraftConfig: published spellings, default layers, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from dgd_lightning.draft.config import DraftConfig, default_layer_ids
from dgd_lightning.errors import InputError

MASK_TOKEN = "draft.mask_token_id: expected an integer of at least 0, received"
PUBLISHED: dict[str, Any] = {
    "architectures": ["DFlashDraftModel"],
    "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
    "block_size": 16,
    "dflash_config": {"mask_token_id": 151669, "target_layer_ids": [1, 9, 17, 25, 33]},
    "dtype": "bfloat16",
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "layer_types": ["full_attention"] * 5,
    "max_position_embeddings": 40960,
    "max_window_layers": 5,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 5,
    "num_key_value_heads": 8,
    "num_target_layers": 36,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_published_file() -> None:
    config = DraftConfig.from_dict(PUBLISHED)
    assert (config.block_size, config.mask_token_id, config.num_target_layers) == (16, 151669, 36)
    assert config.target_layer_ids == (1, 9, 17, 25, 33)
    assert (config.rope_theta, config.rope_scaling, config.num_features) == (1e6, None, 5 * 4096)


def test_written_file_reads_back_and_loses_nothing() -> None:
    config = DraftConfig.from_dict(PUBLISHED)
    written = config.to_dict()
    assert DraftConfig.from_dict(written) == config
    for key, value in PUBLISHED.items():
        if key not in ("auto_map", "dtype"):
            assert written[key] == value, key
    assert "auto_map" not in written  # it names code that does not stand beside what we write


def test_transformers_reads_what_is_written() -> None:
    from transformers import Qwen3Config

    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    for raw in (PUBLISHED, PUBLISHED | {"rope_scaling": scaling}):
        read = Qwen3Config.from_dict(DraftConfig.from_dict(raw).to_dict())
        assert read.rope_parameters["rope_theta"] == 1e6
        assert read.rope_parameters["rope_type"] == ("yarn" if raw["rope_scaling"] else "default")
        assert (read.num_target_layers, read.block_size, read.head_dim) == (36, 16, 128)


def test_rope_in_the_spelling_of_5x() -> None:
    raw = {k: v for k, v in PUBLISHED.items() if not k.startswith("rope")}
    default = raw | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}}
    assert DraftConfig.from_dict(default).rope_theta == 5e6
    scaled = raw | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e6}}
    assert DraftConfig.from_dict(scaled).rope_scaling == {"rope_type": "linear", "factor": 2.0}
    older = raw | {"rope_theta": 5e6, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert DraftConfig.from_dict(older) == DraftConfig.from_dict(scaled)


def test_default_layers() -> None:
    assert default_layer_ids(36, 5) == (1, 9, 17, 25, 33)
    assert default_layer_ids(28, 5) == (1, 7, 13, 19, 25)
    assert default_layer_ids(36, 1) == (18,)
    assert default_layer_ids(6, 2) == (1, 3)
    raw = PUBLISHED | {"dflash_config": {"mask_token_id": 5}, "num_target_layers": 28}
    assert DraftConfig.from_dict(raw).target_layer_ids == (1, 7, 13, 19, 25)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_types": ["sliding_attention"] * 4 + ["full_attention"]}, "sliding-window layers are not supported"),
        ({"layer_types": None, "use_sliding_window": True, "sliding_window": 99, "max_window_layers": 2}, "sliding"),
        ({"architectures": ["DominoDraftModel"]}, "DominoDraftModel"),
        ({"architectures": ["DSparkDraftModel"]}, "DSparkDraftModel"),
        ({"architectures": ["DFlashSpeculator"]}, "DFlashSpeculator"),
        ({"architectures": ["Qwen3ForCausalLM"]}, "Qwen3ForCausalLM"),
        ({"dflash_config": PUBLISHED["dflash_config"] | {"projector_type": "domino"}}, "domino"),
        ({"dflash_config": PUBLISHED["dflash_config"] | {"shift_label": True}}, "shift_label = True"),
        ({"dflash_config": PUBLISHED["dflash_config"] | {"markov_rank": 256}}, "markov_rank = 256"),
        ({"speculators_model_type": "dflash"}, "speculators export"),
        ({"draft_vocab_size": 32000}, "draft_vocab_size = 32000"),
        ({"dflash_config": {"target_layer_ids": [1]}}, "'mask_token_id'"),
        ({"num_target_layers": None}, "'num_target_layers'"),
        ({"num_target_layers": 20}, "0…19"),
        ({"block_size": 1}, "block_size"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"num_key_value_heads": 5}, "multiple of num_key_value_heads"),
        ({"output_multiplier": 0.5}, "draft.output_multiplier: expected none, or 1"),
        ({"final_logit_softcapping": 30.0}, "draft.final_logit_softcapping: expected none, or 0"),
        ({"input_embedding_scale": 64.0}, "draft.input_embedding_scale: expected none, or 1"),
        (
            {"dflash_config": PUBLISHED["dflash_config"] | {"final_logit_softcapping": 30.0}},
            "draft.dflash_config.final_logit_softcapping",
        ),
        (
            {"dflash_config": PUBLISHED["dflash_config"] | {"block_size": 8}},
            "draft.block_size: expected one block_size, received 16 at the top level, 8 in dflash_config",
        ),
        # values of another type
        ({"dflash_config": [1]}, "draft.dflash_config: expected an object, received [1]"),
        ({"architectures": "DFlashDraftModel"}, "draft.architectures: expected a list"),
        ({"rms_norm_eps": None}, "draft.rms_norm_eps: expected a number above 0, received None"),
        ({"num_target_layers": "6"}, "draft.num_target_layers: expected an integer of at least 1, received '6'"),
        ({"num_attention_heads": 0}, "draft.num_attention_heads: expected an integer of at least 1, received 0"),
        ({"head_dim": "128"}, "draft.head_dim: expected an integer, received '128'"),
        ({"attention_bias": "no"}, "draft.attention_bias: expected true or false, received 'no'"),
        ({"max_position_embeddings": "x"}, "draft.max_position_embeddings: expected an integer, received 'x'"),
        ({"layer_types": 5}, "draft.layer_types: expected a list, received 5"),
        ({"rope_theta": "x"}, "draft.rope_theta: expected a number above 0, received 'x'"),
        ({"rope_scaling": "x"}, "draft.rope_scaling: expected an object, received 'x'"),
        ({"rope_parameters": {"rope_theta": [1]}}, "draft.rope_parameters.rope_theta"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}},
            "draft.rope_scaling.low_freq_factor: expected a number above 0, received None",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": "x"}},
            "draft.rope_scaling.beta_fast: expected a number, received 'x'",
        ),
        (
            {"dflash_config": {"mask_token_id": True}},
            f"{MASK_TOKEN} True",
        ),
        (
            {"dflash_config": {"mask_token_id": "63"}},
            f"{MASK_TOKEN} '63'",
        ),
        (
            {"dflash_config": {"mask_token_id": -1}},
            f"{MASK_TOKEN} -1",
        ),
        ({"dflash_config": {"mask_token_id": 5, "target_layer_ids": [1.7]}}, "draft.target_layer_ids"),
        ({"dflash_config": {"mask_token_id": 5, "target_layer_ids": 1}}, "draft.target_layer_ids: expected a list"),
    ],
)
def test_refusals(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match="Hint: ") as caught:
        DraftConfig.from_dict(PUBLISHED | changes)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_scales_that_do_nothing_are_none() -> None:
    neutral = {"output_multiplier": 1.0, "final_logit_softcapping": 0, "input_embedding_scale": 1}
    nothing = dict.fromkeys(neutral)
    for scales in (neutral, nothing):
        for raw in (PUBLISHED | scales, PUBLISHED | {"dflash_config": PUBLISHED["dflash_config"] | scales}):
            assert DraftConfig.from_dict(raw) == DraftConfig.from_dict(PUBLISHED)


def test_dflash_config_is_asked_first() -> None:
    outer = PUBLISHED | {"mask_token_id": 7, "target_layer_ids": [2, 3]}
    config = DraftConfig.from_dict(outer)
    assert (config.mask_token_id, config.target_layer_ids) == (151669, (1, 9, 17, 25, 33))
    written = config.to_dict()
    assert (written["mask_token_id"], written["target_layer_ids"]) == (151669, [1, 9, 17, 25, 33])
    assert DraftConfig.from_dict(written) == config
    alone = DraftConfig.from_dict(outer | {"dflash_config": {}})
    assert (alone.mask_token_id, alone.target_layer_ids) == (7, (2, 3))
    assert DraftConfig.from_dict(alone.to_dict()) == alone
    assert "target_layer_ids" not in DraftConfig.from_dict(PUBLISHED).to_dict()
    inner = {k: v for k, v in PUBLISHED.items() if k != "block_size"}
    settings = PUBLISHED["dflash_config"] | {"block_size": 16}
    for raw in (inner | {"dflash_config": settings}, PUBLISHED | {"dflash_config": settings}):
        assert DraftConfig.from_dict(raw).block_size == 16
