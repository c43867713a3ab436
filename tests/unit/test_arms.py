"""Methods and arms: settings that can't be are named, which arms are decoded together, what their settings say."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dgd_lightning.decode.call import Call
from dgd_lightning.decode.readouts.logit_lens import LogitLens
from dgd_lightning.decode.readouts.noise import Noise
from dgd_lightning.errors import InputError
from dgd_lightning.methods.autoregressive import Autoregressive
from dgd_lightning.methods.base import Method
from dgd_lightning.methods.guided import Guided
from dgd_lightning.methods.rerank import Rerank
from dgd_lightning.methods.speculative import Speculative
from dgd_lightning.modules.arms import Arm, check_arms, control_of, described, joined
from dgd_lightning.modules.decoding import Decoding
from dgd_lightning.pair import Pair
from dgd_lightning.ttt.config import TTTConfig
from dgd_lightning.types import DecodeOutput


@pytest.mark.parametrize(
    ("make", "argument", "words"),
    [
        (lambda: Speculative(block_size=1), "block_size", "at least 2"),
        (lambda: Speculative(scheme="votes"), "scheme", "exact_match"),  # type: ignore[arg-type]
        (lambda: Guided("much"), "beta", "a finite number"),  # type: ignore[arg-type]
        (lambda: Guided(0.3, block_size=4, speculative=False), "block_size", "nothing is proposed"),
        (lambda: Guided(0.3, readout="drfat"), "readout", "draft, or a Readout"),
        (lambda: Guided(0.3, plausibility=2.0), "plausibility", ""),
        (lambda: Rerank("votes"), "rank_by", "likelihood"),  # type: ignore[arg-type]
        (lambda: Rerank("blend"), "beta", "a number"),
        (lambda: Rerank(beta=0.3), "beta", "rank_by: blend"),
        (lambda: Rerank(readout=LogitLens(1)), "readout", "rank_by: blend"),
        (lambda: Rerank(candidates=5), "candidates", "rank_by: blend"),
        (lambda: Rerank(betas=[0.1], beta=0.3), "beta", "betas"),
        (lambda: Rerank(betas=[0.1], num_answers=4), "num_answers", "one answer per β"),
        (lambda: Rerank(betas=[]), "betas", "at least one"),
        (lambda: Rerank(betas=[0.1, float("nan")]), "betas", "finite"),
        (lambda: Rerank(betas=[1.5], space="probs"), "betas", "1"),
        (lambda: Rerank(betas=[0.5], plausibility=2.0), "plausibility", ""),
        (lambda: Rerank("blend", beta=0.3, readout="drfat"), "readout", "draft, or a Readout"),
        (lambda: Rerank(num_answers=0), "num_answers", "at least 1"),
    ],
)
def test_a_methods_bad_setting_is_named(make: Callable[[], Method], argument: str, words: str) -> None:
    with pytest.raises(InputError) as error:
        make()
    assert error.value.argument == argument
    assert words in str(error.value)


class NoDataclass(Method):
    """Its settings could not be written down."""

    def generate(self, pair: Pair, prompts: Sequence[Tensor], call: Call) -> list[DecodeOutput]:
        return Autoregressive().generate(pair, prompts, call)


@pytest.mark.parametrize(
    ("bad", "argument", "words"),
    [
        (Arm("bad", Rerank()), "temperature", "above 0"),
        (Arm("bad", Rerank(), temperature=1.0, top_p=2.0), "top_p", ""),
        (Arm("bad", Rerank(), temperature=1.0, online_every=8), "online_every", "ttt: true"),
        (Arm("bad", Guided(0.3), online_every=8), "online_every", "ttt: true"),
        (Arm("bad", Speculative(), online_every=0), "online_every", "at least 1"),
        (Arm("bad", Autoregressive(), ttt=True), "ttt", "uses no draft"),
        (Arm("bad", Autoregressive(), online_every=8), "online_every", "uses no draft"),
        (Arm("bad", Guided([0.1, 0.2])), "beta", "an arm for each"),
        (Arm("bad", "guided"), "method", "class_path"),  # type: ignore[arg-type]
        (Arm("bad", NoDataclass()), "method", "dataclass"),
    ],
)
def test_what_an_arm_cannot_have_is_named(bad: Arm, argument: str, words: str) -> None:
    with pytest.raises(InputError) as error:
        check_arms([Arm("good", Speculative()), bad], "draft")
    assert error.value.argument == f"model.arms[bad].{argument}"
    assert words in str(error.value)


FINE = [
    Rerank(),
    Rerank("target", num_answers=2),
    Rerank("blend", beta=-0.5, readout=LogitLens(1), candidates=50, plausibility=0.1),
    Rerank(betas=[0.0, 0.5], readout=LogitLens(1)),
    Rerank("blend", betas=[0.0, 0.5], beta=0.3, readout=LogitLens(1)),
]


@pytest.mark.parametrize("method", FINE)
def test_reranking_needs_a_draft_only_where_it_uses_one(method: Rerank) -> None:
    check_arms([Arm("x", method, temperature=1.0)], "draft")
    check_arms([Arm("x", method, temperature=1.0)], None)
    needing = [
        Arm("x", method, temperature=1.0, ttt=True),
        Arm("x", Rerank(block_size=4), temperature=1.0),
        Arm("x", Rerank(betas=[0.1]), temperature=1.0),
        Arm("x", Guided(0.1, speculative=False)),
        Arm("x", Guided(0.1, readout=Noise(), speculative=False)),
        Arm("x", Guided(0.1, readout=LogitLens(1))),
    ]
    for arm in needing:
        with pytest.raises(InputError, match=r"^model\.draft: expected a draft, for arm 'x'"):
            check_arms([arm], None)
    check_arms([Arm("x", Guided(0.1, readout=LogitLens(1), speculative=False))], None)


def test_rows_say_the_facts_that_others_ask_for() -> None:
    """They are part of the configuration's hash, with which runs are continued, and of every row."""
    keys = ["method", "settings", "lossless", "baseline", "blends", "temperature", "top_k", "top_p", "ttt"]
    facts = {arm.method.name: arm.settings() for arm in (Arm("a", Autoregressive()), Arm("b", Speculative()))}
    facts |= {arm.method.name: arm.settings() for arm in (Arm("c", Guided(0.3)), Arm("d", Rerank()))}
    assert all(list(found) == [*keys, "online_every"] for found in facts.values())
    assert [facts[name]["lossless"] for name in facts] == [True, True, False, False]
    assert [facts[name]["baseline"] for name in facts] == [True, False, False, False]
    assert [facts[name]["blends"] for name in facts] == [False, False, True, False]
    assert Rerank("blend", beta=0.3).blends
    assert facts["Guided"]["settings"] == {
        "beta": 0.3, "readout": "draft", "speculative": True, "block_size": None, "space": "logits",
        "candidates": None, "plausibility": None, "schedule": None,
    }  # fmt: skip
    assert set(facts["Rerank"]["settings"]) == {"rank_by", "num_answers", "betas", "block_size"}  # nothing blends


