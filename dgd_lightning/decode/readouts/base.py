"""What every readout is: a second set of logits, made from what the target has computed.

A readout is a small frozen description; ``begin`` gives a `ReadoutState`, which holds what it needs for one batch. A
readout of one's own is a class with the same methods, named by its class path. Each position's logits may depend on the
tokens and states at and before it only: then a block gives what token by token gives.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from dgd_lightning.decode.call import Request
from dgd_lightning.distributions import wide
from dgd_lightning.errors import InputError
from dgd_lightning.pair import Pair
from dgd_lightning.target.cache import PositionCache
from dgd_lightning.target.model import Target


class TargetOutput(NamedTuple):
    """What the target has just read: Q positions of every row."""

    tokens: Tensor  # [b, Q]
    positions: Tensor  # [b, Q]
    logits: Tensor  # [b, Q, V], the target's own
    taps: dict[int, Tensor]  # per tapped layer, [b, Q, H]
    longest: int  # host-known, at least the largest position
    proposed: Tensor | None = None  # [b, V], slot 1 of the proposals' blocks, which are anchored at the first position


class ReadoutState(ABC):
    """A readout at work on one batch. Only `logits` must be written; what keeps nothing needs no more."""

    # Of its own: their rows are selected as its own are, and what a row may come back to is copied in them. So what a
    # readout keeps of a position must lie in a cache of `Request.capacity` slots, the target's position p in slot
    # p − shift.
    caches: Sequence[PositionCache] = ()
    shift: Tensor | None = None  # [b]; None: 0
    drafts = 0  # forwards of the draft per forward of the target

    def extend(self, taps: dict[int, Tensor], positions: Tensor) -> None:  # noqa: B027
        """Take up states [b, S, H] at positions [b, S]: of prompts, chunk by chunk; of every forward before its logits.

        Rejected positions come too: they lie beyond the row's end, and come again. Of prompts every position comes
        once; what comes at or beyond a prompt's last token is padding.
        """

    def ready(self) -> None:  # noqa: B027
        """The prompts, all but their last tokens, are read."""

    def share(self, cache: PositionCache, block_size: int) -> None:  # noqa: B027
        """The draft cache of proposals of K tokens, of the same rows and fed with the target's features."""

    @abstractmethod
    def logits(self, out: TargetOutput) -> Tensor:
        """[b, Q, V]: for the token after each position."""

    def select(self, rows: Tensor) -> None:  # noqa: B027
        """Have these rows [r], in this order; a row may come several times (``caches`` are selected by the caller)."""


class Readout(ABC):
    """What the target is blended with."""

    needs_draft = False  # whether the pair must have one

    @abstractmethod
    def layers(self, pair: Pair) -> tuple[int, ...]:
        """Layers of the target whose outputs it needs."""

    @abstractmethod
    def begin(self, pair: Pair, request: Request, width: int) -> ReadoutState:
        """For one batch whose cycles read ``width`` tokens; an `InputError` where pair or request can't serve it."""

    def controls(self) -> "Readout | None":
        """The readout whose null control it is; None for one that means what it says."""
        return None


class Stateless(ReadoutState):
    """What keeps nothing: a function of what the target has just read."""

    def __init__(self, read: Callable[[TargetOutput], Tensor]) -> None:
        self.read = read

    def logits(self, out: TargetOutput) -> Tensor:
        return self.read(out)


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

    @property
    def shift(self) -> Tensor | None:  # type: ignore[override]  # it changes with the rows
        return self.inner.shift

    def select(self, rows: Tensor) -> None:
        self.inner.select(rows)


class ScaledState(WrappedState):
    """A null control whose difference from the target is ``scale`` times as large."""

    def __init__(self, inner: ReadoutState, scale: float) -> None:
        super().__init__(inner)
        self.scale = scale

    def logits(self, out: TargetOutput) -> Tensor:
        return scaled_logits(wide(out.logits), wide(self.inner.logits(out)), self.scale)


def scaled_logits(target: Tensor, readout: Tensor, scale: float) -> Tensor:
    """A readout's logits [.., V] whose difference from the target's is ``scale`` times as large."""
    return target + scale * (readout - target)


def scaled(state: ReadoutState, scale: float) -> ReadoutState:
    """The state at a scale; at 1 as it is, bit for bit."""
    return state if scale == 1 else ScaledState(state, scale)


def split_taps(features: Tensor | None, layer_ids: Sequence[int]) -> dict[int, Tensor]:
    """Features [b, Q, F·H] of these layers, by layer; nothing where no layer is tapped."""
    if not layer_ids:
        return {}
    assert features is not None
    return dict(zip(layer_ids, features.chunk(len(layer_ids), dim=-1), strict=True))


def lens(target: Target, states: Tensor, layer: int, *, norm: bool) -> Tensor:
    """Logits of a layer's output [.., H] -> [.., V]; the last layer's has the final norm behind it already."""
    if norm and layer != target.num_layers - 1:
        states = target.final_norm(states)
    return target.lm_head(states)


def check_layer(target: Target, layer: int, name: str = "readout.layer") -> int:
    if type(layer) is not int or not 0 <= layer < target.num_layers:
        raise InputError(
            name,
            expected=f"a layer within 0…{target.num_layers - 1}",
            received=repr(layer),
            hint="name one of the target's layers",
        )
    return layer
