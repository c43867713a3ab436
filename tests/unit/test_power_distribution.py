"""Power sampling leaves p^α invariant: transition matrices of the real code's chain, enumerated; bugs are seen."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from distribution_tools import BUG_IS_SEEN, TV_TOLERANCE, stub_pair, total_variation, watch_batches
from power_tools import Answer, Law, PowerOracle, carried, chain_law
from scipy.stats import chi2
from test_guided_distribution import stub_reads, table_readout
from tiny import make_draft, make_target
from torch import Tensor

from dgd_lightning.decode import batch as batch_module
from dgd_lightning.decode.batch import Batch
from dgd_lightning.decode.blending import Adaptive, Blend
from dgd_lightning.methods.power import Chain, Chains, power_generate
from dgd_lightning.pair import Pair

FALSE_ALARM = 1e-6


@pytest.fixture(autouse=True)
def _walk_together(monkeypatch: pytest.MonkeyPatch) -> None:
    watch_batches(monkeypatch)


def oracle_of(pair: Any, prompt: list[int], alpha: float, stops: Any, **knobs: Any) -> PowerOracle:
    """Over a stub pair's tables."""
    own = knobs.get("readout")
    target, readout = stub_reads(pair, own if own not in (None, "draft") else None)
    blend = knobs.get("blend") or Blend(0.0)
    beta = torch.tensor([knobs.get("beta", 0.0)], dtype=torch.float64)

    def next_token(answer: Answer) -> list[float]:
        text = [*prompt, *answer]
        logits = blend.mix(target(text)[None, None], readout(text)[None, None], beta, torch.tensor([[len(answer)]]))
        return logits[0, 0].softmax(-1).tolist()

    return PowerOracle(next_token, alpha, stops)


def matrix_of(pair: Any, prompt: list[int], tokens: int, law: Law, **knobs: Any) -> dict[Answer, Law]:
    """[from][to] of one step of the real chain."""
    return {x: chain_law(pair, prompt, tokens, x, steps=1, blocks=1, **knobs) for x in law}


def assert_reversible(matrix: dict[Answer, Law], law: Law) -> None:
    assert total_variation(carried(matrix, law), law) <= TV_TOLERANCE
    for x in law:
        assert sum(matrix[x].values()) == pytest.approx(1.0, abs=TV_TOLERANCE)
        for y in law:
            there, back = law[x] * matrix[x].get(y, 0.0), law[y] * matrix[y].get(x, 0.0)
            assert there == pytest.approx(back, abs=TV_TOLERANCE)


CASES: list[tuple[int, int, float, tuple[int, ...], dict[str, Any]]] = [  # vocabulary, tokens, α, stops, knobs
    (3, 3, 2.5, (2,), {}),
    (2, 4, 4.0, (0,), {}),
    (5, 2, 0.7, (1, 3), {}),
    (3, 3, 3.0, (0,), {"beta": 0.6}),
    (3, 3, 2.0, (1,), {"beta": -0.7}),
    (2, 4, 1.5, (1,), {"beta": 0.4, "blend": Blend(0.0, "log_probs")}),
    (4, 2, 2.0, (0, 2), {"beta": -0.5, "blend": Blend(0.0, "log_probs", candidates=3)}),
    (3, 3, 2.0, (2,), {"beta": 0.5, "blend": Blend(0.0, "probs", schedule=Adaptive("js"), plausibility=0.05)}),
]


@pytest.mark.parametrize("speculative", [False, True], ids=["plain", "drafted"])
@pytest.mark.parametrize(("vocab", "tokens", "alpha", "stops", "knobs"), CASES)
def test_a_step_is_reversible_for_the_power(
    vocab: int, tokens: int, alpha: float, stops: tuple[int, ...], knobs: dict[str, Any], speculative: bool
) -> None:
    pair, prompt = stub_pair(vocab, 3), [1, 0, 1]
    oracle = oracle_of(pair, prompt, alpha, stops, **knobs)
    law = {x: mass for x, mass in oracle.target(tokens).items() if mass}
    assert len({len(x) for x in law}) == tokens  # answers of every length
    given = {"alpha": alpha, "stop_token_ids": list(stops), "speculative": speculative, **knobs}
    matrix = matrix_of(pair, prompt, tokens, law, **given)
    assert_reversible(matrix, law)
    for x in law:  # and the step is the textbook's, not another reversible one
        assert total_variation(matrix[x], oracle.step({x: 1.0}, tokens)) <= TV_TOLERANCE


