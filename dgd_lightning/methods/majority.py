"""Self-consistency: several answers per prompt, and the first of those whose final result most of them have.

Source: Wang et al. 2023, "Self-consistency improves chain of thought reasoning" (arXiv 2203.11171).
"""

import importlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dgd_lightning.checks import check_integer
from dgd_lightning.decode.call import Call
from dgd_lightning.decode.drafter import check_block_size
from dgd_lightning.decode.stop_strings import answer_text
from dgd_lightning.errors import InputError
from dgd_lightning.methods.base import Method, choose_among
from dgd_lightning.methods.several_answers import check_differ, drawn_answers
from dgd_lightning.pair import Pair
from dgd_lightning.types import DecodeOutput

Rule = Callable[[str], str | None]


@dataclass(frozen=True)
class Majority(Method):
    """Draw several answers of every prompt, and return the first one with the result that most of them have.

    Args:
        result: the rule that reads a result, or None, from an answer's text: a function's import path. Of the package:
            ``dgd_lightning.scoring.final_results.number``, ``….formula``, ``….last_line``.
        num_answers: drawn from the target per prompt, at a temperature above 0.
        block_size: K of the proposals, where there is a draft.

    Raises:
        InputError: a setting that can't be, or a rule that can't be imported.
    """

    result: str = "dgd_lightning.scoring.final_results.number"
    num_answers: int = 8
    block_size: int | None = None

    def __post_init__(self) -> None:
        check_integer("num_answers", self.num_answers, hint="use e.g. 8")
        check_integer("block_size", self.block_size, least=2, optional=True)
        self.rule()

    def rule(self) -> Rule:
        """The function that ``result`` names."""
        module, _, name = str(self.result).rpartition(".")
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            hint = "use e.g. dgd_lightning.scoring.final_results.number"
            received = f"{self.result} ({error})"
            raise InputError("result", expected="a function's import path", received=received, hint=hint) from error
        if not callable(found):
            hint = "name a function of a text"
            raise InputError("result", expected="a function's import path", received=repr(found)[:80], hint=hint)
        return found

    @property
    def needs_draft(self) -> bool:
        return self.block_size is not None

    @property
    def uses_draft(self) -> bool:
        return True

    def block(self, pair: Pair) -> int | None:
        return None if pair.draft is None else check_block_size(pair, self.block_size)

    def check_arm(self, temperature: float) -> None:
        check_differ(temperature)

    def record(self, output: DecodeOutput) -> dict[str, Any]:
        return output.trace.details or {}

    @torch.no_grad()
    def generate(self, pair: Pair, prompts: Sequence[Tensor], call: Call) -> list[DecodeOutput]:
        check_differ(call.sampling.temperature)
        if pair.tokenizer is None:
            raise InputError(
                "result",
                expected="a pair with a tokenizer, by which tokens become text",
                received="none",
                hint="add it",
            )
        groups = drawn_answers(pair, prompts, call, self.num_answers, self.block_size)
        return [self._voted(pair, group, call) for group in groups]

    def _result(self, text: str) -> str | None:
        """What the rule reads; an error where it can't be counted."""
        try:
            result = self.rule()(text)
        except Exception as error:  # a user's own code
            raise self._misused(f"{type(error).__name__}: {error}, of {text[:60]!r}") from error
        if result is not None and not isinstance(result, str):
            raise self._misused(f"{type(result).__name__} of {text[:60]!r}")
        return result

    def _misused(self, received: str) -> InputError:
        expected, hint = "a rule that gives a text or None for any answer", "return None where there is no result"
        return InputError("result", expected=expected, received=f"{self.result}: {received}", hint=hint)

    def _voted(self, pair: Pair, group: list[DecodeOutput], call: Call) -> DecodeOutput:
        began = time.perf_counter()
        strings = call.stop_strings
        results = [self._result(answer_text(pair.tokenizer, one.tokens.tolist(), strings)) for one in group]
        votes = Counter(result for result in results if result is not None)
        scores = [0.0 if result is None else float(votes[result]) for result in results]
        chosen = max(range(len(scores)), key=lambda number: scores[number])  # the first of equals
        best = choose_among(group, chosen, scores=scores, seconds=time.perf_counter() - began)
        return best._replace(trace=best.trace._replace(details={"results": results, "votes": int(scores[chosen])}))
