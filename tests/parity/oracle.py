"""DFlash again, written straight from the paper's equations with einsum: one row, one block, no masks, no cache."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dgd_lightning.draft.config import DraftConfig


def naive_block(
    config: DraftConfig, weights: Mapping[str, Tensor], features: Tensor, block: Tensor, anchor: int
) -> Tensor:
    """Features [S, F·H] of positions before ``anchor`` (S = anchor), block embeddings [K, H] -> hidden [K, H].

    Everything visible is given and everything given is visible, so there is nothing to mask.
    """
    assert features.shape[0] == anchor

    def norm(x: Tensor, name: str) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + config.rms_norm_eps) * weights[name]

    def project(x: Tensor, name: str, heads: int) -> Tensor:
        matrix = weights[name].reshape(heads, config.head_dim, -1)
        return torch.einsum("sh,ndh->snd", x, matrix)

    def turn(x: Tensor, positions: Tensor) -> Tensor:  # rotate pairs (i, i + D/2) as complex numbers
        half = config.head_dim // 2
        # angles, cosines and sines in fp32 whatever the model's dtype: what published drafts were trained with
        rates = 1.0 / config.rope_theta ** (torch.arange(half) * 2 / config.head_dim)
        angles = positions[:, None].float() * rates
        wheel = torch.complex(angles.cos().double(), angles.sin().double())[:, None]
        spun = torch.complex(x[..., :half].double(), x[..., half:].double()) * wheel
        return torch.cat([spun.real, spun.imag], dim=-1).to(x.dtype)

    context = norm(torch.einsum("sf,hf->sh", features, weights["fc.weight"]), "hidden_norm.weight")
    positions = torch.arange(anchor + block.shape[0])
    hidden = block
    for index in range(config.num_layers):
        name = f"layers.{index}."
        x = norm(hidden, name + "input_layernorm.weight")
        seen = torch.cat([context, x])  # [S + K, H]
        keys = project(seen, name + "self_attn.k_proj.weight", config.num_kv_heads)
        values = project(seen, name + "self_attn.v_proj.weight", config.num_kv_heads)
        queries = project(x, name + "self_attn.q_proj.weight", config.num_heads)
        keys = turn(norm(keys, name + "self_attn.k_norm.weight"), positions)
        queries = turn(norm(queries, name + "self_attn.q_norm.weight"), positions[anchor:])
        mixed = []
        for head in range(config.num_heads):
            shared = head * config.num_kv_heads // config.num_heads
            scores = torch.einsum("qd,kd->qk", queries[:, head], keys[:, shared]) / math.sqrt(config.head_dim)
            shares = torch.exp(scores - scores.amax(-1, keepdim=True))
            shares = shares / shares.sum(-1, keepdim=True)
            mixed.append(torch.einsum("qk,kd->qd", shares, values[:, shared]))
        hidden = hidden + torch.cat(mixed, dim=-1) @ weights[name + "self_attn.o_proj.weight"].T
        x = norm(hidden, name + "post_attention_layernorm.weight")
        gate, up = x @ weights[name + "mlp.gate_proj.weight"].T, x @ weights[name + "mlp.up_proj.weight"].T
        hidden = hidden + (gate * torch.sigmoid(gate) * up) @ weights[name + "mlp.down_proj.weight"].T
    return norm(hidden, "norm.weight")


def naive_loss(
    logits: Tensor, input_ids: Tensor, loss_mask: Tensor, anchors: Tensor, keep: Tensor, gamma: float
) -> tuple[Tensor, float]:
    """The weighted loss slot by slot in Python: logits [B, N, K, V] -> (loss, accuracy)."""
    batch, blocks, size, _ = logits.shape
    total, weight_sum, right, count = logits.new_zeros(()), 0.0, 0, 0
    for b in range(batch):
        for n in range(blocks):
            for k in range(1, size):
                place = int(anchors[b, n]) + k
                if not keep[b, n] or place >= input_ids.shape[1] or loss_mask[b, place] == 0:
                    continue
                label = int(input_ids[b, place])
                weight = math.exp(-(k - 1) / gamma)
                total = total - weight * torch.log_softmax(logits[b, n, k], -1)[label]
                weight_sum += weight
                right += int(logits[b, n, k].argmax() == label)
                count += 1
    return total / weight_sum, right / count


def naive_anchors(loss_mask: Tensor, num_anchors: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The anchors of every row in ``num_anchors`` places, however few it has: (anchors, keep), [B, N] each."""
    batch, length = loss_mask.shape
    noise = torch.rand(batch, length - 1, generator=generator).tolist()
    anchors, keep = torch.zeros(2, batch, num_anchors, dtype=torch.long)
    for row in range(batch):
        valid = [p for p in range(1, length - 1) if loss_mask[row, p] > 0 and loss_mask[row, p + 1] > 0]
        chosen = sorted(sorted(valid, key=noise[row].__getitem__)[:num_anchors])
        anchors[row, : len(chosen)] = torch.tensor(chosen, dtype=torch.long)
        keep[row, : len(chosen)] = 1
    return anchors, keep.bool()
