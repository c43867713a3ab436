"""LoRA layers inside a draft: put in through PEFT, reset in place, switched off and on, taken out again."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dgd_lightning.draft.adapter import Adapter, peft_config
from dgd_lightning.draft.model import DFlashDraft
from dgd_lightning.errors import InputError

if TYPE_CHECKING:
    from peft.tuners.lora import Linear as LoraLinear

NAME = "ttt"  # PEFT's name of the adapter inside the draft
SAMPLE = 64  # elements of every weight that tell one base draft from another


class _Lifted(torch.autograd.Function):
    """``F.linear`` of few inputs, whose weight's gradient is made lengthwise.

    Autograd makes it as [out, T] · [T, r], which CPU libraries take three times as long for as for [r, T] · [T, out].
    """

    @staticmethod
    def forward(ctx: Any, low: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(low, weight)
        return F.linear(low, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slopes: Tensor) -> Any:
        low, weight = ctx.saved_tensors
        flat = slopes.flatten(0, -2)  # [T, out]; under autocast narrower than the inputs
        of_weight = (low.flatten(0, -2).to(flat.dtype).t() @ flat).t().to(weight.dtype)
        return (slopes @ weight.to(slopes.dtype)).to(low.dtype), of_weight


class SecondFactor(nn.Linear):
    """LoRA's B: what ``nn.Linear`` without bias computes, bit for bit; see :class:`_Lifted`."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = nn.Parameter(weight)

    def forward(self, input: Tensor) -> Tensor:  # nn.Linear's name of it
        """[.., r] -> [.., out]."""
        return lifted(input, self.weight)


def lifted(low: Tensor, weight: Tensor) -> Tensor:
    """``F.linear`` for LoRA's second product: low [.., r], weight [out, r] -> [.., out]."""
    return _Lifted.apply(low, weight)


class DraftLora:
    """LoRA layers inside a draft, for as long as this object is not removed.

    The second factor starts at zero, so that every logit is the draft's own, bit for bit, until a step is made.

    Args:
        draft: gets PEFT's layers in place of the chosen linear ones; its own weights are frozen.
        rank: r.
        alpha: the update counts alpha / rank.
        modules: names out of ``draft.adapter.MODULES``.
        seed: of the first factors.

    Raises:
        InputError: the draft has an adapter already.
    """

    def __init__(self, draft: DFlashDraft, *, rank: int, alpha: float, modules: Sequence[str], seed: int) -> None:
        from peft import inject_adapter_in_model  # takes a second to import; most runs need none of it

        if _lora_layers(draft):
            raise InputError(
                "pair.draft",
                expected="a draft without an adapter",
                received="one with an adapter in it",
                hint="leave the other adapter's `with pair.adapter(…)` block first",
            )
        self.draft, self.rank, self.alpha, self.modules = draft, rank, alpha, tuple(modules)
        self.base = base_digest(draft)
        self.required = [(weight, weight.requires_grad) for weight in draft.parameters()]
        draft.requires_grad_(False)
        self.layers: dict[str, LoraLinear] = {}
        try:
            inject_adapter_in_model(peft_config(rank, alpha, modules), draft, adapter_name=NAME)
            self._take_up(seed)
        except BaseException:  # out of memory, an interrupt: the draft is given back as it was
            self.layers = _lora_layers(draft)
            self.remove()
            raise

    def _take_up(self, seed: int) -> None:
        self.layers = _lora_layers(self.draft)
        wide = torch.promote_types(self.draft.dtype, torch.float32)  # fp32 for half-precision drafts
        for layer in self.layers.values():
            layer.lora_A[NAME].to(wide)
            layer.lora_B[NAME] = SecondFactor(factors(layer)[1].data.to(wide))
        self.reset(seed)

    def parameters(self) -> list[nn.Parameter]:
        """What an optimiser may change: A and B of every layer, in the draft's order."""
        return [weight for layer in self.layers.values() for weight in factors(layer)]

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """Start anew, in place: nothing of an earlier context is left. A as PEFT starts it, B zero.

        Args:
            seed: of A, which depends on nothing else (not on the device, nor on what was drawn before).
        """
        generator = torch.Generator().manual_seed(seed)
        for layer in self.layers.values():
            first, second = factors(layer)
            fresh = torch.empty(first.shape, dtype=torch.float32)
            nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator)
            first.copy_(fresh)
            second.zero_()
            first.grad = second.grad = None

    def state(self) -> dict[str, Tensor]:
        """Copies of the weights on CPU, by PEFT's keys without their prefix."""
        return {
            f"{name}.{part}.weight": weight.detach().cpu().clone()
            for name, layer in self.layers.items()
            for part, weight in zip(("lora_A", "lora_B"), factors(layer), strict=True)
        }

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """Take over weights that :meth:`state` gave, or those of a saved adapter.

        Raises:
            InputError: they belong to other modules, another rank or another draft.
        """
        own = self.state()
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
        for name, layer in self.layers.items():
            for part, weight in zip(("lora_A", "lora_B"), factors(layer), strict=True):
                weight.copy_(weights[f"{name}.{part}.weight"])

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Whether every weight is a finite number."""
        return all(bool(torch.isfinite(weight).all()) for weight in self.parameters())

    def adapter(self) -> Adapter:
        """The weights as they are now."""
        return Adapter(self.state(), self.rank, self.alpha, self.modules, self.base)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base draft, bit for bit, inside the block."""
        for layer in self.layers.values():
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.enable_adapters(True)

    def remove(self) -> None:
        """Give the draft its own layers back: it is as it was before, bit for bit."""
        for name, layer in self.layers.items():
            parent, _, last = name.rpartition(".")
            setattr(self.draft.get_submodule(parent), last, layer.get_base_layer())
        self.layers = {}
        if hasattr(self.draft, "peft_config"):
            del self.draft.peft_config
        for weight, required in self.required:
            weight.requires_grad_(required)


