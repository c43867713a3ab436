"""One intermediate layer as a readout."""

from dataclasses import dataclass

from dgd_lightning.decode.call import Request
from dgd_lightning.decode.readouts.base import Readout, ReadoutState, Stateless, check_layer, lens
from dgd_lightning.pair import Pair


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
        return Stateless(lambda out: lens(pair.target, out.taps[self.layer], self.layer, norm=self.norm))
