"""Arms: the ways to decode a task, and the table of decoders behind them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

from torch import Tensor

from dgd_lightning.decode.autoregressive import autoregressive_generate
from dgd_lightning.decode.blending import Blend, Schedule, Space, as_schedule
from dgd_lightning.decode.guided import as_readout, guided_generate
from dgd_lightning.decode.readouts import Readout
from dgd_lightning.decode.sampling import sampling_params
from dgd_lightning.decode.speculative import speculative_generate
from dgd_lightning.errors import InputError
from dgd_lightning.pair import Pair
from dgd_lightning.target.model import Target
from dgd_lightning.ttt.online import OnlineTTT
from dgd_lightning.types import DecodeOutput

Method = Literal["autoregressive", "speculative", "guided"]
GUIDANCE = ("beta", "readout", "space", "candidates", "plausibility", "schedule", "token_by_token")


@dataclass
class Arm:
    """One way to decode every task.

    Args:
        name: of its rows, curves and table line.
        method: ``autoregressive``, ``speculative``, or ``guided``: (1 − β)·target + β·readout.
        temperature: 0 for greedy decoding.
        top_k: draw among the k likeliest tokens only.
        top_p: draw among the smallest set of likeliest tokens with this mass only.
        block_size: K of speculative and guided decoding; None for the draft's own.
        scheme: how speculative decoding verifies above temperature 0.
        ttt: draft with the adapter of the task's context (``model.ttt`` says how it is made).
        online_every: go on adapting while a task is decoded, every so many tokens, two steps of ``model.ttt`` each,
            from the context's adapter where ``ttt`` is on; None does not. Tasks are then decoded one at a time.
        beta: β of guided decoding, which no other method has.
        readout: of guided decoding: ``draft``, or a class path (``LogitLens``, ``WithoutContext``, … or your own).
        space, candidates, plausibility, schedule: of guided decoding, see :class:`~dgd_lightning.Blend`.
        token_by_token: guided decoding without proposals: slower, the same law.
    """

    name: str
    method: Method = "speculative"
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    block_size: int | None = None
    scheme: Literal["rejection", "exact_match"] = "rejection"
    ttt: bool = False
    online_every: int | None = None
    beta: float | None = None
    readout: Readout | str = "draft"
    space: Space = "logits"
    candidates: int | None = None
    plausibility: float | None = None
    schedule: Schedule | None = None
    token_by_token: bool = False

    @property
    def drafts(self) -> bool:
        """Whether blocks are proposed."""
        return self.method == "speculative" or (self.method == "guided" and not self.token_by_token)

    def blend(self) -> Blend:
        """How a guided arm blends.

        Raises:
            InputError: a number that can't be used.
        """
        schedule = as_schedule(self.schedule)
        return Blend(
            self.beta if self.beta is not None else 0.0, self.space, self.candidates, self.plausibility, schedule
        )

    def settings(self) -> dict[str, Any]:
        """All that distinguishes the arm, as YAML would have it; objects by their class paths."""
        names = [field.name for field in fields(self) if self.method == "guided" or field.name not in GUIDANCE]
        return {name: plain(getattr(self, name)) for name in names}

    def sampling(self) -> dict[str, Any]:
        """The settings that shape the law of the output, whatever the method."""
        return {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}


def plain(value: Any) -> Any:
    """A value as YAML would have it: a readout or schedule is ``{class_path, init_args}``."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, Target):
        return value.model.name_or_path
    kind = type(value)
    names = [field.name for field in fields(value)] if is_dataclass(value) else list(vars(value))
    inner = {name: plain(getattr(value, name)) for name in names}
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": inner}


Decoder = Callable[..., list[DecodeOutput]]


def _speculative(
    pair: Pair, prompts: Sequence[Tensor], arm: Arm, *, seed: Sequence[int], online: OnlineTTT | None, **common: Any
) -> list[DecodeOutput]:
    knobs = {"block_size": arm.block_size, "scheme": arm.scheme, **common}
    if online is None:
        return speculative_generate(pair, prompts, seed=seed, **knobs)
    return [
        output
        for prompt, own in zip(prompts, seed, strict=True)
        for output in speculative_generate(pair, [prompt], seed=[own], online=online, **knobs)
    ]


def _autoregressive(
    pair: Pair, prompts: Sequence[Tensor], arm: Arm, *, online: None, **common: Any
) -> list[DecodeOutput]:
    return autoregressive_generate(pair, prompts, **common)


def _guided(pair: Pair, prompts: Sequence[Tensor], arm: Arm, *, online: None, **common: Any) -> list[DecodeOutput]:
    blend = arm.blend()
    return guided_generate(
        pair,
        prompts,
        beta=blend.beta,
        readout=arm.readout,
        speculative=not arm.token_by_token,
        block_size=None if arm.token_by_token else arm.block_size,
        space=blend.space,
        candidates=blend.candidates,
        plausibility=blend.plausibility,
        schedule=blend.schedule,
        **common,
    )


