"""The null control of a readout: the target at the readout's entropy. What both gain is regularisation."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dgd_lightning.decode.call import Request
from dgd_lightning.decode.readouts.base import ReadoutState, TargetOutput, WrappedState
from dgd_lightning.decode.readouts.draft import Imitation
from dgd_lightning.distributions import entropy, wide
from dgd_lightning.pair import Pair


@dataclass(frozen=True)
class MatchedEntropy(Imitation):
    """The target at the temperature at which its entropy is another readout's.

    Args:
        like: that readout.
    """

    def begin(self, pair: Pair, request: Request, width: int) -> ReadoutState:
        return EntropyState(self.like.begin(pair, request, width))


class EntropyState(WrappedState):
    """See `MatchedEntropy`."""

    HALVINGS = 48
    COLDEST, HOTTEST = 1e-3, 1e3  # temperatures

    def logits(self, out: TargetOutput) -> Tensor:
        target = wide(out.logits)
        wanted = entropy(wide(self.inner.logits(out)).log_softmax(-1))[..., None]  # [b, Q, 1]
        nothing = wanted * 0  # NaN where the readout is no number, and so is what is returned then
        low, high = nothing + math.log(self.COLDEST), nothing + math.log(self.HOTTEST)
        for _ in range(self.HALVINGS):
            middle = (low + high) / 2
            hotter = entropy((target / middle.exp()).log_softmax(-1))[..., None] < wanted
            low, high = torch.where(hotter, middle, low), torch.where(hotter, high, middle)
        return target / ((low + high) / 2).exp()
