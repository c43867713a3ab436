"""Arms: knobs in the wrong method are named, which arms are decoded together, and what their settings say."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from dgd_lightning.modules.arm_checks import check_arms
from dgd_lightning.modules.decoders import joined
from dgd_lightning.modules.pairing import control_of

from dgd_lightning.decode.controls import Noise
from dgd_lightning.decode.readouts import LogitLens
from dgd_lightning.errors import InputError
from dgd_lightning.modules.arms import Arm
from dgd_lightning.modules.decoding import Decoding
from dgd_lightning.ttt.config import TTTConfig


def rerank(**knobs: Any) -> dict[str, Any]:
    return {"method": "rerank", "temperature": 1.0, **knobs}


@pytest.mark.parametrize(
    ("knobs", "argument", "words"),
    [
        ({"method": "guided", "beta": 0.3, "rank_by": "target"}, "rank_by", "method: rerank"),
        ({"num_answers": 4}, "num_answers", "method: rerank"),
        ({"method": "autoregressive", "betas": [0.1]}, "betas", "method: rerank"),
        ({"beta": 0.3}, "beta", "method: guided"),
        ({"candidates": 5}, "candidates", "method: guided"),
        ({"token_by_token": True}, "token_by_token", "method: guided"),
        (rerank(token_by_token=True), "token_by_token", "method: guided"),
        (rerank(rank_by="votes"), "rank_by", "likelihood"),
        (rerank(rank_by="blend"), "beta", "a number"),
        (rerank(beta=0.3), "beta", "rank_by: blend"),
        (rerank(readout=LogitLens(1)), "readout", "rank_by: blend"),
        (rerank(candidates=5), "candidates", "rank_by: blend"),
        (rerank(betas=[0.1], beta=0.3), "beta", "betas"),
        (rerank(betas=[0.1], num_answers=4), "num_answers", "one answer per β"),
        (rerank(betas=[]), "betas", "at least one"),
        (rerank(betas=[0.1, float("nan")]), "betas", "finite"),
        (rerank(betas=[1.5], space="probs"), "betas", "0 … 1"),
        (rerank(betas=[0.5], plausibility=2.0), "plausibility", "(0, 1]"),
        (rerank(rank_by="blend", beta=0.3, readout="drfat"), "readout", "draft, or a Readout"),
        (rerank(num_answers=0), "num_answers", "at least 1"),
        (rerank(temperature=0.0), "temperature", "above 0"),
        (rerank(top_p=2.0), "top_p", ""),
        (rerank(online_every=8), "online_every", "ttt: true"),
        ({"method": "votes"}, "method", "rerank"),
    ],
)
def test_what_an_arm_cannot_have_is_named(knobs: dict[str, Any], argument: str, words: str) -> None:
    with pytest.raises(InputError) as error:
        check_arms([Arm("good"), Arm("bad", **knobs)], "draft")
    assert error.value.argument == f"model.arms[bad].{argument}"
    assert words in str(error.value)


FINE: list[dict[str, Any]] = [
    rerank(),
    rerank(rank_by="target", num_answers=2),
    rerank(rank_by="blend", beta=-0.5, readout=LogitLens(1), candidates=50, plausibility=0.1),
    {"method": "rerank", "betas": [0.0, 0.5], "readout": LogitLens(1)},  # greedy
    rerank(betas=[0.0, 0.5], rank_by="blend", beta=0.3, readout=LogitLens(1)),
]


@pytest.mark.parametrize("knobs", FINE)
def test_reranking_needs_a_draft_only_where_it_uses_one(knobs: dict[str, Any]) -> None:
    check_arms([Arm("x", **knobs)], "draft")
    check_arms([Arm("x", **knobs)], None)
    for more in ({"ttt": True}, {"block_size": 4}, {"readout": "draft", "betas": [0.1]}):
        drafting = {**knobs, **more}
        drafting |= {"num_answers": 8}
        with pytest.raises(InputError, match=r"^model\.draft: expected a draft, for arm 'x'"):
            check_arms([Arm("x", **drafting)], None)


def test_settings_of_other_methods_stay_as_they_were() -> None:
    """They are part of the configuration's hash, with which runs are continued, and of every row."""
    common = ["name", "method", "temperature", "top_k", "top_p", "block_size", "scheme", "ttt", "online_every"]
    guidance = ["beta", "readout", "space", "candidates", "plausibility", "schedule"]
    assert list(Arm("x").settings()) == common
    assert list(Arm("x", "autoregressive").settings()) == common
    assert list(Arm("x", "guided", beta=0.3).settings()) == [*common, *guidance, "token_by_token"]
    own = [*common, "rank_by", "num_answers", "betas", "guidance"]
    plain, blending = (Arm("x", **knobs).settings() for knobs in (rerank(), rerank(rank_by="blend", beta=0.3)))
    assert list(plain) == list(blending) == own
    assert plain["guidance"] is None
    assert list(blending["guidance"]) == guidance


