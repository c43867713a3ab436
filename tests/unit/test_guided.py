"""Guided decoding on tiny real pairs: fast = slow = naive oracle, for every readout; null tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from decode_tools import random_prompts, tokens_of
from guided_tools import (
    BETAS,
    READOUTS,
    Mixed,
    Record,
    known_proposals,
    naive_guided,
    naive_read,
    ragged,
    readout_of,
)
from host_waits import HostWaits
from tiny import make_pair
from torch import Tensor

from dgd_lightning.decode import call
from dgd_lightning.decode.batch import Batch, Change
from dgd_lightning.decode.blending import Adaptive, Disagree, WarmUp
from dgd_lightning.decode.readouts.base import Readout, ReadoutState, TargetOutput
from dgd_lightning.decode.readouts.draft import DraftState
from dgd_lightning.decode.readouts.logit_lens import LogitLens
from dgd_lightning.decode.readouts.without_context import WithoutContext
from dgd_lightning.distributions import entropy
from dgd_lightning.methods.autoregressive import autoregressive_generate
from dgd_lightning.methods.guided import GuidedLoop, ReadoutGroup, guided_generate
from dgd_lightning.pair import Pair
from dgd_lightning.ttt.adapt import ttt_adapt
from dgd_lightning.ttt.config import TTTConfig

SAME = 1e-9  # fp64 logits of up to 30, made by forwards of other shapes; MatchedEntropy's bisection adds 1e-12
DIFFERENT = 1e-2  # of logits that stand some units apart


def exact(
    pair: Pair,
    prompts: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
    *,
    readout: str,
    new: int,
    block_size: int,
    acceptances: tuple[float, ...] = (0.8,),
    **knobs: Any,
) -> Iterator[int]:
    """Check that the fast loop writes what the slow one does, also with good proposals; yields tokens compared."""
    knobs |= {"readout": readout_of(readout, pair, prompts), "max_new_tokens": new}
    slow = guided_generate(pair, prompts, speculative=False, **knobs)
    assert tokens_of(guided_generate(pair, prompts, block_size=block_size, **knobs)) == tokens_of(slow)
    yield sum(len(output.tokens) for output in slow)
    for acceptance in acceptances:
        with monkeypatch.context() as patches:
            known_proposals(patches, prompts, tokens_of(slow), acceptance)
            fast = guided_generate(pair, prompts, block_size=block_size, **knobs)
        assert tokens_of(fast) == tokens_of(slow)
        if acceptance == 1.0 and len(slow[0].tokens) == new > block_size:
            assert max(fast[0].acceptance_lengths) == block_size
        yield sum(len(output.tokens) for output in slow)


@pytest.mark.parametrize("readout", READOUTS)
def test_greedy_ways_agree(readout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every β is a row of the batch, the first of them behind a prompt of one token.

    Each readout meets one of the other shapes, or the other family; the slow test has them all.
    """
    pair, at = make_pair(block_size=8), READOUTS.index(readout) % 4
    rows, block_size, betas = ((8, 5, (0.5, *BETAS, 0.1)), (1, 2, (0.5,)), (2, 3, (-1.0, 1.0)), (6, 6, BETAS[::-1]))[at]
    other = make_pair("llama", block_size=6, seed=2, num_layers=1) if at == 3 else pair
    knobs: dict[str, Any] = {"readout": readout, "new": 8}
    total = sum(exact(pair, ragged(6, seed=6), monkeypatch, block_size=8, beta=BETAS, **knobs))
    total += sum(exact(other, ragged(rows, seed=rows), monkeypatch, block_size=block_size, beta=betas, **knobs))
    assert total == 2 * 8 * (6 + rows)


