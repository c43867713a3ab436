"""Null controls: readouts that change the target as much as another one does, without its information.

What an arm gains over its control is due to what its readout knows; what both gain is regularisation. The draft's own
controls, fed with shuffled or random features, are settings of `DraftReadout`.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dgd_lightning.decode.call import Request
from dgd_lightning.decode.philox import normals
from dgd_lightning.decode.readouts import DraftReadout, Readout, ReadoutState, TargetOutput, wide
from dgd_lightning.distributions import entropy
from dgd_lightning.seeds import mixed_seed

if TYPE_CHECKING:
    from dgd_lightning.pair import Pair
    from dgd_lightning.target.cache import PositionCache


@dataclass(frozen=True)
class Noise(Readout):
    """The target plus Gaussian noise with, at every token, the size of another readout's correction.

    The noise has, exactly, the norm of the correction ``readout − target`` less its mean over the vocabulary.

    Args:
        like: the readout whose size it has.
        seed: of the noise, together with the prompt, the position and the token: batch, rank and device change nothing.
    """

    like: Readout = field(default_factory=DraftReadout)
    seed: int = 0

    def layers(self, pair: Pair) -> tuple[int, ...]:
        return self.like.layers(pair)

    def controls(self) -> Readout | None:
        return self.like

    def begin(self, pair: Pair, request: Request, width: int) -> ReadoutState:
        return NoiseState(self.like.begin(pair, request, width), request, self.seed, pair.target.device)


class WrappedState(ReadoutState):
    """A state that is made from another readout's."""

    def __init__(self, inner: ReadoutState) -> None:
        self.inner, self.caches, self.drafts = inner, inner.caches, inner.drafts

    def extend(self, taps: dict[int, Tensor], positions: Tensor) -> None:
        self.inner.extend(taps, positions)

    def ready(self) -> None:
        self.inner.ready()

    def share(self, cache: PositionCache, block_size: int) -> None:
        self.inner.share(cache, block_size)
        self.caches = self.inner.caches

    def select(self, rows: Tensor) -> None:
        self.inner.select(rows)


class NoiseState(WrappedState):
    """See `Noise`."""

    def __init__(self, inner: ReadoutState, request: Request, seed: int, device: torch.device) -> None:
        super().__init__(inner)
        prompts = [request.ids[row, :length].numpy().tobytes() for row, length in enumerate(request.lengths)]
        mixed = [mixed_seed(seed, zlib.crc32(prompt)) for prompt in prompts]
        self.keys = torch.tensor([[one & 0xFFFFFFFF, one >> 32] for one in mixed], device=device)  # [b, 2]

    def logits(self, out: TargetOutput) -> Tensor:
        target = wide(out.logits)
        correction = wide(self.inner.logits(out)) - target
        size = (correction - correction.mean(-1, keepdim=True)).norm(dim=-1, keepdim=True)
        noise = normals(self.keys, out.positions, target.shape[-1]).to(target)
        noise = noise - noise.mean(-1, keepdim=True)
        return target + noise * (size / noise.norm(dim=-1, keepdim=True))

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        self.keys = self.keys[rows]


@dataclass(frozen=True)
class MatchedEntropy(Readout):
    """The target at the temperature at which its entropy is another readout's.

    Args:
        like: that readout.
    """

    like: Readout = field(default_factory=DraftReadout)

    def layers(self, pair: Pair) -> tuple[int, ...]:
        return self.like.layers(pair)

    def controls(self) -> Readout | None:
        return self.like

    def begin(self, pair: Pair, request: Request, width: int) -> ReadoutState:
        return EntropyState(self.like.begin(pair, request, width))


class EntropyState(WrappedState):
    """See `MatchedEntropy`."""

    HALVINGS = 48
    COLDEST, HOTTEST = 1e-3, 1e3  # temperatures

    def logits(self, out: TargetOutput) -> Tensor:
        target = wide(out.logits)
        wanted = entropy(wide(self.inner.logits(out)).log_softmax(-1))[..., None]  # [b, Q, 1]
        low = torch.full_like(wanted, self.COLDEST).log()
        high = torch.full_like(wanted, self.HOTTEST).log()
        for _ in range(self.HALVINGS):
            middle = (low + high) / 2
            hotter = entropy((target / middle.exp()).log_softmax(-1))[..., None] < wanted
            low, high = torch.where(hotter, middle, low), torch.where(hotter, high, middle)
        return target / ((low + high) / 2).exp()
