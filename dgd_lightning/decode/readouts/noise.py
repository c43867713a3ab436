"""The null control of a readout: noise of its size. What an arm gains over it is what its readout knew."""

import zlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dgd_lightning.decode.call import Request
from dgd_lightning.decode.philox import normals
from dgd_lightning.decode.readouts.base import Readout, ReadoutState, TargetOutput, WrappedState, wide
from dgd_lightning.decode.readouts.draft import DraftReadout
from dgd_lightning.pair import Pair
from dgd_lightning.seeds import mixed_seed


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
