"""Words of the lab's world: coined names that split into training and held-out ones, common words, prior facts.

A coined name is two or three syllables of the form consonant + vowel ("Zomita"); each syllable is one token of the
lab's tokenizer. One name in five is held out: it may appear in evaluation contexts only.
"""

from __future__ import annotations

import random
from typing import Literal

from dgd_lightning.errors import InputError

Split = Literal["train", "eval"]

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
    """Draws coined names that are distinct within one context and belong to one split.

    Raises:
        InputError: a context asks for more names than there are syllables.
    """

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