@pytest.mark.parametrize("readout", ["draft", "table"])
@pytest.mark.parametrize("speculative", [False, True], ids=["plain", "drafted"])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_growing_and_several_steps(readout: str, speculative: bool, beta: float) -> None:
    """Lengths one after the other, with a step at each; answers that end early go to the last length."""
    pair, prompt, stops = stub_pair(2, 3), [1, 0], (1,)
    knobs: dict[str, Any] = {"beta": beta, "readout": "draft" if readout == "draft" or not beta else table_readout(2)}
    oracle = oracle_of(pair, prompt, 2.0, stops, **knobs)
    given = {"alpha": 2.0, "stop_token_ids": list(stops), "speculative": speculative, **knobs}
    law = chain_law(pair, prompt, 2, steps=1, blocks=2, **given)
    assert total_variation(law, oracle.chain([1, 2], 1)) <= TV_TOLERANCE
    if not speculative:
        law = chain_law(pair, prompt, 3, steps=2, blocks=1, **given)
        assert total_variation(law, oracle.chain([3], 2)) <= TV_TOLERANCE


@pytest.mark.parametrize("readout", ["draft", "without"])
def test_the_chain_of_a_real_pair(readout: str) -> None:
    """Over a real target and draft in fp64: caches take part, and come back after a rejection (two steps)."""
    from dgd_lightning.decode.readouts.without_context import WithoutContext

    target = make_target(vocab_size=2, hidden_size=16, intermediate_size=16)
    pair = Pair(target, make_draft(target, block_size=3), None)
    prompt, stops = [1, 0, 1], (1,)

    def read(text: list[int]) -> Tensor:
        return target.model(torch.tensor([text])).logits[0, -1]

    def next_token(answer: Answer) -> list[float]:
        logits = read([*prompt, *answer])
        return ((1 - beta) * logits + beta * read([0, *answer])).softmax(-1).tolist()

    beta = 0.0 if readout == "draft" else -0.5
    with torch.no_grad():
        oracle = PowerOracle(next_token, 3.0, stops)
        expected = oracle.step(oracle.step({(0, 0, 0): 1.0}, 3), 3)

    def generate(pair: Pair, prompts: list[Tensor], **given: Any) -> Any:
        own = WithoutContext([torch.tensor([0])] * len(prompts)) if beta else "draft"
        start = [torch.tensor([0, 0, 0])] * len(prompts)
        return power_generate(pair, prompts, beta=beta, readout=own, start=start, **given)

    from distribution_tools import output_law

    given = {"alpha": 3.0, "stop_token_ids": list(stops), "steps": 2, "blocks": 1, "speculative": False}
    assert total_variation(output_law(generate, pair, prompt, 3, **given), expected) <= TV_TOLERANCE


def test_the_published_code_is_biased_where_answers_end_early() -> None:
    """Its step leaves p^α invariant while no answer ends early, and is off where they do (docs/power.md: how much)."""
    pair, prompt = stub_pair(3, 3), [1, 0, 1]
    given: dict[str, Any] = {"alpha": 2.0, "mode": "reference", "speculative": False}
    same = oracle_of(pair, prompt, 2.0, ()).target(3)
    assert_reversible(matrix_of(pair, prompt, 3, same, stop_token_ids=[], **given), same)
    law = oracle_of(pair, prompt, 2.0, (2,)).target(3)
    matrix = {x: chain_law(pair, prompt, len(x), x, steps=1, blocks=1, stop_token_ids=[2], **given) for x in law}
    assert all(len(y) <= len(x) for x in law for y in matrix[x])  # answers never become longer
    assert total_variation(carried(matrix, law), law) > 0.02


def plant_long_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cut is uniform over the longest answer that there can be."""
    cuts = Chains._cuts

    def longer(self: Chains, rows: list[int]) -> list[int]:
        own = [self.chains[row].tokens for row in rows]
        for row in rows:
            chain = self.chains[row]
            chain.tokens = torch.zeros(chain.limit)
        drawn = cuts(self, rows)
        for row, tokens in zip(rows, own, strict=True):
            self.chains[row].tokens = tokens
        return [min(cut, len(tokens) - 1) for cut, tokens in zip(drawn, own, strict=True)]

    monkeypatch.setattr(Chains, "_cuts", longer)


def plant_ratio(change: Any) -> Any:
    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Chains, "_log_ratio", lambda self, chain, scores: change(chain, scores[1].double()))

    return plant


def no_length_factor(chain: Chain, new: Tensor) -> Tensor:
    return new[chain.cut :].sum() - chain.scores[1][chain.cut :].sum()


def lengths(chain: Chain, new: Tensor) -> float:
    return math.log(len(chain.tokens) / len(new))


def cut_by_length(chain: Chain, new: Tensor) -> Tensor:
    """The sums end with the shorter answer."""
    most = min(len(new), len(chain.tokens))
    return new[chain.cut : most].sum() - chain.scores[1][chain.cut : most].sum() + lengths(chain, new)


def wrong_position(chain: Chain, new: Tensor) -> Tensor:
    """Z of the token before the one meant: of the last token there is none."""
    return new[chain.cut : -1].sum() - chain.scores[1][chain.cut : -1].sum() + lengths(chain, new)


def plant_normaliser(change: Any) -> Any:
    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        kept = batch_module.log_normalisers
        monkeypatch.setattr(batch_module, "log_normalisers", lambda p, sampling: kept(*change(p, sampling)))

    return plant


def plant_warm_proposals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proposals are drawn at temperature 1."""
    choose = batch_module.choose
    from dgd_lightning.decode import drafter

    def warm(logits: Tensor, sampling: Any, *others: Any) -> Tensor:
        return choose(logits, sampling._replace(temperature=1.0), *others)

    monkeypatch.setattr(drafter, "choose", warm)
    monkeypatch.setattr(batch_module, "choose", warm)


