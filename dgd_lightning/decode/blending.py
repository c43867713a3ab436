"""Guidance: ``guided = (1 − β)·target + β·readout``, its spaces, constraints and schedules; pure functions.

- *Space*: what the formula mixes, logits or probabilities.
- *Constraint*: which tokens may be chosen at all, by the target's own distribution.
- *Schedule*: a factor on β at every position.

All depend only on the two sets of logits at a position and on how many tokens were generated before it, so a block of
positions gives what position by position gives.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from dgd_lightning.checks import check_choice, check_integer, check_number
from dgd_lightning.distributions import entropy, js_divergence, kl_divergence
from dgd_lightning.errors import InputError

Space = Literal["logits", "log_probs", "probs"]
Signal = Literal["js", "kl", "entropy_gap"]


class Schedule(ABC):
    """How strong guidance is at each position: a factor on β.

    One of a user's own subclasses this and is named by its class path; it may use what is at or before a position only.
    """

    reads: ClassVar[bool] = True  # whether it looks at the distributions; else it gets logits, which cost nothing

    @abstractmethod
    def __call__(self, target: Tensor, readout: Tensor, step: Tensor) -> Tensor:
        """Factors [B, Q].

        Args:
            target, readout: [B, Q, V] log-probabilities, fp32 or wider; where it ``reads`` nothing, any numbers.
            step: [B, Q] tokens generated before the position.
        """


@dataclass(frozen=True)
class Constant(Schedule):
    """β at every position."""

    reads: ClassVar[bool] = False

    def __call__(self, target: Tensor, readout: Tensor, step: Tensor) -> Tensor:
        return torch.ones_like(target[..., 0])


@dataclass(frozen=True)
class WarmUp(Schedule):
    """From 0 to β over the first tokens: ``min(1, step / tokens)``.

    Args:
        tokens: generated tokens after which β is reached.
    """

    tokens: int = 32
    reads: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_integer("schedule.tokens", self.tokens, hint="use e.g. 32")

    def __call__(self, target: Tensor, readout: Tensor, step: Tensor) -> Tensor:
        return (step.to(target.dtype) / self.tokens).clamp(max=1.0)


@dataclass(frozen=True)
class Disagree(Schedule):
    """β where the top-1 tokens of target and readout differ, 0 elsewhere."""

    def __call__(self, target: Tensor, readout: Tensor, step: Tensor) -> Tensor:
        return (target.argmax(-1) != readout.argmax(-1)).to(target.dtype)


@dataclass(frozen=True)
class Adaptive(Schedule):
    """More guidance the more the readout differs from the target; the factor is in 0 … 1 at each position.

    With p the target's distribution there and r the readout's:

    - ``js``: JS(p, r) / ln 2, as in AdaCAD (arXiv 2409.07394). Symmetric; 1 where p and r have no token in common.
    - ``kl``: 1 − exp(−KL(r ‖ p)). Large where the readout is sure of a token that the target thinks unlikely.
    - ``entropy_gap``: max(0, H(p) − H(r)) / ln V. Above 0 only where the readout is surer than the target.

    Args:
        by: which of them.
    """

    by: Signal = "js"

    def __post_init__(self) -> None:
        check_choice("schedule.by", self.by, get_args(Signal))

    def __call__(self, target: Tensor, readout: Tensor, step: Tensor) -> Tensor:
        if self.by == "js":
            factor = js_divergence(target, readout) / math.log(2)
        elif self.by == "kl":
            factor = -torch.expm1(-kl_divergence(readout, target))
        else:
            factor = (entropy(target) - entropy(readout)) / math.log(target.shape[-1])
        return factor.clamp(0, 1)  # rounding leaves a divergence of equal distributions a little below 0


@dataclass(frozen=True)
class Blend:
    """How target and readout become one distribution.

    Args:
        beta: strength: one number for all rows, or one per row; any finite number. 0 is the target, 1 the readout; a
            negative one pushes away from the readout, one above 1 away from the target.
        space: ``logits`` mixes logits; ``log_probs`` mixes log-probabilities, which is the same distribution, since
            they differ by a constant per position; ``probs`` is the mixture (1 − β)·p + β·r of the distributions, for β
            in 0 … 1.
        candidates: constraint: only the target's so many likeliest tokens can be chosen.
        plausibility: constraint: α in (0, 1]; only tokens with at least α times the probability of the target's
            likeliest can be chosen (Li et al. 2023, contrastive decoding, arXiv 2210.15097).
        schedule: factor on β at each position. Constraints hold whatever it is, except for rows whose β is 0.

    Raises:
        InputError: a number that can't be used.
    """

    beta: float | Sequence[float]
    space: Space = "logits"
    candidates: int | None = None
    plausibility: float | None = None
    schedule: Schedule = field(default_factory=Constant)

    def __post_init__(self) -> None:
        check_choice("space", self.space, get_args(Space))
        least, most, hint = (0, 1, "use space='logits'") if self.space == "probs" else (-math.inf, math.inf, "use 0.3")
        for beta in self.beta if isinstance(self.beta, Sequence) and self.beta else [self.beta]:
            check_number("beta", beta, least=least, most=most, hint=hint)
        check_integer("candidates", self.candidates, optional=True, hint="use 50: a token must be left")
        check_number(
            "plausibility", self.plausibility, above=0, most=1, optional=True, hint="use 0.1: a token must be left"
        )
        if not callable(self.schedule) or isinstance(self.schedule, type):
            hint = "use Adaptive('js')"  # a class is no schedule until it is made
            raise InputError("schedule", expected="a Schedule", received=repr(self.schedule), hint=hint)

    def betas(self, rows: int) -> list[float]:
        """One β per row."""
        if isinstance(self.beta, int | float):
            return [float(self.beta)] * rows
        if len(self.beta) != rows:
            raise InputError(
                "beta",
                expected=f"one number, or {rows}: one per prompt",
                received=len(self.beta),
                hint="repeat the prompts",
            )
        return [float(b) for b in self.beta]

    def mix(self, target: Tensor, readout: Tensor, beta: Tensor, step: Tensor) -> Tensor:
        """Guided logits [B, Q, V], in fp32 or wider; rows whose β is 0 are the target's own, bit for bit.

        Args:
            target, readout: [B, Q, V] logits.
            beta: [B], one per row.
            step: [B, Q] tokens generated before each position.
        """
        kind = torch.promote_types(target.dtype, torch.float32)
        target, readout = target.to(kind), readout.to(kind)
        log_p, log_r = target, readout
        if self.space != "logits" or self.plausibility is not None or getattr(self.schedule, "reads", True):
            log_p, log_r = target.log_softmax(-1), readout.log_softmax(-1)  # nothing else asks for normalised ones
        strength = (beta.to(kind)[:, None] * self.schedule(log_p, log_r, step))[..., None]  # [B, Q, 1]
        if self.space == "probs":
            strength = strength.clamp(0, 1)  # whatever a schedule's factor is: there are no negative probabilities
            mixed = torch.logaddexp(log_p + (1 - strength).log(), log_r + strength.log())
        else:
            first, second = (target, readout) if self.space == "logits" else (log_p, log_r)
            mixed = (1 - strength) * first + strength * second
            mixed = torch.where(strength == 1, second, mixed)  # 0 · (−∞) would be NaN
        mixed = torch.where(strength == 0, target, mixed)
        constrained = (beta != 0)[:, None, None]
        if self.candidates is not None and self.candidates < target.shape[-1]:
            least = target.topk(self.candidates, dim=-1).values[..., -1:]
            mixed = torch.where((target < least) & constrained, -math.inf, mixed)
        if self.plausibility is not None:
            least = log_p.amax(-1, keepdim=True) + math.log(self.plausibility)
            mixed = torch.where((log_p < least) & constrained, -math.inf, mixed)
        return mixed

    def mix_along(self, target: Tensor, readout: Tensor, first: int) -> Tensor:
        """Guided logits [Q, V] of tokens number ``first``, ``first + 1``, … of one answer, from logits [Q, V]."""
        step = torch.arange(first, first + len(target), device=target.device)[None]
        kind = torch.promote_types(target.dtype, torch.float32)
        beta = torch.tensor(self.betas(1), dtype=kind, device=target.device)
        return self.mix(target[None], readout[None], beta, step)[0]
