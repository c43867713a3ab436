"""The null control of a readout: noise of its size. What an arm gains over it is what its readout knew.

Philox4x32-10 gives random numbers as a function of a key and a counter, the same in every batch and on every device.
Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3" (SC'11), section 3.3; the constants are those
of Random123. Words are 32-bit and held in int64 tensors, so nothing waits for the host and no generator has a state.
"""

import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from dgd_lightning.checks import check_number
from dgd_lightning.decode.call import Request
from dgd_lightning.decode.readouts.base import ReadoutState, TargetOutput, WrappedState, scaled
from dgd_lightning.decode.readouts.draft import Imitation
from dgd_lightning.distributions import real_dtype, wide
from dgd_lightning.pair import Pair
from dgd_lightning.seeds import mixed_seed

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF
AT_ONCE = 2**22  # normals made together: about 0.2 GB of intermediate tensors

Words4 = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Noise(Imitation):
    """The target plus Gaussian noise with, at every token, the size of another readout's correction.

    The noise has, exactly, the norm of the correction ``readout − target`` less its mean over the vocabulary.

    Args:
        like: the readout whose size it has.
        seed: of the noise, together with the prompt, the position and the token: batch, rank and device change nothing.
        scale: factor on the size; ``model.match_controls`` finds the one that has the other readout's effect.
    """

    seed: int = 0
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_number("readout.scale", self.scale, above=0)

    def begin(self, pair: Pair, request: Request, width: int) -> ReadoutState:
        state = NoiseState(self.like.begin(pair, request, width), request, self.seed, pair.target.device)
        return scaled(state, self.scale)


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


def philox(counter: Words4, key: tuple[Tensor, Tensor]) -> Words4:
    """Four random words for each counter; all words are int64 tensors with values below 2³², of shapes that broadcast.

    Products are taken modulo 2⁶⁴, as int64 wraps around: both of their words come out as those of unsigned numbers.
    """
    c0, c1, c2, c3 = counter
    for number in range(ROUNDS):
        k0, k1 = (word + number * step for word, step in zip(key, KEY_STEPS, strict=True))  # cut to words below
        first, second = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c2 = (second >> 32 ^ c1 ^ k0) & WORD, (first >> 32 ^ c3 ^ k1) & WORD
        c1, c3 = second & WORD, first & WORD
    return c0, c1, c2, c3


def normals(keys: Tensor, positions: Tensor, width: int) -> Tensor:
    """Standard normal numbers, each fixed by its row's key, its position and its place in the vocabulary.

    Box–Muller of words 0, 1 and of words 2, 3 of the counter (place // 4, position, 0, 0). Devices give the same words
    and differ in the last digits of the logarithm and the cosine only. Keys [B, 2] are words, positions [B, Q] below
    2³²; with V the width, the numbers are [B, Q, V], fp64 (fp32 on MPS, which has no fp64).
    """
    kind = real_dtype(keys.device)
    key, at, zero = (keys[:, :1, None], keys[:, 1:, None]), positions[..., None], torch.zeros_like(positions[..., None])
    step = max(AT_ONCE // (4 * positions.numel()), 1)  # counters
    parts = []
    for low in range(0, -(-width // 4), step):
        counters = torch.arange(low, min(low + step, -(-width // 4)), device=keys.device)
        words = torch.stack(philox((counters, at, zero, zero), key), dim=-1).to(kind)  # [B, Q, C, 4]
        radius = ((words[..., 0::2] + 0.5) / 2**32).log_().mul_(-2).sqrt_()  # [B, Q, C, 2]
        angle = words[..., 1::2] * (2 * math.pi / 2**32)
        parts.append(torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten(2))
    return torch.cat(parts, dim=-1)[..., :width]