def test_an_arm_is_described_in_a_line() -> None:
    assert Arm("plain", Autoregressive()).describe() == "plain: Autoregressive; greedy"
    guided = Arm("g", Guided(0.3, readout=LogitLens(2)), temperature=0.7, top_p=0.9, ttt=True)
    assert guided.describe() == ("g: Guided, beta 0.3, readout LogitLens(layer=2); temperature 0.7, top_p 0.9; ttt")
    noise = Arm("n", Guided(0.3, readout=Noise(LogitLens(2)), space="probs"))
    assert noise.describe() == "n: Guided, beta 0.3, readout Noise(like=LogitLens(layer=2)), space probs; greedy"
    assert Arm("m", Guided(0.3, readout=Noise())).describe() == "m: Guided, beta 0.3, readout Noise; greedy"
    online = Arm("o", Speculative(block_size=4), online_every=8)
    assert online.describe() == "o: Speculative, block_size 4; greedy; adapts every 8 tokens"


def test_the_hash_knows_how_validation_texts_are_written_only_where_it_is_set() -> None:
    arms = [Arm("adapted", Speculative(), ttt=True)]
    before, after = (
        Decoding("lab", "lab", arms, ttt=TTTConfig(validation_batch=batch)).fingerprint()["ttt"] for batch in (None, 3)
    )
    assert after == {**before, "validation_batch": 3}
    assert len(hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()) == 64  # it is JSON


