"""What the benchmarks decode: the bundled pair, one given by path, or a random one of about its size; and prompts."""

from __future__ import annotations

from importlib import resources
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3Config

from dgd_lightning.data.chat import prompt_ids
from dgd_lightning.draft.config import DraftConfig, default_layer_ids
from dgd_lightning.draft.model import DFlashDraft
from dgd_lightning.lab.rows import eval_rows
from dgd_lightning.pair import Pair, load_pair
from dgd_lightning.target.model import Target
from dgd_lightning.types import Task


def bundled_folders() -> tuple[str, str] | None:
    """Folders of the pair inside the package, or None while there is none."""
    assets = resources.files("dgd_lightning.lab") / "assets"
    folders = str(assets / "target"), str(assets / "draft")
    return folders if all((assets / name / "model.safetensors").is_file() for name in ("target", "draft")) else None


def random_pair(dtype: torch.dtype, device: str, *, layers: int = 6, width: int = 128, block_size: int = 8) -> Pair:
    """A random Qwen3 (by default 1.3 M parameters: 6 layers of width 128, 1024 tokens) with a three-layer draft."""
    heads = width // 32
    shape: dict[str, Any] = {"hidden_size": width, "intermediate_size": 3 * width, "head_dim": 32}
    config = Qwen3Config(
        vocab_size=1024,
        **shape,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    target = Target(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(device, dtype))
    draft = DFlashDraft(
        DraftConfig(
            **shape,
            num_layers=3,
            num_heads=heads,
            num_kv_heads=heads // 2,
            vocab_size=1024,
            block_size=block_size,
            mask_token_id=1023,
            target_layer_ids=default_layer_ids(layers, 3),
            num_target_layers=layers,
            max_positions=32768,
        )
    )
    return Pair(target, draft.to(device, dtype).eval(), None)


def chosen_pair(target: str | None, draft: str | None, dtype: str, device: str) -> tuple[Pair, str]:
    """The pair to measure and what to call it."""
    folders = (target, draft) if target else bundled_folders()
    if folders is None:
        return random_pair(getattr(torch, dtype), device), "random 1.3M"
    return load_pair(*folders, dtype=dtype, device=device), target or "bundled"


def lab_prompts(pair: Pair, contexts: int) -> list[Tensor] | None:
    """The lab's long tasks of so many held-out contexts a family; None where the tokenizer has no chat template."""
    if getattr(pair.tokenizer, "chat_template", None) is None:
        return None
    rows = [row for row in eval_rows(contexts) if row["metadata"]["lab"]["long"]]
    tasks = [Task(row["metadata"]["task_id"], row["messages"], None, row) for row in rows]
    return [prompt_ids(pair.tokenizer, task, enable_thinking=False) for task in tasks]


def random_prompts(pair: Pair, count: int, length: int) -> list[Tensor]:
    """``count`` prompts of ``length`` random tokens."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(pair.target.vocab_size, (length,), generator=generator) for _ in range(count)]
