"""Populations of particles: Ẑ is unbiased for every N, errors fall as 1/√N, and sub-batches give the same weights."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from decode_tools import random_prompts
from distribution_tools import stub_pair
from test_power_distribution import oracle_of
from tiny import make_pair

from dgd_lightning.decode.batch import Batch
from dgd_lightning.methods import particles as particles_module
from dgd_lightning.methods.particles import Population, grown
from dgd_lightning.methods.power import Power, power_generate
from dgd_lightning.types import DecodeOutput

PROMPT, STOPS, TOKENS, ALPHA = [1, 0, 1], (2,), 4, 2.0
SIGMAS = 5.0  # false alarm 6e-7


def details(output: DecodeOutput) -> dict[str, Any]:
    assert output.trace.details is not None
    return output.trace.details


def populations(count: int, runs: int, **knobs: Any) -> np.ndarray:
    """log Ẑ [runs] over the stub pair."""
    given: dict[str, Any] = {"alpha": ALPHA, "blocks": 4, "speculative": False} | knobs
    (output,) = power_generate(
        stub_pair(3, 3),
        [torch.tensor(PROMPT)],
        max_new_tokens=TOKENS,
        mode="smc",
        particles=count,
        runs=runs,
        stop_token_ids=list(STOPS),
        seed=7,
        **given,
    )
    return np.array(details(output)["runs"])


def evidence(alpha: float = ALPHA, **knobs: Any) -> float:
    return sum(oracle_of(stub_pair(3, 3), PROMPT, alpha, STOPS, **knobs).weights(TOKENS).values())


def deviation(log_z: np.ndarray, expected: float) -> float:
    """How far the mean of Ẑ is from what it should be, in its standard errors."""
    z = np.exp(log_z)
    return abs(z.mean() - expected) / (z.std(ddof=1) / math.sqrt(len(z)))


@pytest.mark.parametrize("count", [1, 2, 5, 16])
@pytest.mark.parametrize("ramp", [0, 3])
def test_the_evidence_is_unbiased_for_every_number_of_particles(count: int, ramp: int) -> None:
    assert deviation(populations(count, 300, ramp=ramp, resample_below=0.9), evidence()) < SIGMAS


@pytest.mark.parametrize("knobs", [{"beta": 0.5}, {"beta": -0.6, "speculative": True}, {"speculative": True}])
def test_the_evidence_of_blends_and_drafted_particles(knobs: dict[str, Any]) -> None:
    expected = evidence(beta=knobs.get("beta", 0.0))
    assert deviation(populations(8, 200, **knobs), expected) < SIGMAS


def test_errors_fall_with_the_square_root() -> None:
    """Of log Ẑ and of an expectation, from 64 particles on."""
    oracle = oracle_of(stub_pair(3, 3), PROMPT, ALPHA, STOPS)
    law, log_z = oracle.target(TOKENS), math.log(evidence())
    share = sum(mass for answer, mass in law.items() if len(answer) == 2)
    counts, runs, errors = (64, 1024), 100, {"evidence": [], "share": []}  # type: ignore[var-annotated]
    pair, method = stub_pair(3, 3), Power(ALPHA, blocks=4, mode="smc", speculative=False)
    for count in counts:
        found = []
        for run in range(runs):
            population = particles_of(pair, method, count, seed=run)
            weights = np.exp(population.log_w - population.log_w.max())
            short = np.array([len(tokens) == 2 for tokens in population.tokens])
            found.append((population.log_evidence - log_z, (weights * short).sum() / weights.sum() - share))
        for values, column in zip(errors.values(), np.array(found).T, strict=True):
            values.append(math.sqrt((column**2).mean()))
    for values in errors.values():
        slope = np.polyfit(np.log(counts), np.log(values), 1)[0]
        assert slope == pytest.approx(-0.5, abs=0.1)


def particles_of(pair: Any, method: Power, count: int, seed: int, at_once: int | None = None) -> Any:
    from dgd_lightning.decode.call import Call, check_request
    from dgd_lightning.decode.sampling import sampling_params

    call = Call(TOKENS, sampling_params(1 / method.alpha), list(STOPS), seed=[0], log_probs=True)
    request = check_request(pair, [torch.tensor(PROMPT)], call)
    population = Population(request, method.levels(TOKENS), method.alphas(), count, method.resample_below, 1, None)
    with torch.no_grad():
        return grown(
            population,
            lambda part, **more: method.loop(pair, part, method.readout, **more),
            seed,
            at_once or count,
        )


@pytest.mark.parametrize("speculative", [False, True], ids=["plain", "drafted"])
@pytest.mark.parametrize("beta", [0.0, 0.4])
def test_sub_batches_give_the_same_population(speculative: bool, beta: float) -> None:
    """Of a real pair in fp64: rows copied in the caches are what reading the copied tokens again gives."""
    pair, (prompt,) = make_pair(block_size=4), random_prompts(1, seed=3)
    given: dict[str, Any] = {"alpha": 3.0, "blocks": 6, "mode": "smc", "particles": 7, "resample_below": 1.0}
    given |= {"speculative": speculative, "beta": beta, "runs": 2, "ramp": 3}
    whole, parts = (
        power_generate(pair, [prompt], max_new_tokens=24, seed=5, stop_token_ids=[3, 9], at_once=at_once, **given)[0]
        for at_once in (None, 3)
    )
    assert whole.tokens.tolist() == parts.tokens.tolist()
    assert details(whole)["log_weights"] == pytest.approx(details(parts)["log_weights"], abs=1e-9)
    assert details(whole)["runs"] == pytest.approx(details(parts)["runs"], abs=1e-9)
    assert sum(details(whole)["resampled"]) >= 2


def test_too_many_particles_for_the_memory_are_decoded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, (prompt,) = make_pair(block_size=4), random_prompts(1, seed=3)
    given: dict[str, Any] = {"alpha": 3.0, "blocks": 3, "mode": "smc", "particles": 8, "seed": 1}
    expected = power_generate(pair, [prompt], max_new_tokens=12, **given)[0]
    begin, sizes = Batch.__init__, []

    def small(self: Batch, session: Any, **options: Any) -> None:
        sizes.append(len(session.request.rows))
        if sizes[-1] > 3:
            raise torch.OutOfMemoryError("as on a small device")
        begin(self, session, **options)

    monkeypatch.setattr(Batch, "__init__", small)
    found = power_generate(pair, [prompt], max_new_tokens=12, **given)[0]
    assert sizes[:3] == [8, 4, 2]
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert len(details(found)["log_weights"]) == 8


def test_caches_left_behind_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: resampling forgets whose caches are whose."""
    pair, (prompt,) = make_pair(block_size=4), random_prompts(1, seed=3)
    given: dict[str, Any] = {"alpha": 3.0, "blocks": 6, "mode": "smc", "particles": 7, "resample_below": 1.0}

    def weights() -> list[float]:
        (output,) = power_generate(pair, [prompt], max_new_tokens=24, seed=5, stop_token_ids=[], **given)
        return details(output)["log_weights"]

    expected, copy = weights(), Batch.copy_rows

    def forget(self: Batch, parents: list[int]) -> None:
        kept, self._change = self._change, lambda change: None  # type: ignore[method-assign]
        copy(self, parents)
        self._change = kept  # type: ignore[method-assign]

    monkeypatch.setattr(Batch, "copy_rows", forget)
    assert weights() != pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("forgotten", ["ended", "log_w"])
def test_resampling_that_forgets_is_seen(forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: particles keep whether their place had ended, or weights that resampling has made equal."""
    resample = particles_module.resample

    def forget(particles: Any, uniform: float) -> list[int]:
        kept = getattr(particles, forgotten)
        parents = resample(particles, uniform)
        setattr(particles, forgotten, kept)
        return parents

    monkeypatch.setattr(particles_module, "resample", forget)
    assert deviation(populations(8, 800, ramp=4, resample_below=1.0), evidence()) > SIGMAS
