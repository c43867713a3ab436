"""The output distribution of guided decoding, enumerated exactly: fast = slow = product of the guided distributions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from distribution_tools import BUG_IS_SEEN, TV_TOLERANCE, StubDraft, output_law, stub_pair, total_variation
from guided_tools import Read, naive_read, readout_of
from tiny import make_draft, make_target
from torch import Tensor

from dgd_lightning.decode import drafter, verify
from dgd_lightning.decode.blending import Adaptive, Blend, Disagree, WarmUp
from dgd_lightning.decode.readouts.base import ReadoutState, TargetOutput
from dgd_lightning.decode.readouts.without_context import WithoutContext
from dgd_lightning.decode.sampling import probabilities, sampling_params
from dgd_lightning.methods.guided import ReadoutGroup, guided_generate
from dgd_lightning.pair import Pair

BLEND = ("beta", "space", "candidates", "plausibility", "schedule")


@dataclass(frozen=True)
class Table:
    """A readout by (position, token), as a user might write one."""

    table: Tensor  # [P, V, V]

    def layers(self, pair: Any) -> tuple[int, ...]:
        return ()

    def begin(self, pair: Any, request: Any, width: int) -> TableReading:
        return TableReading(self.table)


class TableReading(ReadoutState):
    def __init__(self, table: Tensor) -> None:
        self.table = table

    def logits(self, out: TargetOutput) -> Tensor:
        return self.table[out.positions.clamp(max=len(self.table) - 1), out.tokens]


def table_readout(vocab: int) -> Table:
    generator = torch.Generator().manual_seed(9)
    return Table(1.5 * torch.randn(24, vocab, vocab, generator=generator, dtype=torch.float64))


def guided_law(target: Read, readout: Read, prompt: list[int], tokens: int, *, stops: Any = (), **knobs: Any) -> dict:
    """The product of the guided distributions, one text at a time."""
    blend = Blend(**{name: knobs.pop(name) for name in BLEND if name in knobs})
    sampling = sampling_params(**knobs)
    distribution = {(): 1.0}
    for step in range(tokens):
        longer: dict[tuple[int, ...], float] = {}
        for path, mass in distribution.items():
            if path and path[-1] in stops:
                longer[path] = mass
                continue
            text = [*prompt, *path]
            t, r = target(text)[None, None], readout(text)[None, None]
            if blend == Blend(blend.beta):
                mixed = (1 - blend.beta) * t + blend.beta * r  # type: ignore[operator]
            else:  # its formulas are tested against plain Python in test_blending
                mixed = blend.mix(t, r, torch.tensor([blend.beta], dtype=torch.float64), torch.tensor([[step]]))
            row = probabilities(mixed[0, 0], sampling)
            longer |= {(*path, token): mass * float(row[token]) for token in range(len(row)) if row[token] > 0}
        distribution = longer
    return distribution


def stub_reads(pair: Any, table: Table | None) -> tuple[Read, Read]:
    def target(text: list[int]) -> Tensor:
        return pair.target.table[len(text) - 1, text[-2], text[-1]]

    def readout(text: list[int]) -> Tensor:
        if table is None:  # the draft's slot 1
            return pair.draft.table[len(text) - 1, text[-1], 1]
        return table.table[len(text) - 1, text[-1]]

    return target, readout


CASES: list[tuple[int, int, int, dict[str, Any]]] = [  # vocabulary, block, tokens, knobs
    (4, 3, 3, {"beta": 0.5, "temperature": 1.0}),
    (3, 3, 4, {"beta": -0.7, "temperature": 0.7}),
    (4, 3, 3, {"beta": 0.3, "temperature": 1.3, "top_p": 0.9}),
    (6, 4, 4, {"beta": 1.6, "temperature": 0.8, "top_k": 2}),
    (4, 2, 3, {"beta": 1.0, "temperature": 1.0}),
    (3, 3, 4, {"beta": 0.6, "temperature": 0.9, "schedule": WarmUp(3)}),
    (3, 3, 4, {"beta": -1.0, "temperature": 1.0, "schedule": Adaptive("js"), "candidates": 2}),
    (3, 3, 4, {"beta": 0.8, "temperature": 1.1, "schedule": Disagree(), "plausibility": 0.3}),
    (4, 3, 3, {"beta": 0.4, "temperature": 0.8, "space": "probs", "top_p": 0.95}),
    (4, 3, 3, {"beta": -0.4, "temperature": 0.8, "space": "log_probs", "top_k": 3}),
]


@pytest.mark.parametrize("own", [False, True], ids=["draft", "table"])
@pytest.mark.parametrize(("vocab", "block_size", "tokens", "knobs"), CASES)
def test_law_is_the_blends(vocab: int, block_size: int, tokens: int, knobs: dict[str, Any], own: bool) -> None:
    pair, prompt = stub_pair(vocab, block_size), [1, 0, 2]
    table = table_readout(vocab) if own else None
    expected = guided_law(*stub_reads(pair, table), prompt, tokens, **knobs)
    plain = guided_law(*stub_reads(pair, table), prompt, tokens, **(knobs | {"beta": 0.0}))
    assert total_variation(plain, expected) > BUG_IS_SEEN  # guidance does something
    for speculative in (False, True):
        distribution = output_law(
            guided_generate, pair, prompt, tokens, readout=table or "draft", speculative=speculative, **knobs
        )
        assert total_variation(distribution, expected) <= TV_TOLERANCE
        assert sum(distribution.values()) == pytest.approx(1.0, abs=TV_TOLERANCE)


def test_law_with_a_stop_token() -> None:
    pair, prompt, knobs = stub_pair(3, 3), [0, 1], {"beta": 0.6, "temperature": 1.0}
    expected = guided_law(*stub_reads(pair, None), prompt, 3, stops=(2,), **knobs)
    for speculative in (False, True):
        distribution = output_law(
            guided_generate, pair, prompt, 3, rows=1, stop_token_ids=[2], speculative=speculative, **knobs
        )
        assert total_variation(distribution, expected) <= TV_TOLERANCE


@pytest.fixture(scope="module")
def real_pair() -> Pair:
    target = make_target(vocab_size=4, hidden_size=16, intermediate_size=16)
    return Pair(target, make_draft(target, block_size=3), None)


@pytest.mark.parametrize(
    "readout",
    ["draft", "small_block", "shuffled", "random", "lens", "dola", "without", "other", "noise", "entropy"],
)
def test_law_of_a_real_pair(readout: str, real_pair: Pair) -> None:
    """Over a real target and draft in fp64: caches, masks and features take part in the distribution."""
    prompt, tokens = torch.tensor([1, 0, 2]), 3 if readout != "noise" else 2
    knobs: dict[str, Any] = {"beta": 0.6, "temperature": 0.8, "top_k": 3}

    def generate(pair: Pair, prompts: list[Tensor], **arguments: Any) -> Any:
        short = WithoutContext([torch.tensor([3])] * len(prompts))
        mine = short if readout == "without" else readout_of(readout, pair, prompts)
        return guided_generate(pair, prompts, readout=mine, **arguments)

    slow = output_law(generate, real_pair, prompt.tolist(), tokens, speculative=False, **knobs)
    fast = output_law(generate, real_pair, prompt.tolist(), tokens, **knobs)
    assert total_variation(fast, slow) <= TV_TOLERANCE
    assert sum(fast.values()) == pytest.approx(1.0, abs=TV_TOLERANCE)
    if readout in ("draft", "small_block", "lens", "without", "other"):
        model = real_pair.target.model

        def target(text: list[int]) -> Tensor:
            return model(torch.tensor([text])).logits[0, -1]

        def alone(text: list[int]) -> Tensor:
            return target([3, *text[len(prompt) :]])

        read = alone if readout == "without" else naive_read(readout, real_pair, prompt)
        with torch.no_grad():
            expected = guided_law(target, read, prompt.tolist(), tokens, **knobs)
        assert total_variation(fast, expected) <= TV_TOLERANCE


def plant_slot_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """The readout is the block's second slot."""
    block = StubDraft.block

    def shifted(self: StubDraft, *arguments: Any, slot: int | None = None, **named: Any) -> Tensor:
        return block(self, *arguments, slot=slot and slot + 1, **named)

    monkeypatch.setattr(StubDraft, "block", shifted)