def test_the_hash_knows_of_joined_arms_only_where_they_are_joined() -> None:
    arms = [Arm("target", "autoregressive"), Arm("a", "guided", beta=0.1), Arm("b", "guided", beta=0.2)]
    apart, together = (Decoding("lab", "lab", arms, join_arms=join).fingerprint() for join in (False, True))
    assert set(apart) == {"target", "draft", "second_models", "arms", "settings", "ttt", "reuse_prefix"}
    assert together == {**apart, "join_arms": True}


def test_the_hash_knows_of_rehearsals_written_together_only_where_it_is_set() -> None:
    arms = [Arm("adapted", ttt=True)]
    before, after = (
        Decoding("lab", "lab", arms, ttt=TTTConfig(validation_batch=batch)).fingerprint()["ttt"] for batch in (None, 3)
    )
    assert after == {**before, "validation_batch": 3}
    digest = hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()
    assert digest[:16] == "e13c400c4f034817"  # of runs since 2026-11-24


def test_arms_share_a_batch_where_they_draw_draft_and_adapt_alike() -> None:
    arms = [
        Arm("target", "autoregressive"),
        Arm("a", "guided", beta=0.1),
        Arm("warm", "guided", beta=0.1, temperature=0.7),
        Arm("slow", "guided", beta=0.1, token_by_token=True),
        Arm("b", "guided", beta=-0.1, readout=Noise(), space="log_probs", candidates=3, plausibility=0.1),
        Arm("small", "guided", beta=0.1, block_size=3),
        Arm("top", "guided", beta=0.1, temperature=0.7, top_k=5),
        Arm("adapted", "guided", beta=0.1, ttt=True),
        Arm("fast"),
        Arm("warm too", "guided", beta=0.3, temperature=0.7),
        Arm("best", "rerank", temperature=0.7),
        Arm("adapted too", "guided", beta=0.3, ttt=True),
        Arm("slow too", "guided", beta=0.3, token_by_token=True),
    ]
    names = [[arm.name for arm in group] for group in joined(arms, True)]
    assert names == [
        ["target"],
        ["a", "b"],
        ["warm", "warm too"],
        ["slow", "slow too"],
        ["small"],
        ["top"],
        ["adapted", "adapted too"],
        ["fast"],
        ["best"],
    ]
    assert joined(arms, False) == [[arm] for arm in arms]


def test_a_reranking_blend_has_null_controls_too() -> None:
    arms = [
        Arm("drawn", **rerank()),
        Arm("draft", **rerank(rank_by="blend", beta=0.3)),
        Arm("noise", **rerank(rank_by="blend", beta=0.3, readout=Noise())),
        Arm("other", **rerank(rank_by="blend", beta=0.4, readout=Noise())),
        Arm("guided", "guided", beta=0.3, temperature=1.0),
    ]
    assert control_of(arms) == {"noise": "draft"}
