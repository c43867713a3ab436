"""What a run checks of its arms before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from dgd_lightning.decode.guided import as_readout
from dgd_lightning.decode.rerank import check_rerank
from dgd_lightning.decode.sampling import sampling_params
from dgd_lightning.errors import InputError
from dgd_lightning.modules.arms import GUIDANCE, RERANK, Arm, Method


def check_arms(arms: list[Arm], draft: str | None) -> None:
    """Raises:
    InputError: arms that share a name, lack what their method needs, or sample in an impossible way.
    """
    names = [arm.name for arm in arms]
    if not arms or len(set(names)) != len(names):
        raise InputError(
            "model.arms", expected="at least one arm, each with a name of its own", received=names, hint="rename them"
        )
    for arm in arms:
        _check_knobs(arm)
        if draft is None and _needs_draft(arm):
            raise InputError(
                "model.draft",
                expected=f"a draft, for arm {arm.name!r}",
                received="null",
                hint="name one, or drop the arm",
            )
        try:
            _check_values(arm)
        except InputError as error:
            raise error.named(f"model.arms[{arm.name}].{error.argument}") from error


def _check_knobs(arm: Arm) -> None:
    """Raises:
    InputError: an unknown method, or a knob that the arm's method does not have.
    """
    where, method = f"model.arms[{arm.name}]", arm.method
    if method not in get_args(Method):
        raise InputError(
            f"{where}.method", expected=f"one of {', '.join(get_args(Method))}", received=method, hint="use one"
        )
    if method == "autoregressive" and (arm.ttt or arm.online_every is not None):
        raise InputError(
            f"{where}.ttt",
            expected="no adaptation: autoregressive decoding uses no draft",
            received=f"ttt {arm.ttt}, online_every {arm.online_every}",
            hint="leave it out",
        )
    if method == "autoregressive" and arm.block_size is not None:
        raise InputError(
            f"{where}.block_size",
            expected="null: autoregressive decoding has no blocks",
            received=arm.block_size,
            hint="leave it out",
        )
    if method in ("guided", "rerank") and arm.online_every is not None:
        raise InputError(
            f"{where}.online_every",
            expected="null: what is guided by a draft that changes while it decodes would depend on timing"
            if method == "guided"
            else "null: answers are decoded together, which online adaptation is not",
            received=arm.online_every,
            hint="leave it out; ttt: true adapts before decoding",
        )
    if method not in ("guided", "rerank"):
        _refuse(arm, GUIDANCE, "only method: guided and method: rerank blend", "set one of them, or leave it out")
    if method != "guided":
        _refuse(arm, ["token_by_token"], "only method: guided has it", "set method: guided, or leave it out")
    if method != "rerank":
        _refuse(arm, RERANK, "only method: rerank has it", "set method: rerank, or leave it out")
        return
    if not arm.blends:
        hint = "set rank_by: blend or betas, or leave it out"
        _refuse(arm, GUIDANCE, "only answers of betas and rank_by: blend use it", hint)
    if arm.rank_by != "blend":
        _refuse(arm, ["beta"], "the answers have the β of betas, and no blend ranks", "leave it out")
    if arm.betas is not None:
        _refuse(arm, ["num_answers"], "there is one answer per β of betas", "leave it out, or leave betas out")


def _refuse(arm: Arm, names: Sequence[str], why: str, hint: str) -> None:
    """Raises:
    InputError: one of these knobs is set.
    """
    usual = Arm(arm.name)
    for name in names:
        if (value := getattr(arm, name)) != getattr(usual, name):
            raise InputError(f"model.arms[{arm.name}].{name}", expected=f"nothing: {why}", received=value, hint=hint)


def _needs_draft(arm: Arm) -> bool:
    if arm.method == "rerank" and (arm.ttt or arm.block_size is not None):
        return True
    return (arm.drafts and arm.method != "rerank") or (arm.blends and arm.readout == "draft")


def _check_values(arm: Arm) -> None:
    """Raises:
    InputError: a number or an object that can't work; it is named as in the arm.
    """
    blend = None
    if arm.blends:
        if arm.beta is None and (arm.method == "guided" or arm.rank_by == "blend"):
            raise InputError("beta", expected="a number", received="null", hint="use e.g. beta: 0.3")
        blend = arm.blend()
        as_readout(arm.readout)
    if arm.method == "rerank":
        check_rerank(arm.rank_by, arm.num_answers, arm.betas, blend, arm.temperature)
    if arm.online_every is not None and arm.online_every < 1:
        raise InputError(
            "online_every", expected="a positive integer or null", received=arm.online_every, hint="use e.g. 64"
        )
    sampling_params(**arm.sampling())


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
            hint="set model.ttt, e.g. {steps: 10}" if not adapts else "set ttt: true in an arm, or model.ttt: null",
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
                hint="leave it out for the trained size",
            )
