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
    """

    name: str
    method: Method = "speculative"
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    block_size: int | None = None
    scheme: Literal["rejection", "exact_match"] = "rejection"

    def sampling(self) -> dict[str, Any]:
        """The settings that shape the law of the output, whatever the method."""
        return {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}


Decoder = Callable[..., list[DecodeOutput]]


def _speculative(pair: Pair, prompts: Sequence[Tensor], arm: Arm, **common: Any) -> list[DecodeOutput]:
    return speculative_generate(pair, prompts, block_size=arm.block_size, scheme=arm.scheme, **common)


def _autoregressive(pair: Pair, prompts: Sequence[Tensor], arm: Arm, **common: Any) -> list[DecodeOutput]:
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
