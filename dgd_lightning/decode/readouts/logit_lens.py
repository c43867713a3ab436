"""One intermediate layer as a readout."""

from dataclasses import dataclass

from torch import Tensor

from dgd_lightning.decode.call import Request
from dgd_lightning.decode.readouts.base import Readout, ReadoutState, TargetOutput, check_layer, lens
from dgd_lightning.pair import Pair
from dgd_lightning.target.model import Target


@dataclass(frozen=True)
class LogitLens(Readout):
    """One intermediate layer read through the final norm and the head.

    Args:
        layer: 0-based; its output is transformers' ``hidden_states[layer + 1]``.
        norm: False reads it raw.
    """

    layer: int
    norm: bool = True

    def layers(self, pair: Pair) -> tuple[int, ...]:
        return (check_layer(pair.target, self.layer),)

    def begin(self, pair: Pair, request: Request, width: int) -> ReadoutState:
        return LensState(pair.target, self)


class LensState(ReadoutState):
    """See `LogitLens`."""

    def __init__(self, target: Target, readout: LogitLens) -> None:
        self.target, self.readout = target, readout

    def logits(self, out: TargetOutput) -> Tensor:
        return lens(self.target, out.taps[self.readout.layer], self.readout.layer, norm=self.readout.norm)
