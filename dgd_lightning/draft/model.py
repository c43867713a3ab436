"""The DFlash draft: a small block-diffusion transformer that reads hidden states of the target.

Sources: the DFlash paper and z-lab/dflash (checkpoint layout and arithmetic); Qwen3 for norm, MLP and rotary.
Letters: B rows, S context length, H hidden size, F tapped layers, N anchors, K block size, D head width.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dgd_lightning.draft.attention import (
    KeysValues,
    Mix,
    Wanted,
    attend,
    joined,
    mix_of,
    multi_anchor_mask,
    single_block_mask,
)
from dgd_lightning.draft.config import DraftConfig
from dgd_lightning.target.cache import PositionCache

ContextKeys = Tensor | KeysValues  # what a layer reads of the context: [B, S, H], or its rotated K and V
CONTEXT_PIECE = 2048  # positions whose intermediate values exist at a time under gradient checkpointing


class CosSin(NamedTuple):
    """Cosines and sines of the rotary embedding, [B, 1, S, D] each."""

    cos: Tensor
    sin: Tensor


class RMSNorm(nn.Module):
    """Root-mean-square norm as in Qwen3: fp32 inside for half precision, never below the input's own precision."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Rotary(nn.Module):
    """Rotary angles in fp32 for every model dtype: they depend on the position alone, and drafts were trained so."""

    inv_freq: Tensor  # [D/2], fp32

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        inv_freq, self.scale = _inverse_frequencies(config)
        self._exact = inv_freq
        self.register_buffer("inv_freq", inv_freq.clone(), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.inv_freq = self._exact.to(self.inv_freq.device)  # `.to(bfloat16)` would round the frequencies
        return self

    @torch.no_grad()
    def forward(self, positions: Tensor, dtype: torch.dtype) -> CosSin:
        angles = positions[..., None].to(torch.float32) * self.inv_freq  # [B, S, D/2]
        angles = torch.cat([angles, angles], dim=-1)[:, None]  # [B, 1, S, D]
        return CosSin((angles.cos() * self.scale).to(dtype), (angles.sin() * self.scale).to(dtype))


class Attend(nn.Module):
    """Queries from the block; keys and values from context and block alike."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        inner, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv, bias=config.attention_bias)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=config.attention_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def _heads(self, x: Tensor) -> Tensor:  # [B, S, h·D] -> [B, S, h, D]
        return x.unflatten(-1, (-1, self.head_dim))

    def queries(self, x: Tensor, rotary: CosSin) -> Tensor:  # [B, Q, H] -> [B, heads, Q, D]
        return _rotate(self.q_norm(self._heads(self.q_proj(x))).transpose(1, 2), rotary)

    def keys_values(self, x: Tensor, rotary: CosSin) -> KeysValues:  # [B, S, H] -> 2 × [B, kv heads, S, D]
        keys = _rotate(self.k_norm(self._heads(self.k_proj(x))).transpose(1, 2), rotary)
        values = self._heads(self.v_proj(x)).transpose(1, 2)
        return keys.to(values.dtype), values  # under autocast the norm's fp32 weight widens the keys

    def output(self, mixed: Tensor) -> Tensor:  # [B, heads, Q, D] -> [B, Q, H]
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """The gated feed-forward layer of Qwen3."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.inner(x))

    def inner(self, x: Tensor) -> Tensor:
        return F.silu(self.gate_proj(x)) * self.up_proj(x)


class Layer(nn.Module):
    """One draft layer; the parameter names are those of the checkpoint."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.self_attn = Attend(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def finish(self, hidden: Tensor, mixed: Tensor) -> Tensor:
        """Add what attention gathered ([B, heads, Q, D]) and the MLP to ``hidden`` [B, Q, H]."""
        hidden = hidden + self.self_attn.output(mixed)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))

    def over(
        self, hidden: Tensor, context: ContextKeys, rotary: CosSin, context_rotary: CosSin, mix: Mix, pieces: bool
    ) -> Tensor:
        """The layer over an uncached context: hidden [B, N·K, H], context [B, S, H] or its keys and values.

        With ``pieces`` the context's keys and values are made, and made again in the backward pass, piece by piece.
        """
        make = self.self_attn.keys_values
        if not isinstance(context, Tensor):
            read = context
        elif not pieces or context.shape[1] <= CONTEXT_PIECE:
            read = make(context, context_rotary)
        else:
            cos, sin = context_rotary
            parts = [
                checkpoint(make, context[:, at], CosSin(cos[:, :, at], sin[:, :, at]), use_reentrant=False)
                for at in context_pieces(context.shape[1])
            ]
            read = torch.cat([keys for keys, _ in parts], dim=2), torch.cat([values for _, values in parts], dim=2)
        x = self.input_layernorm(hidden)
        own = make(x, rotary)
        return self.finish(hidden, mix(self.self_attn.queries(x, rotary), read, own))


def context_pieces(length: int) -> list[slice]:
    """Pieces of a long context whose rows are made again in the backward pass, one after the other."""
    return [slice(start, start + CONTEXT_PIECE) for start in range(0, length, CONTEXT_PIECE)]


def over_rows(make: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype) -> Tensor:
    """``make`` of x [B, S, F·H] in a dtype; in another one it is cast piece by piece, so that no copy of it exists."""
    if x.dtype == dtype:
        return make(x)
    return torch.cat([make(x[:, at].to(dtype)) for at in context_pieces(x.shape[1])], dim=1)


class DFlashDraft(nn.Module):
    """The draft network. It has no embedding and no head: both are the target's.

    Slot j of a block anchored at p (slot 0: the given token at p, the rest: mask tokens) predicts position p + j.
    """

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.fc = nn.Linear(config.num_features, config.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = Rotary(config)
        self.gradient_checkpointing = False  # set True to recompute layers in the backward of `multi_anchor`

    @property
    def stack(self) -> Iterable[Layer]:
        return cast(Iterable[Layer], self.layers)

    @property
    def dtype(self) -> torch.dtype:
        return self.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    def new_cache(self, batch: int, capacity: int) -> PositionCache:
        """Room for context keys and values (and, in passing, one block's) at positions 0…capacity−1 of each row."""
        return PositionCache(self.config.num_layers, batch, capacity)

    def context(self, features: Tensor) -> Tensor:
        """What the layers read of the target: features [B, S, F·H], in any dtype -> [B, S, H] in the draft's."""
        return self.hidden_norm(over_rows(self.fc, features, self.dtype))

    @torch.no_grad()
    def extend(self, cache: PositionCache, features: Tensor, positions: Tensor, slots: Tensor | None = None) -> None:
        """Write context keys and values of ``features`` [B, S, F·H] at ``positions`` [B, S], or into ``slots``.

        Features past a row's length may be written too: they lie beyond its next anchor, hidden and overwritten later.
        No gradients (nor in ``block``): a cache that is written in place cannot be differentiated.
        """
        context = self.context(features)
        rotary = self.rotary(positions, context.dtype)
        cache.at(positions, slots=slots)
        for layer, slot in zip(self.stack, cache.buffers, strict=True):
            slot.write(*layer.self_attn.keys_values(context, rotary))

    @torch.no_grad()
    def block(
        self,
        cache: PositionCache,
        embeddings: Tensor,
        anchors: Tensor,
        *,
        longest_anchor: int,
        keep_cache: bool = False,
        slot: int | None = None,
    ) -> Tensor:
        """Hidden states of N blocks per row over the cached context strictly before each anchor.

        With one block per row (the decoding loop) the block's own keys are written into the cache at their positions,
        where no context is yet; the next ``extend`` overwrites them. With more, or with ``keep_cache``, they are
        joined to a view of it, and the cache stays as it is.

        Args:
            cache: what ``extend`` filled.
            embeddings: [B, N·K, H], the target's embedding of ``[anchor token, mask, …]`` for each block.
            anchors: [B, N] absolute positions.
            longest_anchor: host-known, at least the largest anchor. N = 1 needs a capacity of ``longest_anchor + K``.
                Where spare slots are in use (see :meth:`PositionCache.at`): more than each of them, and ``keep_cache``.
            slot: the only slot that is wanted of each block: the last layer then computes no other.

        Returns:
            [B, N·K, H], after the final norm; [B, N, H] with a ``slot``.
        """
        blocks = anchors.shape[1]
        size = embeddings.shape[1] // blocks  # K
        positions, hidden = block_positions(anchors, size), embeddings
        rotary = self.rotary(positions, hidden.dtype)
        in_place = blocks == 1 and not keep_cache
        if in_place:
            cache.at(positions, max_length=longest_anchor + size)
            mask = single_block_mask(anchors, size, cache.max_length)
        else:
            cache.read(longest_anchor)
            mask = multi_anchor_mask(anchors, cache.max_length, size, context_positions=cache.key_positions)
        for number, (layer, kept) in enumerate(zip(self.stack, cache.buffers, strict=True), 1):
            x = layer.input_layernorm(hidden)
            keys, values = layer.self_attn.keys_values(x, rotary)
            if in_place:
                kept.write(keys, values)
                keys, values = kept.view()
            else:
                keys, values = joined(kept.view(), (keys, values))
            if slot is not None and number == self.config.num_layers:  # the block's other slots are only looked at
                hidden, x, mask = hidden[:, slot::size], x[:, slot::size], mask[:, :, slot::size]
                rotary = CosSin(rotary.cos[:, :, slot::size], rotary.sin[:, :, slot::size])
            hidden = layer.finish(hidden, attend(layer.self_attn.queries(x, rotary), keys, values, mask))
        return self.norm(hidden)

    def multi_anchor(
        self,
        features: Tensor,
        embeddings: Tensor,
        anchors: Tensor,
        keep: Tensor | None = None,
        *,
        attention: Wanted = "sdpa",
    ) -> Tensor:
        """Hidden states of N blocks per row in one forward with gradients, no cache: the training forward.

        Args:
            features: [B, S, F·H] at positions 0…S−1 (rows padded on the right).
            embeddings: [B, N·K, H].
            anchors: [B, N] absolute positions, each block reads context strictly before its own.
            keep: [B, N]; rows of a dropped block are finite and meaningless.
            attention: see :func:`~dgd_lightning.draft.attention.mix_of`.

        Returns:
            [B, N·K, H], after the final norm.
        """
        return self.over_context(self.context(features), embeddings, anchors, keep, attention=attention)

    def over_context(
        self,
        context: Tensor | Sequence[KeysValues],
        embeddings: Tensor,
        anchors: Tensor,
        keep: Tensor | None = None,
        *,
        first: int = 0,
        attention: Wanted = "sdpa",
    ) -> Tensor:
        """:meth:`multi_anchor` over what the layers read of the context, so that it can be kept from call to call.

        That is :meth:`context` of the features, [B, S, H], or :meth:`context_keys_values` of it, per layer, from
        position ``first`` on; what lies before it is not seen.
        """
        size, hidden = embeddings.shape[1] // anchors.shape[1], embeddings  # K
        length = context.shape[1] if isinstance(context, Tensor) else context[0][0].shape[2]
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        mix = mix_of(attention, anchors - first, length, size, keep, heads=heads, kv_heads=kv_heads, dtype=hidden.dtype)
        rotary = self.rotary(block_positions(anchors, size), hidden.dtype)
        context_rotary = self._context_rotary(length, first, hidden.dtype)
        again = self.gradient_checkpointing and torch.is_grad_enabled()
        for i, layer in enumerate(self.stack):
            seen = context if isinstance(context, Tensor) else context[i]
            given = (hidden, seen, rotary, context_rotary, mix, again)
            hidden = checkpoint(layer.over, *given, use_reentrant=False) if again else layer.over(*given)
        return self.norm(hidden)

    def context_keys_values(self, context: Tensor, first: int = 0) -> list[KeysValues]:
        """Keys (rotated) and values of :meth:`context` [B, S, H] at positions from ``first`` on, per layer."""
        rotary = self._context_rotary(context.shape[1], first, context.dtype)
        return [layer.self_attn.keys_values(context, rotary) for layer in self.stack]

    def _context_rotary(self, length: int, first: int, dtype: torch.dtype) -> CosSin:
        return self.rotary(torch.arange(first, first + length, device=self.device)[None], dtype)


def block_positions(anchors: Tensor, block_size: int) -> Tensor:
    """Absolute positions of every slot: anchors [B, N] -> [B, N·K]."""
    return (anchors[..., None] + torch.arange(block_size, device=anchors.device)).flatten(1)


def _rotate(x: Tensor, rotary: CosSin) -> Tensor:  # [B, heads, S, D]
    first, second = x.chunk(2, dim=-1)
    return x * rotary.cos + torch.cat([-second, first], dim=-1) * rotary.sin


def _inverse_frequencies(config: DraftConfig) -> tuple[Tensor, float]:
    """([D/2] fp32, factor on cos and sin). Scaled variants are transformers' own, of fixed length dependence."""
    if config.rope_scaling is None:
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        return 1.0 / (config.rope_theta**exponents), 1.0
    from transformers import Qwen3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    shim = Qwen3Config(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_positions,
        rope_parameters={"rope_theta": config.rope_theta, **config.rope_scaling},
    )
    inv_freq, scale = ROPE_INIT_FUNCTIONS[config.rope_scaling["rope_type"]](shim)
    return inv_freq.to(torch.float32), float(scale)