def plant_target_verifies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are judged by the target instead of the blend."""
    mix = Blend.mix

    def plain(self: Blend, target: Tensor, readout: Tensor, beta: Tensor, step: Tensor) -> Tensor:
        return target if target.shape[1] > 1 else mix(self, target, readout, beta, step)

    monkeypatch.setattr(Blend, "mix", plain)


def plant_late_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the target is divided by the temperature (here 0.8)."""
    mix = Blend.mix
    monkeypatch.setattr(Blend, "mix", lambda self, t, r, beta, step: mix(self, t, 0.8 * r, beta, step))


def plant_target_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accepted by the blend, but after a rejection the target's residual is drawn from."""
    mix, reject, accept = Blend.mix, verify.verify_rejection, verify.accept_probability
    seen: dict[str, Tensor] = {}

    def remembered(self: Blend, target: Tensor, *others: Any) -> Tensor:
        seen["target"] = target
        return mix(self, target, *others)

    def by_target(proposals: Tensor, q: Tensor, p: Tensor, random_source: Any, positions: Tensor) -> verify.Verdict:
        monkeypatch.setattr(verify, "accept_probability", lambda _, q, chosen: accept(p[:, :-1], q, chosen))
        own = probabilities(seen["target"], sampling_params(0.8))
        return reject(proposals, q, own, random_source, positions)

    monkeypatch.setattr(Blend, "mix", remembered)
    monkeypatch.setattr(drafter, "verify_rejection", by_target)


