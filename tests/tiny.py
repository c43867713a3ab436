"""Builders of tiny random models for tests: targets of each family, and drafts that fit them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from dgd_lightning.draft.config import DraftConfig, default_layer_ids
from dgd_lightning.draft.model import DFlashDraft
from dgd_lightning.pair import Pair
from dgd_lightning.target.model import Target

_COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # wide enough that greedy choices are not all ties
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_CONFIGS: dict[str, Any] = {
    "qwen3": (Qwen3Config, {}),
    "qwen2": (Qwen2Config, {}),
    "llama": (LlamaConfig, {}),
    "qwen3_moe": (Qwen3MoeConfig, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}),
}


def hf_model(family: str = "qwen3", *, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> Any:
    """A random Hugging Face causal LM."""
    kind, extra = _CONFIGS[family]
    config = kind(**{**_COMMON, **extra, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        for name, weight in model.named_parameters():
            if "norm" in name:  # ones would hide a norm that is skipped or misplaced
                torch.nn.init.uniform_(weight, 0.5, 1.5)
            elif name.endswith("gate.weight"):
                torch.nn.init.normal_(weight)
    return model.to(dtype).eval()


def make_target(family: str = "qwen3", *, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> Target:
    return Target(hf_model(family, dtype=dtype, seed=seed, **changes))


def make_draft(
    target: Target,
    *,
    block_size: int = 4,
    num_layers: int = 2,
    layer_ids: tuple[int, ...] | None = None,
    seed: int = 1,
    **changes: Any,
) -> DFlashDraft:
    """A random draft that fits ``target``, in its dtype."""
    config = DraftConfig(
        **{
            "hidden_size": target.hidden_size,
            "intermediate_size": 40,
            "num_layers": num_layers,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 6,
            "vocab_size": target.vocab_size,
            "block_size": block_size,
            "mask_token_id": target.vocab_size - 1,
            "target_layer_ids": layer_ids or _layer_ids(target.num_layers, num_layers),
            "num_target_layers": target.num_layers,
            "max_positions": target.max_positions,
            **changes,
        }
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        draft = DFlashDraft(config)
        for name, weight in draft.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(weight, 0.5, 1.5)
            else:
                torch.nn.init.normal_(weight, std=0.2)
    return draft.to(target.dtype).eval()


def _layer_ids(target_layers: int, draft_layers: int) -> tuple[int, ...]:
    """The usual ones; of a target that has too few layers for those, every other one from the first."""
    if target_layers > 4:
        return default_layer_ids(target_layers, draft_layers)
    return tuple(range(0, target_layers, max(1, target_layers // draft_layers)))[:draft_layers]


def make_pair(
    family: str = "qwen3",
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    block_size: int = 4,
    layers: int = 4,
    **draft: Any,
) -> Pair:
    """A random target of so many layers and a random draft (keyword arguments of :func:`make_draft`), no tokenizer.

    Four layers unless a test is about more: a tiny model's time goes to its layers, however small they are.
    """
    target = make_target(family, dtype=dtype, seed=seed, num_hidden_layers=layers)
    return Pair(target, make_draft(target, block_size=block_size, seed=seed + 1, **draft), None)
