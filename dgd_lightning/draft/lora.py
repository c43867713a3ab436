"""LoRA layers inside a draft: put in, reset in place, taken out again, bit for bit.

The arithmetic is PEFT's (``base(x) + alpha / r · B(A(x))``), in layers of our own: PEFT widens a layer's whole input to
the adapter's fp32 and keeps that copy for the backward pass, which for half-precision drafts doubles an adaptation's
memory.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dgd_lightning.checks import check_integer
from dgd_lightning.draft.checkpoint import Adapter
from dgd_lightning.draft.model import DFlashDraft, context_pieces
from dgd_lightning.errors import InputError

SAMPLE = 64  # elements of every weight, by which base drafts are distinguished


class _LowRankUpdate(torch.autograd.Function):
    """``base + scaling · B(A(x))``, whose factors' gradients are made lengthwise.

    Autograd makes B's as [out, T] · [T, r], which CPU libraries take three times as long for as for [r, T] · [T, out].
    Inputs narrower than the factors are widened piece by piece, forward and backward.
    """

    @staticmethod
    def forward(ctx: Any, base: Tensor, x: Tensor, first: Tensor, second: Tensor, scaling: float) -> Tensor:
        rows, products, lows, sums = x.flatten(0, -2), base.flatten(0, -2), [], []
        for at in _pieces(rows, first):
            lows.append(F.linear(rows[at].to(first.dtype), first))  # [C, r]
            sums.append((products[at] + F.linear(lows[-1], second) * scaling).to(base.dtype))  # [C, out]
        ctx.save_for_backward(x, torch.cat(lows), first, second)
        ctx.scaling = scaling
        return (sums[0] if len(sums) == 1 else torch.cat(sums)).view_as(base)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slopes: Tensor) -> Any:
        x, low, first, second = ctx.saved_tensors
        rows, given, kind = x.flatten(0, -2), slopes.flatten(0, -2), low.dtype  # under autocast narrower than the rest
        of_rows = torch.empty_like(rows) if ctx.needs_input_grad[1] else None
        of_first, of_second = torch.zeros_like(first), torch.zeros_like(second)
        for at in _pieces(rows, first):
            some = given[at].to(kind) * ctx.scaling  # [C, out]
            of_low = some @ second.to(kind)  # [C, r]
            of_second += (low[at].t() @ some).t()
            of_first += of_low.t() @ rows[at].to(kind)
            if of_rows is not None:
                of_rows[at] = of_low @ first.to(kind)
        return slopes, None if of_rows is None else of_rows.view_as(x), of_first, of_second, None


def _pieces(rows: Tensor, factor: Tensor) -> list[slice]:
    """Of rows that have to be widened; else all at once."""
    return [slice(None)] if rows.dtype == factor.dtype else context_pieces(len(rows))


class LoraLinear(nn.Module):
    """A linear layer with a low-rank update, times alpha / r. The second factor is zero, the first one not set."""

    def __init__(self, base_layer: nn.Linear, rank: int, scaling: float) -> None:
        super().__init__()
        weight = base_layer.weight
        wide = torch.promote_types(weight.dtype, torch.float32)  # fp32 for half-precision drafts
        self.base_layer, self.scaling = base_layer, scaling
        self.lora_A = nn.Parameter(torch.empty(rank, weight.shape[1], dtype=wide, device=weight.device))
        self.lora_B = nn.Parameter(torch.zeros(weight.shape[0], rank, dtype=wide, device=weight.device))

    def forward(self, x: Tensor) -> Tensor:
        """[.., in] -> [.., out]."""
        return self.updated(self.base_layer(x), x)

    def updated(self, product: Tensor, x: Tensor) -> Tensor:
        """The base layer's ``product`` [.., out] of x [.., in] with the update, in the product's dtype."""
        return _LowRankUpdate.apply(product, x, self.lora_A, self.lora_B, self.scaling)


class DraftLora:
    """LoRA layers inside a draft, for as long as this object is not removed.

    The second factor starts at zero, so that every logit is the draft's own, bit for bit, until a step is made.

    Args:
        draft: gets LoRA layers in place of the chosen linear ones; its own weights are frozen.
        rank: r.
        alpha: the update counts alpha / rank.
        modules: names out of ``draft.checkpoint.MODULES``.
        seed: of the first factors.
    """

    def __init__(self, draft: DFlashDraft, *, rank: int, alpha: float, modules: Sequence[str], seed: int) -> None:
        if any(isinstance(module, LoraLinear) for module in draft.modules()):
            received, hint = "one with an adapter in it", "leave the other adapter's `with pair.adapter(…)` block first"
            raise InputError("pair.draft", expected="a draft without an adapter", received=received, hint=hint)
        self.rank = check_integer("rank", rank, hint="of an adapter it is r in adapter_config.json")
        self.draft, self.alpha, self.modules = draft, alpha, tuple(modules)
        self.base = base_digest(draft)
        self.required = [(weight, weight.requires_grad) for weight in draft.parameters()]
        self.checkpointing = draft.gradient_checkpointing
        chosen = [(name, layer) for name, layer in draft.named_modules() if name.rpartition(".")[2] in modules]
        # Made before the draft is touched: out of memory here leaves it as it was.
        self.layers = {name: LoraLinear(layer, rank, alpha / rank) for name, layer in chosen}
        self.reset(seed)
        draft.requires_grad_(False)
        for name, lora in self.layers.items():
            self._put(name, lora)

    def _put(self, name: str, layer: nn.Module) -> None:
        parent, _, last = name.rpartition(".")
        setattr(self.draft.get_submodule(parent), last, layer)

    def parameters(self) -> list[nn.Parameter]:
        """What an optimiser may change: A and B of every layer, in the draft's order."""
        return [weight for layer in self.layers.values() for weight in (layer.lora_A, layer.lora_B)]

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """Start anew, in place. A as PEFT starts it, by the seed alone (no device, nothing drawn before); B zero."""
        generator = torch.Generator().manual_seed(seed)
        for layer in self.layers.values():
            fresh = torch.empty(layer.lora_A.shape, dtype=torch.float32)
            nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator)
            layer.lora_A.copy_(fresh)
            layer.lora_B.zero_()
            layer.lora_A.grad = layer.lora_B.grad = None

    def _named(self) -> dict[str, nn.Parameter]:
        """By PEFT's keys without their prefix."""
        parts = ("lora_A", "lora_B")
        return {f"{name}.{part}.weight": getattr(layer, part) for name, layer in self.layers.items() for part in parts}

    def state(self) -> dict[str, Tensor]:
        """Copies of the weights on CPU, by PEFT's keys without their prefix."""
        return {key: weight.detach().cpu().clone() for key, weight in self._named().items()}

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """Take over weights that :meth:`state` gave, or those of a saved adapter for the same modules and draft."""
        own = self._named()
        wrong = sorted(own.keys() ^ weights.keys()) or [
            f"{key} {list(weights[key].shape)} for {list(own[key].shape)}"
            for key in own
            if own[key].shape != weights[key].shape
        ]
        if wrong:
            raise InputError(
                "adapter",
                expected=f"rank {self.rank} on {', '.join(self.modules)} of this draft",
                received=f"weights that differ in {', '.join(wrong[:3])}",
                hint="use the adapter with the draft and the TTTConfig it was made with",
            )
        for key, weight in own.items():
            weight.copy_(weights[key])

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Whether every weight is a finite number."""
        return all(bool(torch.isfinite(weight).all()) for weight in self.parameters())

    def adapter(self) -> Adapter:
        """The weights as they are now."""
        return Adapter(self.state(), self.rank, self.alpha, self.modules, self.base)

    def remove(self) -> None:
        """Give the draft its own layers back: it is as it was before, bit for bit."""
        for name, layer in self.layers.items():
            self._put(name, layer.base_layer)
        self.layers = {}
        for weight, required in self.required:
            weight.requires_grad_(required)
        self.draft.gradient_checkpointing = self.checkpointing


def with_adapter(draft: DFlashDraft, adapter: Adapter) -> DraftLora:
    """LoRA layers with an adapter's weights, put into the draft that it was trained on."""
    if adapter.base is not None and adapter.base != (ours := base_digest(draft)):
        expected, received = f"one of this draft ({ours})", f"one of another ({adapter.base})"
        raise InputError("adapter", expected=expected, received=received, hint="load the pair that it was trained with")
    lora = DraftLora(draft, rank=adapter.rank, alpha=adapter.alpha, modules=adapter.modules, seed=0)
    try:
        lora.load(adapter.weights)
    except BaseException:
        lora.remove()
        raise
    return lora


def base_digest(draft: DFlashDraft) -> str:
    """Which draft this is: shapes and a few numbers of every weight, the same in every dtype it may be loaded in."""
    digest = hashlib.sha256()
    for name, weight in draft.named_parameters():
        if "lora_" in name:
            continue
        some = weight.detach().flatten()[:SAMPLE].to("cpu", torch.bfloat16).float()
        digest.update(f"{name.replace('.base_layer', '')} {tuple(weight.shape)} {some.tolist()}".encode())
    return digest.hexdigest()[:16]
