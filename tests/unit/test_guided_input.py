"""Guided decoding: what the package offers, and one clear error for what it can't use."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny import make_draft, make_pair, make_target

import dgd_lightning
from dgd_lightning.decode.blending import Adaptive, Constant, Disagree, WarmUp
from dgd_lightning.decode.readouts.dola import DoLa
from dgd_lightning.decode.readouts.draft import DraftReadout
from dgd_lightning.decode.readouts.logit_lens import LogitLens
from dgd_lightning.decode.readouts.matched_entropy import MatchedEntropy
from dgd_lightning.decode.readouts.noise import Noise
from dgd_lightning.decode.readouts.other_model import OtherModel
from dgd_lightning.decode.readouts.without_context import WithoutContext
from dgd_lightning.errors import InputError
from dgd_lightning.methods.guided import guided_generate
from dgd_lightning.pair import Pair


def test_the_package_offers_it() -> None:
    assert dgd_lightning.guided_generate is guided_generate
    for name in (
        "Blend",
        "DraftReadout",
        "LogitLens",
        "DoLa",
        "WithoutContext",
        "OtherModel",
        "Noise",
        "MatchedEntropy",
    ):
        assert name in dgd_lightning.__all__
        assert callable(getattr(dgd_lightning, name))
    for schedule in (Constant, WarmUp, Disagree, Adaptive):
        assert getattr(dgd_lightning, schedule.__name__) is schedule


SHORT = [torch.tensor([2])]
BAD: list[tuple[str, dict[str, Any]]] = [
    ("beta", {"beta": math.nan}),
    ("beta", {"beta": math.inf}),
    ("beta", {"beta": [0.1, -math.inf]}),
    ("beta", {"beta": "0.3"}),
    ("beta", {"beta": None}),
    ("beta", {"beta": True}),
    ("beta", {"beta": []}),
    ("beta", {"beta": [0.1, 0.2, 0.3]}),
    ("beta", {"beta": -0.1, "space": "probs"}),
    ("space", {"space": "probabilities"}),
    ("candidates", {"candidates": 0}),
    ("candidates", {"candidates": 2.0}),
    ("plausibility", {"plausibility": 0.0}),
    ("plausibility", {"plausibility": 1.1}),
    ("plausibility", {"plausibility": math.nan}),
    ("schedule", {"schedule": "js"}),
    ("schedule", {"schedule": Adaptive}),
    ("readout", {"readout": "drafts"}),
    ("readout", {"readout": None}),
    ("readout", {"readout": DraftReadout}),
    (r"readout\.block_size", {"readout": DraftReadout(block_size=5)}),
    (r"readout\.layer", {"readout": LogitLens(4)}),
    (r"readout\.layer", {"readout": LogitLens(-1)}),
    (r"readout\.layer", {"readout": LogitLens(1.0)}),  # type: ignore[arg-type]
    (r"readout\.layer_ids", {"readout": DoLa((1, 4))}),
    (r"readout\.layer_ids", {"readout": DoLa(())}),
    (r"readout\.layer_ids", {"readout": DoLa(3)}),  # type: ignore[arg-type]
    (r"readout\.prompts", {"readout": WithoutContext()}),
    (r"readout\.prompts", {"readout": WithoutContext(SHORT)}),
    (r"readout\.prompts", {"readout": Noise(WithoutContext(SHORT))}),
    (r"readout\.prompts\[1\]", {"readout": WithoutContext([*SHORT, torch.tensor([], dtype=torch.long)])}),
    (r"readout\.prompts\[1\]", {"readout": WithoutContext([*SHORT, torch.tensor([64])])}),
    (r"readout\.prompts\[0\]", {"readout": WithoutContext(["a", "b"])}),  # type: ignore[list-item]
    ("block_size", {"block_size": 9}),
    ("temperature", {"temperature": -1.0}),
    (r"prompts\[0\]", {"prompts": [torch.tensor([64]), torch.tensor([1])]}),
]


@pytest.mark.parametrize(("name", "change"), BAD)
def test_bad_input(name: str, change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"prompts": [torch.tensor([1, 2]), torch.tensor([3])], "beta": 0.3, "max_new_tokens": 4}
    with pytest.raises(InputError, match=f"^{name}: expected .*, received .*Hint: ") as error:
        guided_generate(make_pair(), **(arguments | change))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "settings"), [("block_size", {"block_size": 1}), ("features", {"features": "none"})])
def test_a_readouts_bad_settings_are_named_where_it_is_made(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=rf"^readout\.{name}: expected .*, received .*Hint: "):
        DraftReadout(**settings)


def test_bad_pairs() -> None:
    pair, prompts = make_pair(), [torch.tensor([1, 2])]
    alone = Pair(pair.target, None, None)
    for readout in ("draft", Noise(), MatchedEntropy(), DraftReadout(features="random")):
        with pytest.raises(InputError, match=r"^readout: expected a pair with a draft, received a target alone"):
            guided_generate(alone, prompts, beta=0.3, readout=readout, max_new_tokens=4, speculative=False)
    with pytest.raises(InputError, match=r"^pair: expected a pair with a draft"):
        guided_generate(alone, prompts, beta=0.3, readout=LogitLens(2), max_new_tokens=4)
    narrow = Pair(pair.target, make_draft(pair.target).float(), None)
    with pytest.raises(InputError, match=r"^draft_dtype: expected torch.float64"):
        guided_generate(narrow, prompts, beta=0.3, max_new_tokens=4, speculative=False)
    other = OtherModel(make_target(vocab_size=65))
    with pytest.raises(
        InputError, match=r"^readout\.model: expected the target's vocabulary of 64 tokens, received 65"
    ):
        guided_generate(pair, prompts, beta=0.3, readout=other, max_new_tokens=4)
    small = OtherModel(make_target(max_position_embeddings=32))
    with pytest.raises(InputError, match=r"^readout: expected prompts that leave 31 of the model's 32 positions"):
        guided_generate(pair, prompts, beta=0.3, readout=small, max_new_tokens=31)
    assert len(guided_generate(pair, prompts, beta=0.3, readout=small, max_new_tokens=30)[0].tokens) == 30
