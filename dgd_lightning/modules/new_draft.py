"""A new draft for a target: its configuration, its first weights, and a row for its mask token."""

import re
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dgd_lightning.distributions import wide
from dgd_lightning.draft.config import DraftConfig, default_layer_ids
from dgd_lightning.draft.model import DFlashDraft
from dgd_lightning.errors import LEAVE_OUT, InputError
from dgd_lightning.pair import token_count
from dgd_lightning.target.model import Target

Start = Literal["random", "target"]
RESERVED = re.compile(r"reserved|unused", re.I)  # in a token's name: Llama's and Gemma's have no other use


@torch.no_grad()
def new_draft(target: Target, config: DraftConfig, start: Start, seed: int) -> DFlashDraft:
    """A draft in fp32 on the target's device, with Qwen3's random weights or, as far as they fit, the target's.

    From the ``target`` come its last layers, its final norm, and a projection of the context that hands on the deepest
    tapped layer behind the norm that such states are read by. Of a random draft the first loss is about ln V: see
    :func:`_forget` and :func:`_first_scale`.
    """
    draft = DFlashDraft(config)
    generator = torch.Generator().manual_seed(seed)
    for module in draft.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    draft.to(target.device)
    if start == "target":
        decoder = target.model.get_decoder()
        last = list(decoder.layers)[target.num_layers - config.num_layers : target.num_layers]
        for ours, theirs in zip(list(draft.layers)[-len(last) :], last, strict=True):
            own, found = ours.state_dict(), theirs.state_dict()
            fitting = {name: x for name, x in found.items() if name in own and own[name].shape == x.shape}
            ours.load_state_dict(fitting, strict=False)
        deepest = config.target_layer_ids.index(max(config.target_layer_ids))
        nn.init.zeros_(draft.fc.weight)
        nn.init.eye_(draft.fc.weight.unflatten(1, (-1, config.hidden_size))[:, deepest])
        draft.hidden_norm.weight.copy_(last[0].input_layernorm.weight)
        draft.norm.weight.copy_(decoder.norm.weight)
    else:
        mask = torch.tensor(config.mask_token_id, device=target.device)
        _forget(draft, target.embed(mask).to(torch.float32))
    draft.norm.weight.mul_(_first_scale(target, draft.norm.weight))
    return draft


def _forget(draft: DFlashDraft, mask: Tensor) -> None:
    """Let the first layer's MLP take the mask token's own embedding [H] away again.

    The head would see little else, and be sure of that token: a first loss of 46 for SmolLM2 where ln V is 10.8. The
    MLP's output is less the embedding where its input is the mask token alone: nearly so, while attention gives little.
    """
    for layer in draft.stack:
        layer.self_attn.o_proj.weight.mul_(0.25)
    first = next(iter(draft.stack))
    inner = first.mlp.inner(first.post_attention_layernorm(mask))
    first.mlp.down_proj.weight.sub_(torch.outer(mask, inner) / inner.square().sum().clamp_min(1e-12))


def _first_scale(target: Target, norm: Tensor) -> float:
    """Factor on the last norm's weights [H], at most 1, by which logits of a random state deviate by 1 at most.

    Not less: a norm of a tenth makes logits that stay small for hundreds of steps.
    """
    spread = wide(target.model.get_output_embeddings().weight.var(0)).to(norm.device)  # [H]
    return min(1.0, float((spread * norm.square()).sum().rsqrt()))


def unused_row(target: Target, tokenizer: Any | None, data: Iterable[Iterable[Tensor]]) -> tuple[int, str]:
    """A row of the target's embedding that is no token in use, for the mask token, and why it is none.

    The published Qwen3 drafts have 151669, the first of the rows that pad the embedding.

    Args:
        data: conversations, each some tensors of ids; empty where they are not known.
    """
    tokens = token_count(tokenizer)
    if tokens is not None and tokens < target.vocab_size:
        return tokens, f"the first row beyond the tokenizer's {tokens:,} ids"
    free = torch.ones(target.vocab_size, dtype=torch.bool)
    known = False
    for ids in (part for conversation in data for part in conversation):
        free[ids], known = False, True
    names = {} if tokenizer is None else tokenizer.get_added_vocab()
    reserved = [id for name, id in names.items() if RESERVED.search(name) and free[id]]
    if reserved:
        return max(reserved), "a reserved token that the data does not have"
    free[[*names.values(), *target.stop_token_ids]] = False  # what templates write, and answers end with
    if not known or not free.any():
        raise InputError(
            "model.mask_token_id",
            expected="a row that no token uses",
            received="none: the tokenizer has no reserved token, and "
            + ("every id is in the training data" if known else "the training data is not known"),
            hint="name an id that neither prompts nor answers have",
        )
    return int(free.nonzero()[-1]), "the last id that the training data does not have"


def new_draft_config(
    target: Target, num_layers: int, block_size: int, target_layer_ids: list[int] | None, mask: int
) -> DraftConfig:
    """A draft's configuration with the target's own widths, as the published drafts have."""
    config: Any = target.model.config
    if not 0 <= mask < target.vocab_size:
        raise InputError(
            "model.mask_token_id",
            expected=f"a row of the target's embedding, 0…{target.vocab_size - 1}",
            received=mask,
            hint=f"choose an id that the tokenizer does not use, or {LEAVE_OUT}",
        )
    layers = default_layer_ids(target.num_layers, num_layers) if target_layer_ids is None else target_layer_ids
    if not layers or any(layer not in range(target.num_layers) for layer in layers):
        raise InputError(
            "model.target_layer_ids",
            expected=f"layers of the target, 0…{target.num_layers - 1}",
            received=list(layers),
            hint=f"name layers that it has, or {LEAVE_OUT}",
        )
    heads = config.num_attention_heads
    rope = config.rope_parameters or {}
    return DraftConfig(
        hidden_size=target.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=config.num_key_value_heads or heads,
        head_dim=getattr(config, "head_dim", None) or target.hidden_size // heads,
        vocab_size=target.vocab_size,
        block_size=block_size,
        mask_token_id=mask,
        target_layer_ids=tuple(layers),
        num_target_layers=target.num_layers,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=float(rope.get("rope_theta", 10000.0)),
        max_positions=target.max_positions,
    )
