"""The blend's formulas against plain Python, bit-exact null cases, constraints, schedules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dgd_lightning.decode.blending import (
    Adaptive,
    Blend,
    Constant,
    Disagree,
    Schedule,
    WarmUp,
)
from dgd_lightning.decode.sampling import probabilities, sampling_params
from dgd_lightning.distributions import entropy, js_divergence, kl_divergence

VOCAB = 7
SAME = 1e-12  # fp64, a handful of operations


def some_logits(seed: int, dtype: torch.dtype = torch.float64, rows: int = 3, slots: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(rows, slots, VOCAB, generator=generator, dtype=torch.float64)).to(dtype)


def steps(rows: int = 3, slots: int = 4) -> Tensor:
    """Tokens generated before each position; row r has r·5 behind it."""
    return torch.arange(slots) + 5 * torch.arange(rows)[:, None]


def mixed(blend: Blend, target: Tensor, readout: Tensor) -> Tensor:
    betas = torch.tensor(blend.betas(len(target)), dtype=torch.float64)
    return blend.mix(target, readout, betas, steps(*target.shape[:2]))


def softmax(logits: list[float]) -> list[float]:
    parts = [math.exp(x - max(logits)) for x in logits]
    return [part / sum(parts) for part in parts]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def js(p: list[float], q: list[float]) -> float:
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return (kl(p, middle) + kl(q, middle)) / 2


def plain_entropy(p: list[float]) -> float:
    return -sum(a * math.log(a) for a in p)


def plain_factor(schedule: Schedule, p: list[float], r: list[float], step: int) -> float:
    """What the docstrings say, in plain Python."""
    if isinstance(schedule, WarmUp):
        return min(1.0, step / schedule.tokens)
    if isinstance(schedule, Disagree):
        return float(p.index(max(p)) != r.index(max(r)))
    if isinstance(schedule, Adaptive):
        gap = max(0.0, plain_entropy(p) - plain_entropy(r)) / math.log(len(p))
        return {"js": js(p, r) / math.log(2), "kl": 1 - math.exp(-kl(r, p)), "entropy_gap": gap}[schedule.by]
    return 1.0


SCHEDULES = [Constant(), WarmUp(6), Disagree(), Adaptive("js"), Adaptive("kl"), Adaptive("entropy_gap")]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("space", ["logits", "log_probs", "probs"])
def test_formula(schedule: Schedule, space: Any) -> None:
    betas = [0.25, 0.7, 1.0] if space == "probs" else [-1.5, 0.25, 1.0]
    target, readout = some_logits(1), some_logits(2)
    guided = mixed(Blend(betas, space, schedule=schedule), target, readout)
    seen = set()
    for row in range(3):
        for slot in range(4):
            t, r = target[row, slot].tolist(), readout[row, slot].tolist()
            p, q = softmax(t), softmax(r)
            factor = plain_factor(schedule, p, q, slot + 5 * row)
            strength = betas[row] * factor
            seen.add(round(factor, 6))
            if space == "probs":
                distribution = [(1 - strength) * a + strength * b for a, b in zip(p, q, strict=True)]
            else:
                logits = [(1 - strength) * a + strength * b for a, b in zip(t, r, strict=True)]
                distribution = softmax(logits)
                if space == "logits":
                    assert guided[row, slot].tolist() == pytest.approx(logits, abs=SAME)
            assert guided[row, slot].softmax(-1).tolist() == pytest.approx(distribution, abs=SAME)
    assert len(seen) > 1 or isinstance(schedule, Constant)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("knobs", [{}, {"candidates": 3}, {"plausibility": 0.1}, {"space": "log_probs"}], ids=str)
def test_normalised_only_where_that_is_read(
    schedule: Schedule, knobs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, readout, betas = some_logits(8), some_logits(9), [-1.5, 0.0, 1.0]
    normalised, log_softmax = [], Tensor.log_softmax

    def counted(logits: Tensor, dim: int) -> Tensor:
        normalised.append(logits)
        return log_softmax(logits, dim)

    monkeypatch.setattr(Tensor, "log_softmax", counted)
    guided = mixed(Blend(betas, schedule=schedule, **knobs), target, readout)
    plain = isinstance(schedule, Constant | WarmUp) and "space" not in knobs and "plausibility" not in knobs
    assert len(normalised) == (0 if plain else 2)
    # Bit for bit what a schedule that asks for log-probabilities gives.
    monkeypatch.setattr(type(schedule), "reads", True)
    assert torch.equal(guided, mixed(Blend(betas, schedule=schedule, **knobs), target, readout))
    assert len(normalised) == (2 if plain else 4)


@pytest.mark.parametrize("knobs", [{}, {"temperature": 0.7}, {"temperature": 1.3, "top_p": 0.8}])
def test_log_probs_give_the_law_of_logits(knobs: dict[str, Any]) -> None:
    target, readout = some_logits(3), some_logits(4) + 11.0  # a constant per position changes nothing
    sampling = sampling_params(**({"temperature": 1.0} | knobs))
    distributions = [
        probabilities(mixed(Blend(-0.6, space), target, readout), sampling) for space in ("logits", "log_probs")
    ]
    torch.testing.assert_close(*distributions, rtol=0, atol=SAME)
    mixture = probabilities(mixed(Blend(0.6, "probs"), target, readout), sampling_params(1.0))
    torch.testing.assert_close(mixture, 0.4 * target.softmax(-1) + 0.6 * readout.softmax(-1), rtol=0, atol=SAME)
    assert (mixture - mixed(Blend(0.6), target, readout).softmax(-1)).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("space", ["logits", "log_probs", "probs"])
def test_null_cases_bit_for_bit(space: Any, dtype: torch.dtype) -> None:
    target, readout = some_logits(5, dtype), some_logits(6, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    none = mixed(Blend(0.0, space, candidates=2, plausibility=0.5), target, readout)
    assert none.dtype == wide
    assert torch.equal(none, target.to(wide))
    rows = mixed(Blend([0.0, 0.5, 1.0], space), target, readout)
    assert torch.equal(rows[0], target[0].to(wide))
    assert not torch.equal(rows[1], target[1].to(wide))
    if space == "logits":
        assert torch.equal(rows[2], readout[2].to(wide))
    torch.testing.assert_close(rows[2].softmax(-1), readout[2].to(wide).softmax(-1))
    for beta in (0.0, 1.0):  # nor does what has no weight spoil it
        torn = torch.full_like(target, -math.inf)
        pure = mixed(Blend(beta), *((target, torn) if beta == 0 else (torn, readout)))
        assert torch.equal(pure, (target if beta == 0 else readout).to(wide))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("space", ["logits", "log_probs", "probs"])
def test_extreme_laws_give_numbers(space: Any, schedule: Schedule, dtype: torch.dtype) -> None:
    """Equal distributions, one-hot distributions, opposite ones: divergences of 0 and of all there is."""
    hot = torch.zeros(VOCAB, dtype=dtype).index_fill(0, torch.tensor([2]), 300.0)
    rows = [hot, hot.flip(0), torch.zeros(VOCAB, dtype=dtype), *some_logits(7, dtype).flatten(0, 1)]
    rows += [row * (1 + 4 * torch.finfo(dtype).eps) for row in rows]
    target = torch.stack([a for a in rows for _ in rows])[:, None]  # [B, 1, V]
    readout = torch.stack([b for _ in rows for b in rows])[:, None]
    for beta in (0.3, 1.0) if space == "probs" else (-1.0, 0.3, 1.0):
        guided = mixed(Blend(beta, space, schedule=schedule), target, readout)
        assert not guided.isnan().any()
        assert not guided.softmax(-1).isnan().any()
        factor = schedule(target.log_softmax(-1), readout.log_softmax(-1), steps(len(target), 1))
        assert ((factor >= 0) & (factor <= 1)).all()


def test_a_schedule_of_ones_own_stays_within_a_mixture() -> None:
    def double(target: Tensor, readout: Tensor, step: Tensor) -> Tensor:
        return torch.full_like(target[..., 0], 2.0)

    target, readout = some_logits(8), some_logits(9)
    guided = mixed(Blend(0.75, "probs", schedule=double), target, readout)
    torch.testing.assert_close(guided.softmax(-1), readout.softmax(-1), rtol=0, atol=SAME)
    torch.testing.assert_close(mixed(Blend(0.75, schedule=double), target, readout), 1.5 * readout - 0.5 * target)


def test_constraints() -> None:
    target, readout = some_logits(10), some_logits(11)
    betas, free = [-0.5, 0.0, 1.0], mixed(Blend([-0.5, 0.0, 1.0]), target, readout)
    for knobs in ({"candidates": 3}, {"plausibility": 0.2}, {"candidates": 4, "plausibility": 0.1}):
        guided = mixed(Blend(betas, **knobs), target, readout)
        for row, slot in ((0, 0), (0, 3), (2, 1), (2, 2)):
            p = target[row, slot].softmax(-1).tolist()
            likely = sorted(range(VOCAB), key=p.__getitem__)[-knobs.get("candidates", VOCAB) :]
            kept = [i for i in likely if p[i] >= knobs.get("plausibility", 0.0) * max(p)]
            assert guided[row, slot].isfinite().nonzero()[:, 0].tolist() == sorted(kept)
            assert torch.equal(guided[row, slot, kept], free[row, slot, kept])
        assert torch.equal(guided[1], target[1])
    for knobs in ({"candidates": 1}, {"plausibility": 1.0}):
        assert torch.equal(mixed(Blend(1.0, **knobs), target, readout).argmax(-1), target.argmax(-1))
    for knobs in ({"candidates": VOCAB}, {"candidates": 99}, {"plausibility": 1e-12}):
        assert torch.equal(mixed(Blend(betas, **knobs), target, readout), free)
    tied = torch.tensor([[[1.0, 1.0, 1.0, 0.0]]])
    assert mixed(Blend(0.5, candidates=2), tied, tied).isfinite().tolist() == [[[True, True, True, False]]]


def test_divergences_against_torch() -> None:
    log_p, log_q = some_logits(12).log_softmax(-1), some_logits(13).log_softmax(-1)
    distribution = torch.distributions.Categorical(logits=log_p)
    other = torch.distributions.Categorical(logits=log_q)
    torch.testing.assert_close(entropy(log_p), distribution.entropy(), rtol=0, atol=SAME)
    torch.testing.assert_close(
        kl_divergence(log_p, log_q), torch.distributions.kl_divergence(distribution, other), rtol=0, atol=SAME
    )
    torch.testing.assert_close(js_divergence(log_p, log_q), js_divergence(log_q, log_p), rtol=0, atol=SAME)
    hot = torch.eye(2, dtype=torch.float64).log()
    assert js_divergence(hot[0], hot[1]).item() == pytest.approx(math.log(2))
    assert kl_divergence(hot[0], hot[1]).item() == math.inf
    assert entropy(hot[0]).item() == js_divergence(hot[0], hot[0]).item() == kl_divergence(hot[0], hot[0]).item() == 0


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("schedule.tokens", lambda: WarmUp(0)),
        ("schedule.tokens", lambda: WarmUp(2.5)),  # type: ignore[arg-type]
        ("schedule.by", lambda: Adaptive("tv")),  # type: ignore[arg-type]
        ("beta", lambda: Blend(math.nan)),
        ("beta", lambda: Blend((0.1, 0.2)).betas(3)),
        ("candidates", lambda: Blend(0.1, candidates=True)),
    ],
)
def test_bad_input(name: str, make: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected .*, received .*Hint: "):
        make()
