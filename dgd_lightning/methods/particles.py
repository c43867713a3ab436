"""Sequential Monte Carlo for `Power`: answers that grow together, weighted, and resampled at the ends of blocks.

A particle's tokens are drawn from q = p^a / Z, a being the exponent of its block, so that its log-weight gains Σ log Z;
where the exponent rises from a to a′, it also gains (a′ − a)·log p of what is there already. At the end weights are
those of p^α. Resampling keeps their mean: Ẑ, the product of the mean weights, has the expectation Σ_x p(x)^α for any
number of particles. Sources: Del Moral, Doucet & Jasra 2006; Power-SMC (arXiv 2602.10273).
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dgd_lightning.decode.call import Request
from dgd_lightning.methods.guided import GuidedLoop
from dgd_lightning.seeds import mixed_seed
from dgd_lightning.types import DecodeOutput, DecodeTrace, StopReason

NewLoop = Callable[..., GuidedLoop]  # of a request, with a limit and tokens to start from


class Population(NamedTuple):
    """What is asked for one prompt."""

    request: Request  # of one row
    levels: list[int]  # new tokens at the ends of blocks
    alphas: list[float]  # the exponent in each block
    particles: int  # N
    resample_below: float  # share of N
    runs: int
    at_once: int | None


@dataclass
class Particles:
    """Answers of one prompt, their log-weights since they were resampled, and what was spent on them."""

    tokens: list[Tensor]  # N of [T]
    ended: list[bool]  # N
    log_p: np.ndarray  # [N] of the tokens, summed
    log_w: np.ndarray  # [N]
    log_mean: float = 0.0  # of the weights that resampling made equal: its part of log Ẑ
    sizes: list[float] = field(default_factory=list)  # effective sample size at the end of each block
    resampled: list[bool] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)  # of all verifications
    verified: list[int] = field(default_factory=list)
    drafts: int = 0
    prefill_seconds: float = 0.0

    @property
    def log_evidence(self) -> float:
        """log Ẑ."""
        return self.log_mean + log_mean_exp(self.log_w)


def power_smc(population: Population, new_loop: NewLoop) -> DecodeOutput:
    """An answer of one prompt, drawn by weight."""
    request, began = population.request, time.perf_counter()
    assert request.seeds is not None
    seed, at_once = request.seeds[0], population.at_once or population.particles
    current, every = None, []
    for number in range(population.runs):
        own = mixed_seed(seed, number)
        while True:
            try:
                particles = grown(population, new_loop, own, at_once)
                break
            except torch.OutOfMemoryError:
                if at_once == 1:
                    raise
            at_once = (at_once + 1) // 2  # never fewer particles: those that do not fit are decoded after the others
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        every.append(particles)
        draw, keep = np.random.Generator(np.random.PCG64(mixed_seed(own, 1))).random(2)
        evidence = particles.log_evidence
        if current is None or keep < math.exp(min(0.0, evidence - current[0].log_evidence)):
            weights = np.exp(particles.log_w - particles.log_w.max())
            edges = weights.cumsum()
            chosen = min(int(np.searchsorted(edges, draw * edges[-1], "right")), len(weights) - 1)
            current = particles, chosen, number
    assert current is not None
    particles, chosen, number = current
    accepted = [length for one in every for length in one.accepted]
    details = {
        "alpha": population.alphas[-1],
        "particles": population.particles,
        "log_p": float(particles.log_p[chosen]),
        "alpha_log_p": population.alphas[-1] * float(particles.log_p[chosen]),
        "log_evidence": particles.log_evidence,
        "log_weights": particles.log_w.tolist(),
        "effective_sample_sizes": particles.sizes,
        "resampled": particles.resampled,
        "runs": [one.log_evidence for one in every],
        "run": number,
        "tokens_drawn": sum(accepted) + len(every) * population.particles,
    }
    prefill = sum(one.prefill_seconds for one in every)
    verified = [length for one in every for length in one.verified]
    trace = DecodeTrace(
        verified_lengths=verified,
        target_forwards=len(verified),
        draft_forwards=sum(one.drafts for one in every),
        prefill_seconds=prefill,
        decode_seconds=time.perf_counter() - began - prefill,
        batch_tokens=sum(accepted),
        seed=seed,
        details=details,
    )
    reason: StopReason = "stop" if particles.ended[chosen] else "length"
    return DecodeOutput(particles.tokens[chosen], accepted, reason, trace)


def grown(population: Population, new_loop: NewLoop, seed: int, at_once: int) -> Particles:
    """One population at its last length.

    All in one batch where ``at_once`` allows it. Else a batch after the other is read again at every length: the same
    random numbers, the same weights.
    """
    request, count = population.request, population.particles
    seeds = [mixed_seed(seed, 0, number) for number in range(count)]
    particles = Particles([torch.zeros(0, dtype=torch.long)] * count, [False] * count, np.zeros(count), np.zeros(count))
    whole: GuidedLoop | None = None
    before = population.alphas[0]
    for level, (limit, alpha) in enumerate(zip(population.levels, population.alphas, strict=True)):
        sampling = request.sampling._replace(temperature=1 / alpha)
        particles.log_w += (alpha - before) * particles.log_p
        before, growing = alpha, [number for number in range(count) if not particles.ended[number]]
        if at_once >= count:
            if whole is None:
                wanted = request._replace(rows=[0] * count, seeds=seeds, sampling=sampling)
                whole = new_loop(wanted, limit=limit)
                particles.prefill_seconds += whole.batch.prefill_seconds
            elif growing:
                whole.batch.request = whole.batch.request._replace(sampling=sampling)
                whole.batch.resume({n: len(particles.tokens[n]) for n in growing}, dict.fromkeys(growing, limit))
            take(particles, whole, growing, growing)
        else:
            for at in range(0, len(growing), at_once):
                part = growing[at : at + at_once]
                wanted = request._replace(rows=[0] * len(part), seeds=[seeds[n] for n in part], sampling=sampling)
                start = [particles.tokens[n] for n in part] if level else None
                loop = new_loop(wanted, limit=limit, start=start)
                particles.prefill_seconds += loop.batch.prefill_seconds
                take(particles, loop, part, list(range(len(part))))
        particles.sizes.append(effective_size(particles.log_w))
        last = level == len(population.levels) - 1
        few = particles.sizes[-1] < population.resample_below * count and not last
        particles.resampled.append(few)
        if few:
            uniform = np.random.Generator(np.random.PCG64(mixed_seed(seed, 2, level))).random()
            parents = resample(particles, uniform)
            if whole is not None:
                whole.batch.copy_rows(parents)
    return particles


def take(particles: Particles, loop: GuidedLoop, members: list[int], rows: list[int]) -> None:
    """Decode a loop's rows to their ends, and give them, with their weights, to the particles that they are."""
    batch = loop.batch
    known = [len(lengths) for lengths in batch.verified]
    while batch.active:
        loop.cycle()
    tokens, scores = batch.tokens.cpu(), batch.scores.double().cpu()
    stops = batch.request.stop_token_ids
    for number, row in zip(members, rows, strict=True):
        old, length = len(particles.tokens[number]), batch.ends[row] + 1 - batch.lengths[row]
        own = tokens[row, :length].clone()
        particles.tokens[number] = own
        particles.ended[number] = row in batch.completed or int(own[-1]) in stops
        particles.log_p[number] += scores[0, row, old:length].sum().item()
        particles.log_w[number] += scores[1, row, old:length].sum().item()
        particles.accepted += batch.accepted[row][known[row] :]
        particles.verified += batch.verified[row][known[row] :]
        particles.drafts += loop.drafts[row] * (len(batch.verified[row]) - known[row])


def resample(particles: Particles, uniform: float) -> list[int]:
    """Systematic resampling: parents of all places, in order; weights become equal, and keep their mean in log Ẑ.

    A particle of weight w has ⌊N·w⌋ or ⌈N·w⌉ children, N·w in expectation.
    """
    weights = np.exp(particles.log_w - particles.log_w.max())
    count = len(weights)
    edges = weights.cumsum()
    points = (np.arange(count) + uniform) / count * edges[-1]
    parents = np.minimum(np.searchsorted(edges, points, "right"), count - 1).tolist()
    particles.log_mean += log_mean_exp(particles.log_w)
    particles.log_w = np.zeros(count)
    particles.tokens = [particles.tokens[parent] for parent in parents]
    particles.ended = [particles.ended[parent] for parent in parents]
    particles.log_p = particles.log_p[parents]
    return parents


def effective_size(log_w: np.ndarray) -> float:
    """(Σw)² / Σw², from 1 to N."""
    weights = np.exp(log_w - log_w.max())
    return float(weights.sum() ** 2 / (weights**2).sum())


def log_mean_exp(log_w: np.ndarray) -> float:
    """log of the mean weight."""
    return float(log_w.max() + math.log(np.exp(log_w - log_w.max()).mean()))
