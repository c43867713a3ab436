"""The decoders behind the arms, and which arms are decoded together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from dgd_lightning.decode.autoregressive import autoregressive_generate
from dgd_lightning.decode.guided import Guidance, guided_generate, guided_sweep
from dgd_lightning.decode.prefix import PrefixCache
from dgd_lightning.decode.rerank import rerank_generate
from dgd_lightning.decode.speculative import speculative_generate
from dgd_lightning.modules.arms import Arm
from dgd_lightning.pair import Pair
from dgd_lightning.ttt.online import OnlineTTT
from dgd_lightning.types import DecodeOutput

Decoder = Callable[..., list[DecodeOutput]]


def _speculative(
    pair: Pair,
    prompts: Sequence[Tensor],
    arm: Arm,
    *,
    seed: Sequence[int],
    online: OnlineTTT | None,
    prefixes: Sequence[PrefixCache | None] | None,
    **common: Any,
) -> list[DecodeOutput]:
    knobs = {"block_size": arm.block_size, "scheme": arm.scheme, **common}
    if online is None:
        return speculative_generate(pair, prompts, seed=seed, prefixes=prefixes, **knobs)
    begins = prefixes or [None] * len(prompts)
    return [
        output
        for prompt, own, known in zip(prompts, seed, begins, strict=True)
        for output in speculative_generate(pair, [prompt], seed=[own], prefixes=[known], online=online, **knobs)
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


def _rerank(pair: Pair, prompts: Sequence[Tensor], arm: Arm, *, online: None, **common: Any) -> list[DecodeOutput]:
    return rerank_generate(
        pair,
        prompts,
        rank_by=arm.rank_by,
        num_answers=arm.num_answers,
        betas=arm.betas,
        blend=arm.blend() if arm.blends else None,
        readout=arm.readout,
        block_size=arm.block_size,
        **common,
    )


DECODERS: dict[str, Decoder] = {
    "autoregressive": _autoregressive,
    "speculative": _speculative,
    "guided": _guided,
    "rerank": _rerank,
}


def joined(arms: Sequence[Arm], join: bool) -> list[list[Arm]]:
    """Arms that are decoded in one batch, in the order of the first of each: without ``join`` every arm by itself.

    Guided arms can share a batch where they draw, draft and adapt alike; β, readouts, spaces, constraints and
    schedules are each arm's own.
    """
    groups: dict[Any, list[Arm]] = {}
    for arm in arms:
        alike = (*arm.sampling().values(), arm.ttt, arm.token_by_token, arm.block_size)
        groups.setdefault(alike if join and arm.method == "guided" else arm.name, []).append(arm)
    return list(groups.values())


def decode(
    pair: Pair, prompts: Sequence[Tensor], arms: Sequence[Arm], *, online: OnlineTTT | None, **common: Any
) -> list[list[DecodeOutput]]:
    """Outputs of each arm.

    Args:
        pair, prompts: as everywhere; the draft with the adapter that the arms use.
        arms: one, or guided ones that :func:`joined` put together.
        online: how a speculative arm goes on adapting.
        common: what all decoders take, sampling apart.
    """
    first = arms[0]
    if len(arms) == 1:
        return [DECODERS[first.method](pair, prompts, first, online=online, **common, **first.sampling())]
    return guided_sweep(
        pair,
        prompts,
        [Guidance(arm.blend(), arm.readout) for arm in arms],
        speculative=not first.token_by_token,
        block_size=None if first.token_by_token else first.block_size,
        **common,
        **first.sampling(),
    )
