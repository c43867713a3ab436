"""Several rows of one prompt: sweeps over β and readouts, and `num_return_sequences`; equal to each variant alone."""

from __future__ import annotations

from typing import Any

import pytest
from decode_tools import tokens_of
from guided_tools import (
    BETAS,
    READOUTS,
    ragged,
    readout_of,
)
from tiny import make_pair
from torch import Tensor

from dgd_lightning.decode.batch import Batch, Change
from dgd_lightning.decode.blending import Blend
from dgd_lightning.methods.autoregressive import autoregressive_generate
from dgd_lightning.methods.guided import Guidance, ReadoutGroup, guided_generate, guided_sweep
from dgd_lightning.methods.speculative import speculative_generate
from dgd_lightning.pair import Pair


def sweep_of(names: tuple[str, ...], pair: Pair, prompts: list[Tensor]) -> list[Guidance]:
    """Every readout with two β, and one with a constraint."""
    variants = [Guidance(Blend(beta), readout_of(name, pair, prompts)) for beta in (-0.5, 0.5) for name in names]
    return [*variants, Guidance(Blend(0.5, plausibility=0.3)), Guidance(Blend(0.0))]


@pytest.mark.parametrize("speculative", [True, False])
def test_a_sweep_gives_what_each_way_gives_alone(speculative: bool) -> None:
    """Rows of one batch, which stop at different times, share prompts, forwards and proposals."""
    pair, prompts = make_pair(block_size=6), ragged(3, seed=6)
    stops = [3, 9, 14, 20, 31, 44, 52]
    knobs: dict[str, Any] = {"max_new_tokens": 10, "stop_token_ids": stops, "speculative": speculative}
    variants = sweep_of(READOUTS, pair, prompts)
    together = guided_sweep(pair, prompts, variants, **knobs)
    assert len(together) == len(variants)
    for variant, outputs in zip(variants, together, strict=True):
        mixing = {"beta": variant.blend.beta, "readout": variant.readout, "plausibility": variant.blend.plausibility}
        alone = guided_generate(pair, prompts, **mixing, **knobs)
        assert tokens_of(outputs) == tokens_of(alone)
        assert [one.acceptance_lengths for one in outputs] == [one.acceptance_lengths for one in alone]
        assert [one.trace.draft_forwards for one in outputs] == [one.trace.draft_forwards for one in alone]
    assert len({str(tokens_of(outputs)) for outputs in together}) > len(variants) // 2
    variants = variants[len(READOUTS) :]  # one β is enough
    drawn = guided_sweep(pair, prompts, variants, temperature=1.0, seed=[5, 6, 7], **knobs)
    for variant, outputs in zip(variants, drawn, strict=True):
        mixing = {"beta": variant.blend.beta, "readout": variant.readout, "plausibility": variant.blend.plausibility}
        alone = guided_generate(pair, prompts, temperature=1.0, seed=[5, 6, 7], **mixing, **knobs)
        assert tokens_of(outputs) == tokens_of(alone)


class Widths:
    """How many sequences each forward of the target reads, and the prefill's shape."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pair: Pair) -> None:
        self.prompts: list[tuple[int, ...]] = []
        self.sequences: list[int] = []
        kind = type(pair.target)
        prefill, step = kind.prefill, kind.step

        def filled(target: Any, ids: Tensor, *rest: Any, **named: Any) -> Any:
            self.prompts.append(tuple(ids.shape))
            return prefill(target, ids, *rest, **named)

        def stepped(target: Any, tokens: Tensor, *rest: Any, **named: Any) -> Any:
            self.sequences.append(len(tokens))
            return step(target, tokens, *rest, **named)

        monkeypatch.setattr(kind, "prefill", filled)
        monkeypatch.setattr(kind, "step", stepped)


def test_ways_of_a_prompt_are_one_text_until_they_part(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, prompts = make_pair(block_size=6), ragged(3, seed=6)
    variants = [Guidance(Blend(beta)) for beta in (0.0, 1e-9, 1.0)]
    alone = [
        tokens_of(guided_generate(pair, prompts, beta=variant.blend.beta, max_new_tokens=16)) for variant in variants
    ]
    assert alone[0] == alone[1] != alone[2]
    seen = Widths(monkeypatch, pair)
    together = guided_sweep(pair, prompts, variants, max_new_tokens=16)
    assert [tokens_of(outputs) for outputs in together] == alone
    assert seen.prompts == [(3, max(map(len, prompts)) - 1)]
    assert seen.sequences[0] == 3  # the prompts' last tokens
    assert max(seen.sequences) <= 6  # two of three variants never part
    assert max(seen.sequences) > 3  # the third does


def never_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that have chosen different tokens go on as one sequence."""
    part = Batch._fork
    monkeypatch.setattr(Batch, "_fork", lambda self, committed: part(self, [()] * len(committed)))


def wrong_parents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readouts go on from another sequence than their rows."""
    follow = ReadoutGroup.follow

    def wrong(self: ReadoutGroup, change: Change) -> None:
        count = max(change.parents) + 1
        follow(self, change._replace(parents=[(sequence + 1) % count for sequence in change.parents]))

    monkeypatch.setattr(ReadoutGroup, "follow", wrong)


@pytest.mark.parametrize("plant", [never_part, wrong_parents])
def test_planted_bugs_of_sweeps_are_seen(plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, prompts = make_pair(block_size=6), ragged(3, seed=6)
    variants = [Guidance(Blend(beta), readout_of("shuffled", pair, prompts)) for beta in BETAS]
    healthy = [tokens_of(outputs) for outputs in guided_sweep(pair, prompts, variants, max_new_tokens=16)]
    plant(monkeypatch)
    try:
        planted = [tokens_of(outputs) for outputs in guided_sweep(pair, prompts, variants, max_new_tokens=16)]
    except ValueError:
        return  # it can't even go on
    assert planted != healthy


@pytest.mark.parametrize("generate", [autoregressive_generate, speculative_generate, guided_generate])
def test_rows_of_one_prompt_equal_copies_of_it(generate: Any) -> None:
    pair, prompts = make_pair(block_size=6), ragged(3, seed=6)
    knobs: dict[str, Any] = {"max_new_tokens": 14, "temperature": 1.0, "seed": list(range(9))}
    knobs |= {"beta": 0.5} if generate is guided_generate else {}
    together = generate(pair, prompts, num_return_sequences=3, **knobs)
    alone = generate(pair, [prompt for prompt in prompts for _ in range(3)], **knobs)
    assert tokens_of(together) == tokens_of(alone)
    assert [one.trace.seed for one in together] == list(range(9))
    assert tokens_of(together)[0] != tokens_of(together)[1]


def test_forwards_are_counted() -> None:
    """A guided cycle drafts twice: a block, and the readout at all of its positions."""
    pair, prompts = make_pair(block_size=6), ragged(2, seed=6)
    per_cycle = {}
    for name in ("draft", "lens", "noise", "without"):
        for speculative in (True, False):
            readout = readout_of(name, pair, prompts)
            outputs = guided_generate(
                pair, prompts, beta=0.5, readout=readout, max_new_tokens=8, speculative=speculative
            )
            (count,) = {one.trace.draft_forwards / one.trace.target_forwards for one in outputs}
            per_cycle[name, speculative] = count
    assert per_cycle == {
        ("draft", True): 2,
        ("draft", False): 1,
        ("lens", True): 1,
        ("lens", False): 0,
        ("noise", True): 2,
        ("noise", False): 1,
        ("without", True): 1,
        ("without", False): 0,
    }
