"""Logits that are no numbers stop a run with one line; what no row commits may be anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from decode_tools import random_prompts
from tiny import make_pair, make_target
from torch import Tensor

from dgd_lightning.decode.blending import Blend
from dgd_lightning.decode.drafter import Drafter
from dgd_lightning.decode.readouts.base import Readout, ReadoutState, Stateless
from dgd_lightning.decode.readouts.dola import DoLa
from dgd_lightning.decode.readouts.draft import DraftReadout, DraftSlots
from dgd_lightning.decode.readouts.logit_lens import LogitLens
from dgd_lightning.decode.readouts.matched_entropy import MatchedEntropy
from dgd_lightning.decode.readouts.noise import Noise
from dgd_lightning.decode.readouts.other_model import OtherModel
from dgd_lightning.decode.replay import replay
from dgd_lightning.errors import InputError
from dgd_lightning.methods.autoregressive import autoregressive_generate
from dgd_lightning.methods.base import Guidance
from dgd_lightning.methods.guided import guided_generate, guided_sweep
from dgd_lightning.methods.rerank import rerank_generate
from dgd_lightning.methods.speculative import speculative_generate
from dgd_lightning.pair import Pair
from dgd_lightning.target.model import Target
from dgd_lightning.ttt.config import TTTConfig
from dgd_lightning.ttt.online import OnlineTTT
from dgd_lightning.types import TargetStep

NAN, INF = float("nan"), float("inf")
NEW = 6
Decode = Callable[..., Any]


def _sweep(pair: Pair, prompts: list[Tensor], **options: Any) -> Any:
    return guided_sweep(pair, prompts, [Guidance(Blend(beta)) for beta in (0.0, 0.3)], **options)


def _online(pair: Pair, prompts: list[Tensor], **options: Any) -> Any:
    return speculative_generate(pair, prompts, online=OnlineTTT(2, TTTConfig(steps=1, anchors_per_step=2)), **options)


METHODS: dict[str, Decode] = {
    "autoregressive": autoregressive_generate,
    "speculative": speculative_generate,
    "online": _online,
    "guided": lambda *args, **options: guided_generate(*args, beta=0.3, **options),
    "token by token": lambda *args, **options: guided_generate(*args, beta=0.3, speculative=False, **options),
    "sweep": _sweep,
    "rerank": lambda *args, **options: rerank_generate(*args, num_answers=2, **{"temperature": 1.0, **options}),
}


def unread(pair: Pair, token: int) -> None:
    """Make NaN of whatever the target computes of a token."""
    with torch.no_grad():
        pair.target.embedding.weight[token] = NAN


def failure(decode: Decode, *args: Any, **options: Any) -> InputError:
    with pytest.raises(InputError) as caught:
        decode(*args, **{"max_new_tokens": NEW, **options})
    return caught.value


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("method", METHODS)
def test_a_target_that_overflows_is_named_with_its_prompt(method: str, temperature: float) -> None:
    pair, prompts = make_pair(dtype=torch.float32), random_prompts(3, 0)
    prompts = [torch.where(prompt == 5, 6, prompt) for prompt in prompts]
    prompts[1][-1] = 5
    unread(pair, 5)
    heat = temperature or (1.0 if method == "rerank" else 0.0)
    error = failure(METHODS[method], pair, prompts, temperature=heat, seed=0)  # by which no other row draws a 5 first
    assert error.argument == "prompts[1]"
    assert error.expected == "finite logits of the target"
    assert error.received == f"NaN or infinity for the token at position {len(prompts[1])}, in float32"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("rerank", "online")])
def test_a_target_that_overflows_later_is_named_with_the_position(
    method: str, temperature: float, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    (prompt,), step = random_prompts(1, 3), Target.step

    def spoilt_step(self: Target, ids: Tensor, positions: Tensor, *args: Any, **knobs: Any) -> TargetStep:
        forward = step(self, ids, positions, *args, **knobs)
        return forward._replace(logits=forward.logits.masked_fill((positions == len(prompt) + 3)[..., None], NAN))

    monkeypatch.setattr(Target, "step", spoilt_step)
    error = failure(METHODS[method], pair, [prompt], temperature=temperature, seed=1, stop_token_ids=())
    assert error.expected == "finite logits of the target"
    assert f"at position {len(prompt) + 4}," in error.received


def test_float16_that_overflows_names_the_way_out() -> None:
    pair = make_pair(dtype=torch.float16)
    with torch.no_grad():
        pair.target.model.get_output_embeddings().weight.mul_(3e4)
    for decode in (autoregressive_generate, speculative_generate):
        error = failure(decode, pair, random_prompts(2, 0), names=["task a", "task b"])
        assert str(error).startswith("task a: expected finite logits of the target, received NaN or infinity for the")
        assert "in float16. Hint: set dtype (model.dtype) to bfloat16 or float32" in str(error)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("method", ["speculative", "guided", "sweep", "rerank"])
def test_a_draft_that_is_no_number_is_named(method: str, temperature: float) -> None:
    pair = make_pair(dtype=torch.float32)
    assert pair.draft is not None
    with torch.no_grad():
        pair.draft.norm.weight.fill_(float("inf"))
    error = failure(METHODS[method], pair, random_prompts(2, 0), temperature=temperature or float(method == "rerank"))
    # the sweep's and the guided rows' first token comes of the readout, before anything is proposed
    own = "readout DraftReadout" if method in ("guided", "sweep") else "draft"
    assert (error.argument, error.expected) == ("prompts[0]", f"finite logits of the {own}")


class Broken(ReadoutState):
    """Another readout's logits, some of which are replaced."""

    def __init__(self, inner: ReadoutState, value: float, whole: bool) -> None:
        self.inner, self.value, self.whole = inner, value, whole

    def logits(self, out: Any) -> Tensor:
        logits = out.logits.clone()
        logits[..., slice(None) if self.whole else 7] = self.value
        return logits