def _lora_layers(draft: DFlashDraft) -> dict[str, LoraLinear]:
    from peft.tuners.lora import Linear

    return {name: module for name, module in draft.named_modules() if isinstance(module, Linear)}


def factors(layer: LoraLinear) -> tuple[nn.Parameter, nn.Parameter]:
    """A [r, in] and B [out, r] of a layer; it computes ``base(x) + alpha / r · B(A(x))``."""
    return cast(nn.Parameter, layer.lora_A[NAME].weight), cast(nn.Parameter, layer.lora_B[NAME].weight)


@contextmanager
def applied(draft: DFlashDraft, adapter: Adapter) -> Iterator[DFlashDraft]:
    """The draft with an adapter in it, inside the block.

    Raises:
        InputError: the adapter was made for another draft.
    """
    check_base(draft, adapter)
    lora = DraftLora(draft, rank=adapter.rank, alpha=adapter.alpha, modules=adapter.modules, seed=0)
    try:
        lora.load(adapter.weights)
        yield draft
    finally:
        lora.remove()


def check_base(draft: DFlashDraft, adapter: Adapter) -> None:
    """Raises:
    InputError: the adapter says that it was trained on another draft.
    """
    if adapter.base is not None and adapter.base != (ours := base_digest(draft)):
        raise InputError(
            "adapter",
            expected=f"one of this draft ({ours})",
            received=f"one of another ({adapter.base})",
            hint="load the pair that it was trained with",
        )


def base_digest(draft: DFlashDraft) -> str:
    """Which draft this is: shapes and a few numbers of every weight, the same in every dtype it may be loaded in."""
    digest = hashlib.sha256()
    for name, weight in draft.named_parameters():
        if "lora_" in name:
            continue
        some = weight.detach().flatten()[:SAMPLE].to("cpu", torch.bfloat16).float()
        digest.update(f"{name.replace('.base_layer', '')} {tuple(weight.shape)} {some.tolist()}".encode())
    return digest.hexdigest()[:16]