@pytest.mark.parametrize(
    "knobs",
    [
        {"space": "log_probs"},
        {"space": "probs", "beta": (0.1, 0.5, 1.0, 0.25)},
        {"candidates": 3},
        {"plausibility": 0.2},
        {"schedule": WarmUp(5)},
        {"schedule": Disagree()},
        {"schedule": Adaptive("js")},
        {"schedule": Adaptive("kl"), "candidates": 8},
        {"schedule": Adaptive("entropy_gap"), "space": "log_probs"},
        {"stop_token_ids": [3, 9, 14, 20, 31, 44, 52]},
    ],
    ids=str,
)
def test_greedy_ways_agree_with(knobs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pair, prompts = make_pair(block_size=6), ragged(4, seed=4)
    knobs = {"beta": (-1.0, 0.5, 1.0, 0.25)} | knobs
    for readout in ("draft", "without", "noise") if "stop_token_ids" in knobs else ("draft",):
        assert sum(exact(pair, prompts, monkeypatch, readout=readout, new=12, block_size=6, **knobs)) > 0


def test_rows_that_stop_leave_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row stops at another time: β, shifts and seeds must go with their rows."""
    pair, prompts, betas = make_pair(block_size=6), ragged(6, seed=6), BETAS
    for name in ("draft", "without", "noise", "entropy"):
        knobs: dict[str, Any] = {"readout": readout_of(name, pair, prompts), "max_new_tokens": 20, "beta": betas}
        free = tokens_of(guided_generate(pair, prompts, speculative=False, **knobs))
        stops = [row[at] for row, at in zip(free, (0, 3, 5, 9, 12, 19), strict=True)]
        expected = [row[: next(i for i, token in enumerate(row) if token in stops) + 1] for row in free]
        assert len({len(row) for row in expected}) > 2
        for speculative in (False, True):
            outputs = guided_generate(pair, prompts, speculative=speculative, stop_token_ids=stops, **knobs)
            assert tokens_of(outputs) == expected
            assert {output.stop_reason for output in outputs} == {"stop"}


def skip_block_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots of the block don't see what the target has just read."""
    extend = GuidedLoop._extend

    def late(self: GuidedLoop, features: Tensor, positions: Tensor) -> None:
        if not hasattr(self, "batch") or positions.shape[1] == 1:  # prompts, and their last tokens
            extend(self, features, positions)

    monkeypatch.setattr(GuidedLoop, "_extend", late)


def verify_with_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are judged by the target, single tokens by the blend."""
    make = ReadoutGroup.mix

    def mixed(self: ReadoutGroup, batch: Batch, out: TargetOutput, target: Tensor, step: Tensor) -> Tensor:
        betas = self.betas
        self.betas = betas if out.tokens.shape[1] == 1 else torch.zeros_like(betas)
        logits = make(self, batch, out, target, step)
        self.betas = betas
        return logits

    monkeypatch.setattr(ReadoutGroup, "mix", mixed)


def last_readout_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """One readout serves the whole block."""
    logits = DraftState.logits

    def first(self: DraftState, out: Any) -> Tensor:
        made = logits(self, out)
        return made[:, :1].expand_as(made)

    monkeypatch.setattr(DraftState, "logits", first)


def keep_all_betas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows leave the batch, the first rows' β stay."""
    follow = ReadoutGroup.follow

    def wrong(self: ReadoutGroup, change: Change) -> None:
        betas = self.betas
        follow(self, change)
        self.betas = betas[: len(self.betas)]

    monkeypatch.setattr(ReadoutGroup, "follow", wrong)


@pytest.mark.parametrize("plant", [skip_block_features, verify_with_the_target, last_readout_for_all, keep_all_betas])
def test_planted_bugs_are_seen(plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, prompts = make_pair(block_size=6), ragged(6, seed=6)
    stops = [3, 9, 14, 20, 31, 44, 52]
    slow = guided_generate(pair, prompts, speculative=False, beta=BETAS, max_new_tokens=24, stop_token_ids=stops)
    plant(monkeypatch)
    known_proposals(monkeypatch, prompts, tokens_of(slow), 0.8)
    fast = guided_generate(pair, prompts, beta=BETAS, max_new_tokens=24, stop_token_ids=stops)
    assert tokens_of(fast) != tokens_of(slow)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_greedy_ways_agree_over_100k_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    total, seed = 0, 0
    while total < 100_000 or seed % len(READOUTS):
        pair = make_pair("llama" if seed % 3 == 0 else "qwen3", block_size=8, seed=seed, num_layers=1 + seed % 3)
        rows, readout = 1 + seed * 5 % 8, READOUTS[seed % len(READOUTS)]
        betas = [BETAS[(seed + row) % len(BETAS)] for row in range(rows)]
        knobs: dict[str, Any] = {"block_size": 2 + seed % 7, "acceptances": (0.6, 0.9, 1.0), "beta": betas}
        total += sum(exact(pair, ragged(rows, seed), monkeypatch, readout=readout, new=150 + seed % 50, **knobs))
        seed += 1
    print(f"{total} tokens over {seed} random pairs, all equal")


NAIVE = ("draft", "small_block", "lens", "raw_lens", "dola", "without", "other")
IN_TURN = [(readout, ("qwen3", "llama")[at % 2]) for at, readout in enumerate(NAIVE)]
THE_OTHER_WAY = [
    pytest.param(readout, "llama" if family == "qwen3" else "qwen3", marks=pytest.mark.slow)
    for readout, family in IN_TURN
]


@pytest.mark.parametrize(("readout", "family"), [*IN_TURN, *THE_OTHER_WAY])
def test_equal_to_the_naive_oracle(readout: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, new, betas = make_pair(family, block_size=4), 6, (-0.25, 0.5, 1.0)
    prompts = ragged(3, seed=21)
    naive = [
        naive_guided(pair, prompt, new, beta, naive_read(readout, pair, prompt))
        for prompt, beta in zip(prompts, betas, strict=True)
    ]
    for speculative in (False, True):
        with Record(monkeypatch) as record:
            outputs = guided_generate(
                pair,
                prompts,
                beta=betas,
                readout=readout_of(readout, pair, prompts),
                max_new_tokens=new,
                speculative=speculative,
            )
        assert tokens_of(outputs) == [row.tokens for row in naive]
        if not speculative:  # rows end together
            mixed = record.of(3, new)
            torch.testing.assert_close(mixed.readout, torch.stack([row.readout for row in naive]), rtol=0, atol=SAME)
            torch.testing.assert_close(mixed.guided, torch.stack([row.guided for row in naive]), rtol=0, atol=SAME)
    assert len({float(row.readout.std()) for row in naive}) == 3


def recorded(
    pair: Pair, prompts: list[Tensor], new: int, monkeypatch: pytest.MonkeyPatch, **knobs: Any
) -> tuple[list[list[int]], Mixed]:
    with Record(monkeypatch) as record:
        outputs = guided_generate(pair, prompts, max_new_tokens=new, **knobs)
    return tokens_of(outputs), record.of(len(prompts), new)


@pytest.mark.parametrize("readout", READOUTS)
def test_logits_of_a_block_are_those_of_single_tokens(readout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, prompts, new = make_pair(block_size=8), ragged(4, seed=31), 17
    knobs: dict[str, Any] = {"readout": readout_of(readout, pair, prompts), "beta": 0.5}
    tokens, single = recorded(pair, prompts, new, monkeypatch, speculative=False, **knobs)
    known_proposals(monkeypatch, prompts, tokens, 1.0)
    again, block = recorded(pair, prompts, new, monkeypatch, **knobs)
    assert again == tokens
    for one, other in zip(single, block, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=SAME)


@pytest.mark.parametrize("readout", READOUTS)
def test_without_guidance_it_is_the_target(readout: str) -> None:
    pair, prompts, new = make_pair(block_size=4), ragged(3, seed=41), 8
    mine: dict[str, Any] = {"readout": readout_of(readout, pair, prompts), "max_new_tokens": new}
    plain = tokens_of(autoregressive_generate(pair, prompts, max_new_tokens=new))
    strict = {"candidates": 2, "plausibility": 0.5}
    assert tokens_of(guided_generate(pair, prompts, beta=0.0, **mine)) == plain
    assert tokens_of(guided_generate(pair, prompts, beta=0.0, speculative=False, **mine, **strict)) == plain
    if readout != "entropy":  # a temperature moves no argmax
        assert tokens_of(guided_generate(pair, prompts, beta=1.0, **mine)) != plain
    knobs: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "seed": [3, 4, 5]}
    drawn = tokens_of(autoregressive_generate(pair, prompts, max_new_tokens=new, **knobs))
    assert tokens_of(guided_generate(pair, prompts, beta=0.0, speculative=False, **mine, **knobs)) == drawn
    assert tokens_of(guided_generate(pair, prompts, beta=-1.0, speculative=False, **mine, **knobs)) != drawn


@pytest.mark.parametrize("readout", READOUTS)
def test_full_guidance_is_the_readout(readout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, prompts = make_pair(block_size=4), ragged(3, seed=51)
    mine = readout_of(readout, pair, prompts)
    tokens, mixed = recorded(pair, prompts, 8, monkeypatch, beta=1.0, readout=mine, speculative=False)
    assert torch.equal(mixed.guided, mixed.readout.to(mixed.guided.dtype))
    assert tokens == mixed.readout.argmax(-1).tolist()
    assert tokens_of(guided_generate(pair, prompts, beta=1.0, readout=mine, max_new_tokens=8)) == tokens


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_controls_match_their_arm_and_differ_from_it(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """All read the same text, the target's own."""
    pair, prompts, new = make_pair(dtype=dtype, block_size=4), ragged(4, seed=61), 10
    seen = {
        name: recorded(
            pair, prompts, new, monkeypatch, beta=0.0, readout=readout_of(name, pair, prompts), speculative=False
        )[1]
        for name in READOUTS
    }
    distributions = {name: mixed.readout.double().log_softmax(-1) for name, mixed in seen.items()}
    distributions["target"] = seen["draft"].target.double().log_softmax(-1)
    for one in distributions:
        for other in distributions:
            gaps = (distributions[one] - distributions[other]).abs().amax(-1)  # [B, T]
            gap = float(gaps[1:, 1:].min() if {one, other} <= {"draft", "shuffled"} else gaps[1:].max())
            assert one == other or gap > DIFFERENT, (one, other)

    def size(name: str) -> Tensor:
        correction = (seen[name].readout - seen[name].target).double()
        return (correction - correction.mean(-1, keepdim=True)).norm(dim=-1)

    torch.testing.assert_close(size("noise"), size("draft"), rtol=1e-2 if dtype == torch.float32 else SAME, atol=0)
    noise = (seen["noise"].readout - seen["noise"].target).double()
    directions = torch.nn.functional.normalize(noise.flatten(0, 1), dim=-1)  # [B·T, V]
    assert (directions @ directions.T).fill_diagonal_(0).abs().max() < 0.9  # another noise at every token
    rough = 1e-4 if dtype == torch.float32 else SAME
    torch.testing.assert_close(entropy(distributions["entropy"]), entropy(distributions["draft"]), rtol=0, atol=rough)
    assert (entropy(distributions["target"]) - entropy(distributions["draft"])).abs().mean() > 0.05
    assert torch.equal(distributions["entropy"].argmax(-1), distributions["target"].argmax(-1))


def test_control_features_keep_what_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random features have the true ones' norms; shuffled ones are the true ones of the row's prompt, each once."""
    pair, prompts = make_pair(block_size=4), ragged(3, seed=71)
    assert pair.draft is not None
    fed: list[tuple[Tensor, Tensor]] = []
    extend = type(pair.draft).extend
    monkeypatch.setattr(
        type(pair.draft),
        "extend",
        lambda draft, cache, features, at: (fed.append((features, at)), extend(draft, cache, features, at))[1],
    )
    states = {}
    for name in ("draft", "shuffled", "random"):
        fed.clear()
        readout = readout_of(name, pair, prompts)
        guided_generate(pair, prompts, beta=0.0, readout=readout, max_new_tokens=1, speculative=False)
        prefill, first = fed
        states[name] = (prefill[0].unflatten(-1, (-1, pair.target.hidden_size)), first[0])  # [B, S, F, H]
        assert torch.equal(prefill[1][0], torch.arange(max(map(len, prompts)) - 1))
    own, shuffled, random = (states[name][0] for name in ("draft", "shuffled", "random"))
    torch.testing.assert_close(random.norm(dim=-1), own.norm(dim=-1), rtol=1e-12, atol=0)
    assert float((random - own).abs().mean()) > DIFFERENT
    assert torch.equal(states["shuffled"][1], states["draft"][1])  # what is generated keeps its own
    for row, prompt in enumerate(prompts):
        known = len(prompt) - 1
        mine, theirs = own[row, :known].flatten(1), shuffled[row, :known].flatten(1)
        assert sorted(mine.tolist()) == sorted(theirs.tolist())
        assert known < 3 or not torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("readout", "temperature"), [("draft", 0.0), ("draft", 0.9), ("random", 0.9), ("without", 0.9), ("noise", 0.0)]
)
def test_betas_in_one_batch_are_those_alone(readout: str, temperature: float) -> None:
    pair, prompt, new = make_pair(block_size=4), random_prompts(1, seed=81)[0], 12
    knobs: dict[str, Any] = {"max_new_tokens": new, "temperature": temperature}
    for speculative in (False, True):
        together = guided_generate(
            pair,
            [prompt] * len(BETAS),
            beta=BETAS,
            readout=readout_of(readout, pair, [prompt] * len(BETAS)),
            speculative=speculative,
            seed=[7] * len(BETAS),
            **knobs,
        )
        assert len({tuple(row) for row in tokens_of(together)}) > 2
        for beta, output in list(zip(BETAS, together, strict=True))[::2]:
            (alone,) = guided_generate(
                pair,
                [prompt],
                beta=beta,
                readout=readout_of(readout, pair, [prompt]),
                speculative=speculative,
                seed=[7],
                **knobs,
            )
            assert alone.tokens.tolist() == output.tokens.tolist()
            assert alone.acceptance_lengths == output.acceptance_lengths


@pytest.mark.parametrize("readout", ["draft", "shuffled", "random", "without", "noise"])
def test_a_row_alone_is_the_row_in_a_batch(readout: str) -> None:
    pair, prompts, betas = make_pair(block_size=4), ragged(4, seed=17), (0.5, -0.25, 1.0, 0.25)
    knobs: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.9}
    mine = readout_of(readout, pair, prompts)
    together = guided_generate(pair, prompts, beta=betas, readout=mine, seed=[1, 2, 3, 4], **knobs)
    for row in (0, 2):
        one = [prompts[row]]
        alone = readout_of(readout, pair, one)
        (output,) = guided_generate(pair, one, beta=betas[row], readout=alone, seed=[row + 1], **knobs)
        assert output.tokens.tolist() == together[row].tokens.tolist()


def test_a_users_own_readout_and_schedule() -> None:
    class Flat(Readout, ReadoutState):
        """Says nothing."""

        def layers(self, pair: Pair) -> tuple[int, ...]:
            return ()

        def begin(self, pair: Pair, request: Any, width: int) -> Flat:
            return self

        def extend(self, taps: dict[int, Tensor], positions: Tensor) -> None:
            assert not taps or set(taps) == set(drafted)

        def logits(self, out: Any) -> Tensor:
            return torch.zeros_like(out.logits)

    def second_half(target: Tensor, readout: Tensor, step: Tensor) -> Tensor:
        return (step >= 8).to(target.dtype)

    pair, prompts = make_pair(block_size=4), ragged(3, seed=91)
    assert pair.draft is not None
    drafted = pair.draft.config.target_layer_ids
    plain = tokens_of(autoregressive_generate(pair, prompts, max_new_tokens=16))
    for speculative in (False, True):
        arguments: dict[str, Any] = {"readout": Flat(), "max_new_tokens": 16, "speculative": speculative}
        assert tokens_of(guided_generate(pair, prompts, beta=0.9, **arguments)) == plain  # a temperature, no more
        pushed = guided_generate(pair, prompts, beta=3.0, schedule=second_half, **arguments)
        for row, expected in zip(tokens_of(pushed), plain, strict=True):
            assert row[:8] == expected[:8]
            assert row[8] != expected[8]  # (1 − 3)·target: its least likely


def test_a_target_alone_token_by_token() -> None:
    pair, prompts = make_pair(), ragged(2, seed=5)
    alone = Pair(pair.target, None, None)
    for readout in (LogitLens(2), WithoutContext([prompt[-1:] for prompt in prompts])):
        knobs: dict[str, Any] = {"beta": -0.5, "readout": readout, "max_new_tokens": 9}
        expected = tokens_of(guided_generate(pair, prompts, **knobs))
        assert tokens_of(guided_generate(alone, prompts, speculative=False, **knobs)) == expected


def test_an_adapted_draft() -> None:
    """The adapter is in the readout and in the proposals, and out again afterwards."""
    pair, prompts, knobs = (
        make_pair(block_size=4),
        ragged(2, seed=15),
        {"beta": (0.5, 1.0), "max_new_tokens": 10},
    )
    plain = tokens_of(guided_generate(pair, prompts, **knobs))  # type: ignore[arg-type]
    result = ttt_adapt(pair, torch.arange(60) % 60, TTTConfig(steps=30, lr=0.1, holdout=0.0, validation_texts=0))
    with pair.adapter(result):
        slow = tokens_of(guided_generate(pair, prompts, speculative=False, **knobs))  # type: ignore[arg-type]
        assert tokens_of(guided_generate(pair, prompts, **knobs)) == slow  # type: ignore[arg-type]
        for prompt, beta, tokens in zip(prompts, (0.5, 1.0), slow, strict=True):
            assert naive_guided(pair, prompt, 10, beta, naive_read("draft", pair, prompt)).tokens == tokens
    assert slow != plain
    assert tokens_of(guided_generate(pair, prompts, **knobs)) == plain  # type: ignore[arg-type]


@pytest.mark.parametrize("readout", ["draft", "without", "noise", "entropy", "ablated"])
def test_one_synchronisation_per_cycle(readout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, prompts = make_pair(block_size=4), random_prompts(3, seed=8)
    seen, cycles = [], [0]

    def on_progress(_: call.Progress) -> None:
        cycles[0] += 1

    for new in (7, 14):
        cycles[0] = 0
        with monkeypatch.context() as patches, HostWaits(patches) as host:
            mine = readout_of(readout, pair, prompts)
            guided_generate(pair, prompts, beta=0.4, readout=mine, max_new_tokens=new, on_progress=on_progress)
        assert host.synchronised == cycles[0] > 3
        seen.append(host.seen)
    assert len(seen[0]) == len(seen[1]), seen[1]


# bf16: the blend's logits (up to 3.5) are 1/64 apart at most and carry the error of two networks; see test_decode_bf16,
# whose bound for one network's is 0.125. β of 0 … 1 makes an average of the two, not a sum.
NEAR_TIE = 0.125


@torch.no_grad()
def replayed(pair: Pair, prompt: Tensor, tokens: list[int], beta: float) -> Tensor:
    """[T, V] the blend, teacher-forced: one plain forward, and one of the draft's training kind with all anchors."""
    draft, model = pair.draft, pair.target.model
    assert draft is not None
    ids = torch.tensor([[*prompt.tolist(), *tokens[:-1]]])
    output = model(ids, output_hidden_states=True)
    features = torch.cat([output.hidden_states[i + 1] for i in draft.config.target_layer_ids], dim=-1)
    anchors = torch.arange(len(prompt) - 1, ids.shape[1])[None]  # [1, T]
    masks = torch.full((*anchors.shape, draft.config.block_size - 1), draft.config.mask_token_id)
    blocks = torch.cat([ids[:, anchors[0], None], masks], dim=-1).flatten(1)  # [1, T·K]
    hidden = draft.multi_anchor(features, model.get_input_embeddings()(blocks), anchors)
    readout = model.get_output_embeddings()(hidden[0, 1 :: draft.config.block_size])  # slot 1 of every block
    return (1 - beta) * output.logits[0, anchors[0]].float() + beta * readout.float()


def test_bf16_differs_only_at_near_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, prompts, betas, new = (
        make_pair(dtype=torch.bfloat16, block_size=8),
        ragged(8, seed=1),
        [0.1, 0.25, 0.5, 1.0] * 2,
        40,
    )
    slow = tokens_of(guided_generate(pair, prompts, beta=betas, max_new_tokens=new, speculative=False))
    known_proposals(monkeypatch, prompts, slow, 0.8)
    fast = guided_generate(pair, prompts, beta=betas, max_new_tokens=new)
    assert max(max(output.acceptance_lengths) for output in fast) == 8
    gaps, second = [], []
    for prompt, beta, tokens in zip(prompts, betas, tokens_of(fast), strict=True):
        logits = replayed(pair, prompt, tokens, beta)
        gaps.append(logits.amax(-1) - logits.gather(1, torch.tensor(tokens)[:, None])[:, 0])
        second.append(logits.topk(2).values.diff()[:, 0].neg())
    differ = sum(one != other for one, other in zip(slow, tokens_of(fast), strict=True))
    print(f"bf16: {differ} of {len(prompts)} rows differ, largest gap {torch.stack(gaps).max():.3f}")
    assert torch.stack(gaps).max() < NEAR_TIE  # of those that differ, and of all others
    assert (torch.stack(second) > NEAR_TIE).double().mean() > 0.5  # most wrong tokens would be seen
