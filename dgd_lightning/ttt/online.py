"""Online test-time training: while one prompt is decoded, the draft goes on learning from what was verified."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dgd_lightning.checks import check_integer
from dgd_lightning.draft.checkpoint import Adapter
from dgd_lightning.draft.lora import with_adapter
from dgd_lightning.pair import Pair
from dgd_lightning.ttt.adapt import check_adaptable, make_lora, make_optimizer, make_step
from dgd_lightning.ttt.config import TTTConfig
from dgd_lightning.ttt.context import ReadText, Split
from dgd_lightning.ttt.problem import AdaptProblem


@dataclass
class OnlineTTT:
    """Adaptation during decoding.

    Args:
        every: committed tokens between two rounds.
        config: of a round, ``steps`` steps on blocks of the tokens generated so far. Nothing is held out.
        adapter: what to start from (an adapter of the context); None starts from the draft as it is.

    Raises:
        InputError: ``every`` is not a positive integer.
    """

    every: int = 64
    config: TTTConfig = field(default_factory=lambda: TTTConfig(steps=2))
    adapter: Adapter | None = None

    def __post_init__(self) -> None:
        check_integer("online.every", self.every, hint="use e.g. 64")

    def begin(self, pair: Pair, capacity: int) -> "OnlineFit":
        """Start for one prompt of at most ``capacity`` positions with its answer: what the decoder calls."""
        return OnlineFit(pair, self, capacity)


class OnlineFit:
    """LoRA layers in the draft while one prompt is decoded, and what the target computed for its tokens.

    :meth:`close` gives the draft back as it was.
    """

    def __init__(self, pair: Pair, online: OnlineTTT, capacity: int) -> None:
        check_adaptable(pair)
        draft, target, config, given = pair.require_draft(), pair.target, online.config, online.adapter
        self.pair, self.config, self.every = pair, config, online.every
        self.width = draft.config.num_features
        self.layer_ids: Sequence[int] = (*draft.config.target_layer_ids, target.num_layers - 1)
        self.features = torch.zeros(1, capacity, self.width, dtype=target.dtype, device=target.device)
        self.states = torch.zeros(1, capacity, target.hidden_size, dtype=target.dtype, device=target.device)
        self.lora = make_lora(draft, config) if given is None else with_adapter(draft, given)
        try:
            self.optimizer = make_optimizer(self.lora, config)
        except BaseException:
            self.lora.remove()
            raise
        self.rounds, self.step, self.last = 0, 0, 0
        self.stopped: str | None = None  # why no round is made any more

    def observe(self, taps: Tensor, positions: Tensor) -> Tensor:
        """Keep what a forward gave, [1, Q, (F + 1)·H] at positions [1, Q], and return the draft's part, [1, Q, F·H].

        Rejected positions are kept too: they lie beyond the anchor and are overwritten before they count.
        """
        features, states = taps[..., : self.width], taps[..., self.width :]
        self.features[:, positions[0]] = features
        self.states[:, positions[0]] = states
        return features

    def after_cycle(self, ids: Tensor, prompt_length: int) -> Tensor | None:
        """A round where one is due; see :class:`~dgd_lightning.decode.call.CycleState`."""
        generated = len(ids) - prompt_length
        if self.stopped is not None or generated - self.last < self.every or generated <= 2:
            return None
        features = self.adapt(ids, prompt_length)
        # keys and values of the context made before the round are stale, unless nothing of them is adapted
        return None if set(self.lora.modules) == {"q_proj"} else features

    @torch.enable_grad()
    def adapt(self, ids: Tensor, prompt_length: int) -> Tensor:
        """One round on the tokens behind the prompt; a round that breaks the draft is taken back and was the last one.

        Given prompt and verified tokens [S], all of them read by the target, it returns their features [1, S, F·H], of
        which the draft's context must be made again where it changed.
        """
        length = ids.shape[0]
        read = ReadText(ids[None], self.features[:, :length], self.states[:, :length])
        split = Split(length, length, prompt_length)
        problem = AdaptProblem(self.pair, read, split, self.config, self.lora)
        before = self.lora.state()
        for _ in range(self.config.steps):
            make_step(problem.loss(self.step), self.optimizer, self.lora, self.config)
            self.step += 1
        if not self.lora.is_finite() or not torch.isfinite(problem.loss(self.step)):
            self.lora.load(before)
            self.stopped = f"round {self.rounds + 1} made the draft's loss infinite: lower ttt.lr"
            warnings.warn(f"online adaptation ended: {self.stopped}", stacklevel=2)
        self.rounds, self.last = self.rounds + 1, length - prompt_length
        return read.features

    def close(self) -> None:
        """Give the draft its own layers back."""
        self.lora.remove()
