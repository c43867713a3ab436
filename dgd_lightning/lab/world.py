"""The lab's world: contexts in CL-bench's four categories, with tasks whose answers are in the context.

Every context coins new names. Facts about common things may have a *prior* (`names.PRIOR`): the context then agrees
with it or contradicts it, and the task says which (`prior`). A target that answers a contradicted fact with the prior
shows the failure that CL-bench describes.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from dgd_lightning.errors import InputError
from dgd_lightning.lab.names import Namer, Split

PriorKind = Literal["agree", "contradict", "novel", "closed"]


class LabTask(NamedTuple):
    """One question with its only right answer; ``checks`` go with ``rubrics``, one each."""

    question: str
    answer: str
    kind: str
    prior: PriorKind  # "novel": coined, no prior; "closed": the context is silent and the prior is the answer
    prior_answer: str | None  # the value that reverting to the prior would give, where it differs
    rubrics: list[str]
    checks: list[dict[str, Any]]
    long: bool = False


class LabContext(NamedTuple):
    """One context with its tasks."""

    category: str
    sub_category: str
    system: str
    text: str
    tasks: list[LabTask]


class World:
    """What a family needs to write one context.

    Args:
        rng: the only source of randomness.
        split: whose names may be used.
        size: how many facts, steps or rows the context has.
        contradict: share of the facts with a prior that go against it.
    """

    def __init__(self, rng: random.Random, split: Split, size: int, contradict: float) -> None:
        self.rng, self.size, self.contradict = rng, size, contradict
        self.name = Namer(rng, split)

    def pick(self, values: list[str], count: int) -> list[str]:
        """``count`` different values in random order.

        Raises:
            InputError: there are not so many.
        """
        if count > len(values):
            raise InputError(
                "size",
                expected=f"a context of at most {len(values)} of the words that its family draws from",
                received=f"a context that needs {count}",
                hint="use fewer facts (`rows.LARGEST_SIZES`)",
            )
        return self.rng.sample(values, count)

    def fact(self, prior: str, values: list[str]) -> tuple[str, PriorKind]:
        """A value for a thing whose prior is ``prior``: the prior itself, or against it any other."""
        if self.rng.random() >= self.contradict:
            return prior, "agree"
        return self.rng.choice([value for value in values if value != prior]), "contradict"


Family = Callable[[World], LabContext]


def value_task(
    question: str, answer: str, value: str, kind: str, prior: PriorKind = "novel", prior_answer: str | None = None
) -> LabTask:
    """A short question that asks for one value, answered in one sentence."""
    rubrics = [f"The response states that the answer is {value}, as the context says."]
    checks: list[dict[str, Any]] = [{"type": "contains", "value": value}]
    if prior == "contradict" and prior_answer is not None:
        rubrics.append(f"The response does not fall back on the usual {prior_answer}, which the context overrides.")
        checks.append({"type": "absent", "value": prior_answer})
    rubrics.append("The response is one complete sentence and says nothing else.")
    checks.append({"type": "sentence"})
    return LabTask(question, answer, kind, prior, prior_answer if prior == "contradict" else None, rubrics, checks)


def sequence_task(question: str, answer: str, items: list[str], kind: str, what: str) -> LabTask:
    """A long question whose answer must hold all ``items`` in order and nothing more."""
    rubrics = [
        f"The response gives all {len(items)} {what} that the question asks for.",
        f"The {what} stand in the right order.",
        "The response follows the wording of the context exactly and adds nothing.",
    ]
    checks: list[dict[str, Any]] = [
        {"type": "contains_all", "value": items},
        {"type": "ordered", "value": items},
        {"type": "equals", "value": answer},
    ]
    return LabTask(question, answer, kind, "novel", None, rubrics, checks, long=True)
