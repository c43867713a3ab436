"""transformers' SDPA attention, but for short queries over many keys: their groups are folded, no key is copied."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

FOLDED_SDPA = "dgd_sdpa"  # the registered name; users know it as sdpa
FOLD_ROWS = 256  # up to here g·Q rows of the mask cost less than g copies of the keys and values


def folded_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Grouped-query attention in transformers' calling convention; the g heads of a key head become g·Q queries.

    With a mask [B or 1, 1, Q, L], transformers repeats every key head g times for Q > 1: a verification over a long
    context would copy the whole cache in every layer. Queries [B, heads, Q, D] give ([B, Q, heads, D], no weights).
    """
    batch, heads, length, width = query.shape
    groups = heads // key.shape[1]
    if attention_mask is None or attention_mask.shape[1] != 1 or not 1 < groups <= FOLD_ROWS // length:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    folded = query.reshape(batch, -1, groups * length, width)  # [B, kv heads, g·Q, D]
    mask = attention_mask.repeat(1, 1, groups, 1) if length > 1 else attention_mask  # one row serves all
    mixed = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)
    mixed = mixed.reshape(batch, heads, length, value.shape[-1])
    return mixed.transpose(1, 2).contiguous(), None


def fold_groups(model: Any) -> None:
    """Let a model that runs transformers' ``sdpa`` run :func:`folded_sdpa`; any other implementation stays."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(FOLDED_SDPA)


AttentionInterface.register(FOLDED_SDPA, folded_sdpa)
AttentionMaskInterface.register(FOLDED_SDPA, sdpa_mask)  # a name without masks would get none, not even causal ones
