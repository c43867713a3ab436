"""The frozen target: prefill in chunks and step, keeping tapped features and the logits that are asked for, no more."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from types import MethodType
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dgd_lightning.checks import check_choice, check_integer
from dgd_lightning.errors import LEAVE_OUT, InputError
from dgd_lightning.target.cache import PositionCache
from dgd_lightning.target.folder import HINT, is_integer
from dgd_lightning.types import Prefill, TargetStep

ATTENTION = ("sdpa", "eager")  # implementations that take an explicit mask of key positions
FOLDED_SDPA = "dgd_sdpa"  # the registered name of `folded_sdpa`; users know it as sdpa
FOLD_ROWS = 256  # up to here g·Q rows of the mask cost less than g copies of the keys and values


def check_attention(name: str) -> str:
    """An implementation that takes a mask: the rows of a batch are at different positions."""
    return check_choice("attn_implementation", name, ATTENTION, hint=LEAVE_OUT)


class Target(nn.Module):
    """A frozen Hugging Face causal LM read at absolute positions, with features of intermediate layers.

    Features of layer id i are transformers' ``hidden_states[i + 1]``: the layer's output, and after the final norm for
    the last layer. In float64 the norms and the expert router keep float64 (transformers narrows them to fp32).
    A model that runs ``sdpa`` is set to a variant that copies no keys for short queries (`folded_sdpa`).

    Args:
        model: a loaded causal LM of a supported family (:func:`dgd_lightning.target.load.load_target`).

    Raises:
        InputError: the model runs an attention implementation that takes no explicit mask, or its generation config
            names end-of-sequence tokens that are no ids.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        config = model.config
        if config._attn_implementation != FOLDED_SDPA and check_attention(config._attn_implementation) == "sdpa":
            model.set_attn_implementation(FOLDED_SDPA)
        self.model = model.eval().requires_grad_(False)
        self.vocab_size: int = config.vocab_size
        self.hidden_size: int = config.hidden_size
        self.num_layers: int = config.num_hidden_layers
        self.max_positions: int = config.max_position_embeddings
        self.stop_token_ids = _stop_tokens(model)
        self._layers: list[nn.Module] = list(model.get_decoder().layers)[: self.num_layers]
        known = inspect.signature(model.get_decoder().forward).parameters
        self._cache_name = "cache" if "cache" in known else "past_key_values"  # renamed in transformers 5.24
        if self.dtype == torch.float64:
            _keep_float64(model)

    @property
    def embedding(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where ids go in and features come out (the embedding's device under a ``device_map``)."""
        return self.embedding.weight.device

    def train(self, mode: bool = True) -> Self:
        """Frozen: stays in eval mode, also inside a module that is being trained."""
        return super().train(False)

    def new_cache(self, batch: int, capacity: int) -> PositionCache:
        """A cache for ``batch`` rows of up to ``capacity`` positions each (prompt + new tokens + one block)."""
        return PositionCache(self.num_layers, batch, capacity)

    def embed(self, ids: Tensor) -> Tensor:
        """ids [..] -> [.., H]."""
        return self.embedding(ids)

    def lm_head(self, hidden: Tensor) -> Tensor:
        """Hidden states after a final norm [.., H] -> logits [.., V]; differentiable in ``hidden``."""
        return _where_it_is(self.model.get_output_embeddings(), hidden)

    def final_norm(self, states: Tensor) -> Tensor:
        """The norm before the head: states of an intermediate layer [.., H] -> [.., H]."""
        return _where_it_is(self.model.get_decoder().norm, states)

    @torch.no_grad()
    def step(
        self,
        ids: Tensor,
        positions: Tensor,
        cache: PositionCache,
        *,
        max_length: int,
        layer_ids: Sequence[int] = (),
        slots: Tensor | None = None,
    ) -> TargetStep:
        """One forward on Q tokens per row, each at its own position; keys and values are written there.

        Nothing here waits for the device (mixture-of-experts kernels of transformers may).

        Args:
            ids: [B, Q].
            positions: [B, Q], absolute, distinct within a row; everything below a row's smallest one is in the cache.
            cache: from :meth:`new_cache`.
            max_length: host-known bound, more than every slot: keys 0…max_length−1 are read.
            layer_ids: tapped layers, 0-based.
            slots: [B, Q], where they are written instead (see :meth:`PositionCache.at`); rotary embedding and mask go
                by the positions all the same.

        Returns:
            Logits [B, Q, V] and features [B, Q, F·H], on the target's device wherever the last layer is.
        """
        hidden, features = self._forward(ids, positions, cache, max_length, layer_ids, slots=slots)
        return TargetStep(self.lm_head(hidden).to(self.device), features)

    @torch.no_grad()
    def prefill(
        self,
        ids: Tensor,
        lengths: Tensor | Sequence[int],
        cache: PositionCache,
        *,
        start: int | Sequence[int] = 0,
        layer_ids: Sequence[int] = (),
        chunk_size: int = 1024,
        on_features: Callable[[Tensor, Tensor], None] | None = None,
        keep_features: bool = False,
    ) -> Prefill:
        """Read prompts in chunks, so that memory holds one chunk's activations and mask at a time.

        Padding writes keys past its row's length, where they are hidden and later overwritten.

        Args:
            ids: [B, S], rows padded on the right (with any valid id).
            lengths: [B], 1…S.
            cache: at least ``start`` + S positions.
            start: position of the first token, of all rows or of each; what comes before it is in the cache. Where
                rows differ, padding that reaches past the cache is written at its last position.
            layer_ids: tapped layers, 0-based.
            chunk_size: tokens per forward.
            on_features: called per chunk with features [B, C, F·H] and positions [B, C]; padding is included.
            keep_features: also return all features [B, S, F·H].
        """
        batch, length = ids.shape
        lengths = torch.as_tensor(lengths, dtype=torch.long).to(ids.device)  # [B]
        alike = isinstance(start, int)
        starts = torch.as_tensor(start, device=ids.device).expand(batch)  # [B]
        furthest = start if isinstance(start, int) else max(start)
        last = ids.new_zeros((batch, 1, self.hidden_size), dtype=self.dtype)
        kept: Tensor | None = None
        for low in range(0, length, chunk_size):
            high = min(low + chunk_size, length)
            positions = starts[:, None] + torch.arange(low, high, device=ids.device)  # [B, C]
            max_length = furthest + high
            if not alike:
                positions, max_length = positions.clamp(max=cache.capacity - 1), min(max_length, cache.capacity)
            hidden, features = self._forward(ids[:, low:high], positions, cache, max_length, layer_ids, alike=alike)
            at = lengths - 1 - low  # [B]
            index = at.clamp(0, high - low - 1).to(hidden.device)[:, None, None]  # [B, 1, 1]
            here = hidden.gather(1, index.expand(-1, 1, hidden.shape[-1])).to(last.device)
            last = torch.where(((at >= 0) & (at < high - low))[:, None, None], here, last)
            if features is not None and on_features is not None:
                on_features(features, positions)
            if features is not None and keep_features:
                kept = features.new_empty(batch, length, features.shape[-1]) if kept is None else kept
                kept[:, low:high] = features
        return Prefill(self.lm_head(last)[:, 0], kept, starts + lengths)

    @torch.no_grad()
    def features(self, ids: Tensor, layer_ids: Sequence[int]) -> Tensor:
        """Features [B, S, F·H] of whole sequences [B, S], padded on the right, and nothing else.

        Nothing is cached, and no layer behind the deepest tapped one runs.
        """
        final = self.num_layers - 1
        with self._tapped(layer_ids, None if final in layer_ids else max(layer_ids)) as taps:
            # the last layer's come after the final norm
            taps[final] = self.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        return torch.cat([taps[i].to(self.device) for i in layer_ids], dim=-1)

    def _forward(
        self,
        ids: Tensor,
        positions: Tensor,
        cache: PositionCache,
        max_length: int,
        layer_ids: Sequence[int],
        *,
        slots: Tensor | None = None,
        alike: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(last hidden states [B, Q, H], features [B, Q, F·H] or None); ``alike``: all rows have the same positions."""
        cache.at(positions, slots=slots, max_length=max_length)
        masks = self._masks(positions[:1] if alike else positions, max_length, cache.key_positions)
        arguments = {"attention_mask": masks, "position_ids": positions, self._cache_name: cache}
        with self._tapped(layer_ids) as taps:
            hidden = self.model.get_decoder()(input_ids=ids, use_cache=True, **arguments).last_hidden_state  # [B, Q, H]
        if not layer_ids:
            return hidden, None
        taps[self.num_layers - 1] = hidden  # transformers' last hidden state comes after the final norm
        return hidden, torch.cat([taps[i].to(self.device) for i in layer_ids], dim=-1)

    @contextmanager
    def _tapped(self, layer_ids: Sequence[int], last: int | None = None) -> Iterator[dict[int, Tensor]]:
        """What these layers of the forwards inside give; layer ``last`` ends the forward, and the block."""
        taps: dict[int, Tensor] = {}

        def keep(i: int, module: nn.Module, inputs: Any, output: Any) -> None:
            taps[i] = output[0] if isinstance(output, tuple) else output
            if i == last:
                raise _Enough

        for i in layer_ids:
            check_integer("layer_ids", i, least=0, most=self.num_layers - 1, hint="use a draft made for this target")
        handles = [self._layers[i].register_forward_hook(partial(keep, i)) for i in set(layer_ids)]
        try:
            with suppress(_Enough):
                yield taps
        finally:
            for handle in handles:
                handle.remove()

    def _masks(self, positions: Tensor, max_length: int, key_positions: Tensor | None) -> Tensor | dict[str, Tensor]:
        """The attention mask that the family's decoder takes: one, or one per kind of layer."""
        config = self.model.config
        window = getattr(config, "sliding_window", None)

        def mask(window: int | None) -> Tensor:
            """Additive, in the model's dtype: made once here, where a boolean one is widened again in every layer."""
            allowed = position_mask(positions, max_length, window, key_positions)
            return torch.zeros_like(allowed, dtype=self.dtype).masked_fill_(~allowed, torch.finfo(self.dtype).min)

        if config.model_type == "qwen3_moe":  # one window for every layer; its config lists no kinds of layers
            return mask(window)
        if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
            return {"full_attention": mask(None), "sliding_attention": mask(window)}
        return mask(None)


class _Enough(Exception):
    """Ends a forward of the target where no later layer is wanted."""


def position_mask(
    positions: Tensor, key_length: int, window: int | None = None, key_positions: Tensor | None = None
) -> Tensor:
    """Which of L cached positions [B, L] (None: 0…L−1) the queries' [B, Q] see, [B, 1, Q, L] boolean.

    ``key ≤ query``, and in sliding layers ``key > query − window``.
    """
    keys = torch.arange(key_length, device=positions.device) if key_positions is None else key_positions[:, None, None]
    queries = positions[:, None, :, None]  # [B, 1, Q, 1]
    allowed = keys <= queries
    return allowed if window is None else allowed & (keys > queries - window)


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


AttentionInterface.register(FOLDED_SDPA, folded_sdpa)
AttentionMaskInterface.register(FOLDED_SDPA, sdpa_mask)  # a name without masks would get none, not even causal ones


def _where_it_is(module: Any, states: Tensor) -> Tensor:
    """A module's output, on the states' device; its weight may be on another one."""
    if not hasattr(module, "_hf_hook"):  # accelerate's hook moves what it needs
        return module(states.to(module.weight.device)).to(states.device)
    return module(states).to(states.device)


def _stop_tokens(model: Any) -> tuple[int, ...]:
    """End-of-sequence ids of the generation config alone, as in transformers' ``generate``.

    The model config may hold an id by default (LlamaConfig: 2) that no file has named.
    """
    ids = getattr(model.generation_config, "eos_token_id", None)
    ids = [] if ids is None else ids if isinstance(ids, list | tuple) else [ids]
    if not all(is_integer(i) for i in ids):
        raise InputError(
            "target.generation_config.eos_token_id", expected="a token id or a list of them", received=ids, hint=HINT
        )
    return tuple(ids)


def _keep_float64(model: Any) -> None:
    """Let norms and routers of a float64 model compute in float64, so that rounding does not hide an error."""

    def norm(self: Any, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    def route(self: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(x.reshape(-1, self.hidden_dim), self.weight)  # [B·Q, experts]
        weights, experts = logits.softmax(-1).topk(self.top_k, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights, experts

    if hasattr(model, "set_experts_implementation") and model.config.model_type == "qwen3_moe":
        model.set_experts_implementation("eager")  # the grouped kernel takes no float64
    for module in model.modules():
        name = type(module).__name__
        if name.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.forward = MethodType(norm, module)
        elif name == "Qwen3MoeTopKRouter":
            module.forward = MethodType(route, module)