@dataclass(frozen=True)
class BrokenReadout(Readout):
    value: float
    whole: bool = False

    def layers(self, pair: Pair) -> tuple[int, ...]:
        return ()

    def begin(self, pair: Pair, request: Any, width: int) -> ReadoutState:
        return Broken(Stateless(lambda out: out.logits), self.value, self.whole)


def other_model(value: float) -> OtherModel:
    model = make_target(seed=5)
    with torch.no_grad():
        model.model.get_decoder().norm.weight.fill_(value)
    return OtherModel(model)


@pytest.mark.parametrize(
    "readout",
    [
        BrokenReadout(NAN), BrokenReadout(INF), BrokenReadout(-INF, whole=True), MatchedEntropy(BrokenReadout(NAN)),
        Noise(BrokenReadout(NAN)), other_model(NAN), MatchedEntropy(other_model(INF)),
    ],
    ids=lambda one: type(one).__name__,
)  # fmt: skip
def test_a_readout_that_is_no_number_is_named(readout: Readout, pair: Pair) -> None:
    error = failure(guided_generate, pair, random_prompts(2, 0), beta=0.2, readout=readout)
    assert error.expected == f"finite logits of the readout {type(readout).__name__}"
    assert error.argument == "prompts[0]"
    variants = [Guidance(Blend(0.1)), Guidance(Blend(0.2), readout)]  # of two groups of rows the second one
    assert failure(guided_sweep, pair, random_prompts(2, 0), variants=variants).expected == error.expected


def test_a_layer_that_is_no_number_does_not_hide_behind_another(pair: Pair) -> None:
    final_norm, layers = pair.target.final_norm, iter([True, False] * 100)
    pair.target.final_norm = lambda states: final_norm(states) * (NAN if next(layers) else 1.0)  # type: ignore[method-assign]
    error = failure(guided_generate, pair, random_prompts(1, 0), beta=-0.2, readout=DoLa([0, 2]))
    assert error.expected == "finite logits of the readout DoLa"


def test_a_blend_that_overflows_is_named(pair: Pair) -> None:
    error = failure(guided_generate, pair, random_prompts(1, 0), beta=1e308)
    assert error.expected == "finite logits of the distribution that tokens are chosen from"


def test_tokens_that_cannot_be_chosen_are_no_failure(pair: Pair) -> None:
    prompts = random_prompts(3, 0)
    knobs = {"temperature": 1.0, "top_k": 3, "top_p": 0.5, "seed": 0, "max_new_tokens": NEW}
    for options in ({"candidates": 2}, {"plausibility": 0.5}, {"readout": BrokenReadout(-INF)}):
        outputs = guided_generate(pair, prompts, beta=0.3, **knobs, **options)  # type: ignore[arg-type]
        assert all(len(output.tokens) == NEW for output in outputs)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("online", "rerank")])
def test_what_no_row_commits_may_be_anything(method: str, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished row is read on until half of the batch is done, and blocks go on behind a stop token."""
    prompts = random_prompts(3, 1)
    options = {"seed": 2, "max_new_tokens": 8}
    (first, *_) = autoregressive_generate(pair, prompts, max_new_tokens=3, stop_token_ids=())
    stop = first.tokens.tolist()[2]
    prompts = [torch.where(prompt == stop, (stop + 1) % 60, prompt) for prompt in prompts]
    before = _flat(METHODS[method](pair, prompts, stop_token_ids=[stop], **options))
    step, propose, spoilt = Target.step, Drafter.logits, 0

    def spoilt_step(self: Target, ids: Tensor, *args: Any, **knobs: Any) -> TargetStep:
        nonlocal spoilt
        behind = (ids == stop).cumsum(1) > 0  # [b, Q]
        spoilt += int(behind.any())
        forward = step(self, ids, *args, **knobs)
        return forward._replace(logits=forward.logits.masked_fill(behind[..., None], NAN))

    def spoilt_draft(self: Drafter, last: Tensor, *args: Any) -> Tensor:
        return propose(self, last, *args).masked_fill((last == stop)[:, None, None], NAN)

    monkeypatch.setattr(Target, "step", spoilt_step)
    monkeypatch.setattr(Drafter, "logits", spoilt_draft)
    after = _flat(METHODS[method](pair, prompts, stop_token_ids=[stop], **options))
    assert [one.tokens.tolist() for one in after] == [one.tokens.tolist() for one in before]
    assert spoilt > 0


def _flat(outputs: Any) -> list[Any]:
    return [one for column in outputs for one in column] if isinstance(outputs[0], list) else list(outputs)


@pytest.mark.parametrize("readout", [DraftReadout(), DraftSlots()], ids=lambda one: type(one).__name__)
def test_a_replay_names_what_is_no_number(readout: Any, pair: Pair) -> None:
    prompt, answer = torch.tensor([3, 4, 6]), torch.tensor([9, 8, 7, 2, 1])
    assert pair.draft is not None
    with torch.no_grad():
        pair.draft.norm.weight.fill_(NAN)
    with pytest.raises(InputError, match=f"^task 3: expected finite logits of the readout {type(readout).__name__}, "):
        list(replay(pair, prompt, [answer], [LogitLens(1), readout], chunk=2, name="task 3"))
    unread(pair, 7)
    with pytest.raises(InputError, match="of the target, received NaN or infinity for the token at position 6,"):
        list(replay(pair, prompt, [answer], [], chunk=1))