def test_the_hash_knows_of_every_setting() -> None:
    def digest(arms: list[Arm] | None = None, **changes: Any) -> str:
        arms = arms or [Arm("a", Guided(0.1))]
        return json.dumps(Decoding("lab", "lab", arms, **changes).fingerprint(), sort_keys=True)

    changes: list[dict[str, Any]] = [
        {"join_arms": True}, {"reuse_prefix": False}, {"max_new_tokens": 5}, {"seed": 1}, {"too_long": "skip"},
        {"stop_token_ids": []}, {"dtype": "float32"}, {"enable_thinking": True}, {"divergence": None},
    ]  # fmt: skip
    usual = digest()
    assert usual == digest(warmup=False, cpu_threads=1, save_adapters=False)  # no row hangs on these
    assert all((digest(**change) != usual) is (change != {"divergence": None}) for change in changes)
    assert digest([Arm("a", Guided(0.2))]) != usual != digest([Arm("b", Guided(0.1))])


def test_arms_share_a_batch_where_they_draw_draft_and_adapt_alike() -> None:
    arms = [
        Arm("target", Autoregressive()),
        Arm("a", Guided(0.1)),
        Arm("warm", Guided(0.1), temperature=0.7),
        Arm("slow", Guided(0.1, speculative=False)),
        Arm("b", Guided(-0.1, readout=Noise(), space="log_probs", candidates=3, plausibility=0.1)),
        Arm("small", Guided(0.1, block_size=3)),
        Arm("top", Guided(0.1), temperature=0.7, top_k=5),
        Arm("adapted", Guided(0.1), ttt=True),
        Arm("fast", Speculative()),
        Arm("warm too", Guided(0.3), temperature=0.7),
        Arm("best", Rerank(), temperature=0.7),
        Arm("adapted too", Guided(0.3), ttt=True),
        Arm("slow too", Guided(0.3, speculative=False)),
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


@dataclass(frozen=True)
class Online(Guided):
    """A subclass that takes hooks and decodes in its own way."""

    online = True

    def generate(self, pair: Pair, prompts: Sequence[Tensor], call: Call) -> list[DecodeOutput]:
        raise NotImplementedError


@dataclass(frozen=True)
class Quieter(Guided):
    """One that only differs in a name."""

    online = True


def test_a_subclass_is_joined_only_where_it_decodes_alike() -> None:
    apart = [Arm("a", Online(0.1)), Arm("b", Online(0.2))]
    assert joined(apart, True) == [[apart[0]], [apart[1]]]
    hooked = [Arm("a", Quieter(0.1), online_every=8), Arm("b", Quieter(0.2)), Arm("c", Quieter(0.3), online_every=8)]
    assert [[arm.name for arm in group] for group in joined(hooked, True)] == [["a", "c"], ["b"]]


@dataclass(frozen=True)
class Holder(Method):
    """A method with settings of all kinds."""

    value: Any

    def generate(self, pair: Pair, prompts: Sequence[Tensor], call: Call) -> list[DecodeOutput]:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1}, {"a": 2}),
        ({1, 2}, {1, 3}),
        (Path("a"), Path("b")),
        (torch.tensor([1.0]), torch.tensor([2.0])),
        ([LogitLens(1)], [LogitLens(2)]),
    ],
)
def test_settings_that_differ_are_told_apart_in_hashes(one: Any, other: Any) -> None:
    first, again, second = (json.dumps(Holder(value).settings()) for value in (one, one, other))
    assert first == again != second


def test_settings_that_no_row_can_hold_are_refused() -> None:
    for value in (len, object(), torch.nn.Linear(1, 1)):
        with pytest.raises(InputError, match=r"^settings: expected numbers, texts, .*received a "):
            Holder(value).settings()


def test_null_controls_are_paired_with_what_they_imitate() -> None:
    arms = [
        Arm("drawn", Rerank(), temperature=1.0),
        Arm("draft", Rerank("blend", beta=0.3), temperature=1.0),
        Arm("noise", Rerank("blend", beta=0.3, readout=Noise()), temperature=1.0),
        Arm("other", Rerank("blend", beta=0.4, readout=Noise()), temperature=1.0),
        Arm("guided", Guided(0.3), temperature=1.0),
        Arm("guided noise", Guided(0.3, readout=Noise(seed=7)), temperature=1.0),
        Arm("greedy noise", Guided(0.3, readout=Noise())),
    ]
    assert control_of(arms) == {"noise": "draft", "guided noise": "guided"}
    assert [line.split(" is ")[0] for line in described(arms)[len(arms) :]] == ["arm other", "arm greedy noise"]