def plant_left_suffix(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a rejected proposal wrote into the caches stays there."""
    copy = Chains._copy
    monkeypatch.setattr(
        Chains, "_copy", lambda self, parts, *, back=False: None if back else copy(self, parts, back=back)
    )


BUGS: dict[str, Any] = {
    "long cut": plant_long_cut,
    "no length factor": plant_ratio(no_length_factor),
    "cut by length": plant_ratio(cut_by_length),
    "wrong position": plant_ratio(wrong_position),
    "filtered": plant_normaliser(lambda p, sampling: (p, sampling._replace(top_k=2))),
    "alpha twice": plant_normaliser(lambda p, sampling: (p / sampling.temperature, sampling)),
    "warm proposals": plant_warm_proposals,
    "left suffix": plant_left_suffix,
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_seen(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, prompt, stops = stub_pair(3, 3, seed=5), [1, 0, 1], (2,)
    steps = 2 if bug == "left suffix" else 1
    seen = BUG_IS_SEEN / 10 if steps > 1 else BUG_IS_SEEN  # only where a later cut comes behind a rejection
    given = {"alpha": 1.3, "stop_token_ids": list(stops), "speculative": False, "steps": steps, "blocks": 1}
    oracle = oracle_of(pair, prompt, 1.3, stops)
    law = oracle.target(3)
    likely = sorted(law, key=lambda x: (-len(x), -law[x]))[: 1 if steps > 1 else len(law)]

    def most() -> float:
        """How far the law after these steps is from the textbook's, from where it is farthest."""
        distances = []
        for x in likely:
            expected: Law = {x: 1.0}
            for _ in range(steps):
                expected = oracle.step(expected, 3)
            distances.append(total_variation(chain_law(pair, prompt, 3, x, **given), expected))
        return max(distances)

    assert most() <= TV_TOLERANCE
    BUGS[bug](monkeypatch)
    assert most() > seen


def surprise(counts: Counter[Answer], law: Law) -> float:
    """χ² over its quantile at the false alarm rate, of answers that are expected often enough: above 1 is an alarm."""
    rows = sum(counts.values())
    often = {x: rows * mass for x, mass in law.items() if rows * mass > 10}
    cells = [(counts[x], expected) for x, expected in often.items()]
    cells.append((rows - sum(seen for seen, _ in cells), rows - sum(often.values())))
    statistic = sum((seen - expected) ** 2 / max(expected, 1.0) for seen, expected in cells)
    return statistic / float(chi2.isf(FALSE_ALARM, len(cells) - 1))


@pytest.mark.parametrize("speculative", [False, True], ids=["plain", "drafted"])
def test_real_random_numbers_are_new_in_every_step(speculative: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, prompt, rows = stub_pair(3, 3), [1, 0, 1], 3000
    oracle = oracle_of(pair, prompt, 2.5, (2,))
    law: Law = {(0, 1, 0): 1.0}
    for _ in range(3):
        law = oracle.step(law, 3)

    def drawn() -> Counter[Answer]:
        start, prompts = [torch.tensor([0, 1, 0])] * rows, [torch.tensor(prompt)] * rows
        knobs: dict[str, Any] = {"alpha": 2.5, "blocks": 1, "steps": 3, "speculative": speculative}
        outputs = power_generate(pair, prompts, max_new_tokens=3, stop_token_ids=[2], start=start, seed=1, **knobs)
        return Counter(tuple(output.tokens.tolist()) for output in outputs)

    assert surprise(drawn(), law) < 1
    renew = Batch.renew  # planted: every step draws with the same numbers
    monkeypatch.setattr(Batch, "renew", lambda self, rows, seeds: renew(self, rows, [row + 77 for row in rows]))
    assert surprise(drawn(), law) > 1