def plant_target_accepts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accepted by the target, the rest from the blend's residual."""
    mix, accept = Blend.mix, verify.accept_probability
    seen: dict[str, Tensor] = {}

    def remembered(self: Blend, target: Tensor, *others: Any) -> Tensor:
        seen["p"] = probabilities(target, sampling_params(0.8))[:, :-1]
        return mix(self, target, *others)

    monkeypatch.setattr(Blend, "mix", remembered)
    monkeypatch.setattr(verify, "accept_probability", lambda _, q, chosen: accept(seen["p"], q, chosen))


def plant_one_step_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every slot of a block counts as its first: a schedule by step goes astray."""
    mix = Blend.mix
    monkeypatch.setattr(Blend, "mix", lambda self, t, r, beta, step: mix(self, t, r, beta, step[:, :1].expand_as(step)))


def plant_shifted_readout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slot j of the block is blended with the readout of slot j − 1."""
    mix = Blend.mix

    def shifted(self: Blend, target: Tensor, readout: Tensor, beta: Tensor, step: Tensor) -> Tensor:
        return mix(self, target, torch.cat([readout[:, :1], readout[:, :-1]], dim=1), beta, step)

    monkeypatch.setattr(Blend, "mix", shifted)


def plant_plain_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompt's last position is the target's alone."""
    make = ReadoutGroup.mix

    def plain_once(self: ReadoutGroup, *given: Any) -> Tensor:
        betas, first = self.betas, not hasattr(self, "stored")
        self.stored = True  # type: ignore[attr-defined]
        self.betas = torch.zeros_like(betas) if first else betas
        logits = make(self, *given)
        self.betas = betas
        return logits

    monkeypatch.setattr(ReadoutGroup, "mix", plain_once)


@pytest.mark.parametrize(
    "plant",
    [
        plant_slot_two,
        plant_target_verifies,
        plant_late_temperature,
        plant_target_residual,
        plant_target_accepts,
        plant_one_step_for_all,
        plant_shifted_readout,
        plant_plain_first_token,
    ],
)
def test_planted_bugs_are_seen(plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, prompt = stub_pair(3, 3), [1, 0, 2]
    knobs: dict[str, Any] = {"beta": 0.7, "temperature": 0.8}
    if plant is plant_one_step_for_all:
        knobs["schedule"] = WarmUp(4)
    expected = guided_law(*stub_reads(pair, None), prompt, 3, **knobs)
    healthy = output_law(guided_generate, pair, prompt, 3, **knobs)
    assert total_variation(healthy, expected) <= TV_TOLERANCE
    plant(monkeypatch)
    distribution = output_law(guided_generate, pair, prompt, 3, **knobs)
    assert total_variation(distribution, expected) > BUG_IS_SEEN


def test_the_walk_covers_everything() -> None:
    """The plainest case by hand: one token, so the distribution is one softmax."""
    pair, prompt, beta = stub_pair(4, 3), [1, 0, 2], 0.35
    distribution = output_law(guided_generate, pair, prompt, 1, beta=beta, temperature=1.0)
    target, readout = (read(prompt).tolist() for read in stub_reads(pair, None))
    weights = [math.exp((1 - beta) * t + beta * r) for t, r in zip(target, readout, strict=True)]
    assert [distribution[(i,)] for i in range(4)] == pytest.approx(
        [w / sum(weights) for w in weights], abs=TV_TOLERANCE
    )
