"""What the tests of power sampling share: p of whole answers, p^α, and the chain written out in plain Python.

The chain here knows nothing of the code: it is built from the two sets of probabilities p(x) and q(x | prefix), which
come from tables or from transformers' forward.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from distribution_tools import output_law
from torch import Tensor, tensor

from dgd_lightning.methods.power import power_generate

Answer = tuple[int, ...]
Law = dict[Answer, float]
NextToken = Callable[[Answer], list[float]]  # p of every token behind the prompt and these new tokens


class PowerOracle:
    """p^α over answers of at most so many tokens, and the chain's own steps."""

    def __init__(self, next_token: NextToken, alpha: float, stops: Sequence[int]) -> None:
        self.next_token, self.alpha, self.stops = next_token, alpha, stops

    def ended(self, answer: Answer) -> bool:
        return bool(answer) and answer[-1] in self.stops

    def proposals(self, prefix: Answer, limit: int) -> Law:
        """Answers that begin with a prefix and go on by q to a stop token or the limit."""
        if self.ended(prefix) or len(prefix) == limit:
            return {prefix: 1.0}
        powers = [p**self.alpha for p in self.next_token(prefix)]
        law: Law = defaultdict(float)
        for token, power in enumerate(powers):
            for answer, mass in self.proposals((*prefix, token), limit).items() if power else ():
                law[answer] += mass * power / sum(powers)
        return law

    def log_p(self, answer: Answer) -> float:
        return sum(math.log(self.next_token(answer[:at])[token]) for at, token in enumerate(answer))

    def weights(self, limit: int) -> Law:
        """p(x)^α of every answer."""
        return {answer: math.exp(self.alpha * self.log_p(answer)) for answer in self.proposals((), limit)}

    def target(self, limit: int) -> Law:
        """p^α, normalised."""
        weights = self.weights(limit)
        return {answer: weight / sum(weights.values()) for answer, weight in weights.items()}

    def step(self, law: Law, limit: int) -> Law:
        """Metropolis–Hastings by the textbook: π(y)·q(x | y) over π(x)·q(y | x), with the chance of the cut in q."""
        after: Law = defaultdict(float)
        for x, mass in law.items():
            for cut in range(len(x)):
                for y, q in self.proposals(x[:cut], limit).items():
                    back = self.proposals(y[:cut], limit)[x]
                    ratio = math.exp(self.alpha * (self.log_p(y) - self.log_p(x))) * (back / len(y)) / (q / len(x))
                    chance = mass * q / len(x)
                    after[y] += chance * min(1.0, ratio)
                    after[x] += chance * (1 - min(1.0, ratio))
        return after

    def chain(self, levels: Sequence[int], steps: int) -> Law:
        """Growing, with so many steps at every length; an answer that ends while it grows goes to the last length."""
        law: Law = {(): 1.0}
        over: Law = defaultdict(float)
        for level in levels:
            grown: Law = defaultdict(float)
            for x, mass in law.items():
                for y, q in self.proposals(x, level).items():
                    (over if self.ended(y) and level != levels[-1] else grown)[y] += mass * q
            law = grown
            for _ in range(steps):
                law = self.step(law, level)
        for _ in range(steps):
            over = self.step(over, levels[-1])
        return {x: law.get(x, 0.0) + over.get(x, 0.0) for x in {*law, *over}}


def chain_law(pair: Any, prompt: list[int], tokens: int, start: Answer | None = None, **knobs: Any) -> Law:
    """The law of the real code's chain: of its answer after all its steps, every outcome of its draws walked once."""

    def generate(pair: Any, prompts: list[Tensor], **given: Any) -> Any:
        begun = None if start is None else [tensor(start)] * len(prompts)
        return power_generate(pair, prompts, start=begun, **given)

    return output_law(generate, pair, prompt, tokens, **knobs)


def carried(matrix: dict[Answer, Law], law: Law) -> Law:
    """A law after one step of a chain."""
    after: Law = defaultdict(float)
    for x, mass in law.items():
        for y, chance in matrix[x].items():
            after[y] += mass * chance
    return after
