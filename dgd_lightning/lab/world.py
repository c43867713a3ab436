"""The lab's world: contexts in CL-bench's four categories, with tasks whose answers are in the context.

A coined name is two or three syllables of the form consonant + vowel ("Zomita"); each syllable is one token of the
lab's tokenizer. One name in five is held out: it may appear in evaluation contexts only.

Every context coins new names. Facts about common things may have a *prior* (`PRIOR`): the context then agrees
with it or contradicts it, and the task says which (`prior`). A target that answers a contradicted fact with the prior
shows the failure that CL-bench describes.
"""

import random
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from dgd_lightning.errors import InputError

Split = Literal["train", "eval"]
PriorKind = Literal["agree", "contradict", "novel", "closed"]

CONSONANTS = "bdfgklmnprstvz"
VOWELS = "aeiou"
SYLLABLES = [c + v for c in CONSONANTS for v in VOWELS][:64]
HELD_OUT_SHARE = 5  # one name in this many

NUMBERS = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
).split()

CREATURES = (
    "heron otter lynx badger falcon salmon beaver marten raven viper weasel osprey turtle pelican hare "
    "adder stork bison ibex gecko"
).split()
PLACES = (
    "marsh cliff meadow canyon forest desert lagoon tundra glacier prairie swamp orchard cavern delta island reef"
).split()
FOODS = (
    "eels berries beetles clover snails acorns moths lichen crabs nettles worms reeds plums shrimp ferns mice"
).split()
GOODS = (
    "salt amber copper silk pepper honey linen cedar indigo wool marble tallow saffron ivory garnet "
    "barley timber flax resin cobalt"
).split()
COLOURS = ("red blue green white black golden purple silver orange brown pink grey crimson violet olive teal").split()
TOOLS = (
    "lantern compass anvil chisel kettle ladder saddle bellows trowel sextant pulley mallet loom sickle rudder quill"
).split()


def is_held_out(syllables: tuple[int, ...]) -> bool:
    """Whether a name, given as syllable indices, is reserved for evaluation."""
    mixed = 0
    for index in syllables:
        mixed = mixed * 67 + index + 1
    return mixed % HELD_OUT_SHARE == 0


class Namer:
    """Draws coined names that are distinct within one context and belong to one split."""

    def __init__(self, rng: random.Random, split: Split) -> None:
        self.rng, self.held_out = rng, split == "eval"
        self.used: tuple[set[int], set[int]] = (set(), set())  # first and last syllables

    def __call__(self) -> str:
        if len(self.used[0]) == len(SYLLABLES):  # every draw would be refused; until then some name always fits
            raise InputError(
                "size",
                expected=f"a context of at most {len(SYLLABLES)} names, one for each syllable",
                received="a context that needs more",
                hint="use fewer facts (`rows.LARGEST_SIZES`)",
            )
        while True:
            length = 2 if self.rng.random() < 0.7 else 3
            syllables = tuple(self.rng.randrange(len(SYLLABLES)) for _ in range(length))
            # Names of one context differ in their first and in their last syllable, so either identifies a name.
            if is_held_out(syllables) is self.held_out and not (
                syllables[0] in self.used[0] or syllables[-1] in self.used[1]
            ):
                self.used[0].add(syllables[0])
                self.used[1].add(syllables[-1])
                return "".join(SYLLABLES[index] for index in syllables).capitalize()


def _prior(subjects: list[str], values: list[str], seed: int) -> dict[str, str]:
    rng = random.Random(seed)
    return {subject: rng.choice(values) for subject in subjects}


# What everyone in this world "knows". Most contexts that mention one of these facts agree with it; some contradict it.
PRIOR: dict[str, dict[str, str]] = {
    "home": _prior(CREATURES, PLACES, 1),
    "food": _prior(CREATURES, FOODS, 2),
    "duty": _prior(GOODS, NUMBERS, 3),
    "dye": _prior(GOODS, COLOURS, 4),
    "store": _prior(TOOLS, PLACES, 5),
    "shade": _prior(TOOLS, COLOURS, 6),
}


class LabTask(NamedTuple):
    """One question with its only right answer; ``checks`` go with ``rubrics``, one each."""

    question: str
    answer: str
    checks: list[dict[str, Any]]
    kind: str
    prior: PriorKind  # "novel": coined, no prior; "closed": the context is silent and the prior is the answer
    prior_answer: str | None  # the value that reverting to the prior would give, where it differs
    rubrics: list[str]
    long: bool = False


class LabContext(NamedTuple):
    """One context with its tasks."""

    category: str
    sub_category: str
    system: str
    text: str
    tasks: list[LabTask]


class World:
    """What a family needs to write one context: of ``size`` facts, steps or rows, with the names of a split.

    ``rng`` is the only source of randomness; ``contradict``: share of the facts with a prior that go against it.
    """

    def __init__(self, rng: random.Random, split: Split, size: int, contradict: float) -> None:
        self.rng, self.size, self.contradict = rng, size, contradict
        self.name = Namer(rng, split)

    def pick(self, values: list[str], count: int) -> list[str]:
        """``count`` different values in random order."""
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
    return LabTask(question, answer, checks, kind, prior, prior_answer if prior == "contradict" else None, rubrics)


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
    return LabTask(question, answer, checks, kind, "novel", None, rubrics, long=True)