DECODERS: dict[str, Decoder] = {
    "autoregressive": _autoregressive,
    "speculative": _speculative,
    "guided": _guided,
}


def row_seed(seed: int, idx: str, arm: Arm) -> int:
    """A 63-bit seed of a task: it depends on the run's seed, the task and the sampling, not on batch, rank or order."""
    text = json.dumps([seed, idx, arm.sampling()], sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


def check_arms(arms: list[Arm], draft: str | None) -> None:
    """Raises:
    InputError: arms that share a name, lack what their method needs, or sample in an impossible way.
    """
    names = [arm.name for arm in arms]
    if not arms or len(set(names)) != len(names):
        raise InputError(
            "model.arms", expected="at least one arm, each with a name of its own", received=names, mend="rename them"
        )
    for arm in arms:
        if arm.method not in DECODERS:
            raise InputError(
                f"model.arms[{arm.name}].method",
                expected=f"one of {', '.join(DECODERS)}",
                received=arm.method,
                mend="use one",
            )
        _check_guidance(arm)
        if draft is None and (arm.drafts or (arm.method == "guided" and arm.readout == "draft")):
            raise InputError(
                "model.draft",
                expected=f"a draft, for arm {arm.name!r}",
                received="null",
                mend="name one, or drop the arm",
            )
        if arm.method == "autoregressive" and (arm.ttt or arm.online_every is not None):
            raise InputError(
                f"model.arms[{arm.name}].ttt",
                expected="no adaptation: autoregressive decoding uses no draft",
                received=f"ttt {arm.ttt}, online_every {arm.online_every}",
                mend="leave it out",
            )
        if arm.method == "guided" and arm.online_every is not None:
            raise InputError(
                f"model.arms[{arm.name}].online_every",
                expected="null: what is guided by a draft that changes while it decodes would depend on timing",
                received=arm.online_every,
                mend="leave it out; ttt: true adapts before decoding",
            )
        if arm.online_every is not None and arm.online_every < 1:
            raise InputError(
                f"model.arms[{arm.name}].online_every",
                expected="a positive integer or null",
                received=arm.online_every,
                mend="use e.g. 64",
            )
        if arm.method == "autoregressive" and arm.block_size is not None:
            raise InputError(
                f"model.arms[{arm.name}].block_size",
                expected="null: autoregressive decoding has no blocks",
                received=arm.block_size,
                mend="leave it out",
            )
        try:
            sampling_params(**arm.sampling())
        except InputError as error:
            raise error.named(f"model.arms[{arm.name}].{error.argument}") from error


def _check_guidance(arm: Arm) -> None:
    """Raises:
    InputError: a guided arm without β or with settings that can't work, or guidance in another arm.
    """
    where = f"model.arms[{arm.name}]"
    if arm.method != "guided":
        usual = Arm(arm.name)
        for name in GUIDANCE:
            if getattr(arm, name) != getattr(usual, name):
                raise InputError(
                    f"{where}.{name}",
                    expected="nothing: only method: guided has it",
                    received=getattr(arm, name),
                    mend="set method: guided, or leave it out",
                )
        return
    if arm.beta is None:
        raise InputError(f"{where}.beta", expected="a number", received="null", mend="use e.g. beta: 0.3")
    try:
        arm.blend()
        as_readout(arm.readout)
    except InputError as error:
        raise error.named(f"{where}.{error.argument}") from error


def check_ttt(arms: list[Arm], adapts: bool) -> None:
    """Raises:
    InputError: arms ask for adapters and nothing makes them, or the other way round.
    """
    asking = [arm.name for arm in arms if arm.ttt or arm.online_every is not None]
    if bool(asking) is not adapts:
        raise InputError(
            "model.ttt",
            expected="settings of test-time training: arms with ttt: true or online_every ask for them"
            if not adapts
            else "an arm with ttt: true or online_every to use them",
            received="null" if not adapts else f"arms {', '.join(arm.name for arm in arms)} without it",
            mend="set model.ttt, e.g. {steps: 10}" if not adapts else "set ttt: true in an arm, or model.ttt: null",
        )


def check_block_sizes(arms: list[Arm], trained: int) -> None:
    """Raises:
    InputError: an arm's blocks are longer than those the draft was trained with, or hold no proposal.
    """
    for arm in arms:
        if arm.block_size is not None and not 2 <= arm.block_size <= trained:
            raise InputError(
                f"model.arms[{arm.name}].block_size",
                expected=f"an integer from 2 to {trained}, the size the draft was trained with",
                received=arm.block_size,
                mend="leave it out for the trained size",
            )
