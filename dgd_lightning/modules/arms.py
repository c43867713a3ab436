"""Arms: the ways to decode a task, and the table of decoders behind them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from dgd_lightning.decode.autoregressive import autoregressive_generate
from dgd_lightning.decode.sampling import sampling_params
from dgd_lightning.decode.speculative import speculative_generate
from dgd_lightning.errors import InputError
from dgd_lightning.pair import Pair
from dgd_lightning.ttt.online import OnlineTTT
from dgd_lightning.types import DecodeOutput

Method = Literal["autoregressive", "speculative"]


@dataclass
class Arm:
    """One way to decode every task.

    Args:
        name: of its rows, curves and table line.
        method: ``autoregressive`` or ``speculative``.
        temperature: 0 for greedy decoding.
        top_k: draw among the k likeliest tokens only.
        top_p: draw among the smallest set of likeliest tokens with this mass only.
        block_size: K of speculative decoding; None for the draft's own.
        scheme: how speculative decoding verifies above temperature 0.
        ttt: draft with the adapter of the task's context (``model.ttt`` says how it is made).
        online_every: go on adapting while a task is decoded, every so many tokens, two steps of ``model.ttt`` each,
            from the context's adapter where ``ttt`` is on; None does not. Tasks are then decoded one at a time.
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

    def sampling(self) -> dict[str, Any]:
        """The settings that shape the law of the output, whatever the method."""
        return {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}


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


DECODERS: dict[str, Decoder] = {"autoregressive": _autoregressive, "speculative": _speculative}


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
        if arm.method == "speculative" and draft is None:
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
            raise InputError(
                f"model.arms[{arm.name}].{error.argument}",
                expected=error.expected,
                received=error.received,
                mend=error.mend,
            ) from error


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
