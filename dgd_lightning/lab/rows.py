"""From lab contexts to CL-bench-format rows, and the fixed evaluation sets."""

import random
from collections.abc import Sequence
from typing import Any

from dgd_lightning.errors import InputError
from dgd_lightning.lab.families import ALL_FAMILIES, FAMILIES
from dgd_lightning.lab.world import LabContext, LabTask, PriorKind, Split, World

EVAL_SEED = 20_261_123  # evaluation contexts: this seed and held-out names; training seeds never reach it
EVAL_CONTRADICT = 0.5
# Facts per evaluation context: where the long task answers with a short line per fact, there are more of them, so that
# most long answers have at least 64 tokens.
EVAL_SIZES = {
    "natural_history": (20, 28),  # longer than in training: look-ups that fail fall back on the prior
    "tariff": (20, 28),
    "experiment": (20, 28),
    "glossary": (8, 12),
    "cipher": (8, 11),
    "procedure": (7, 10),
    "route": (8, 12),
    "simulation": (14, 16),
    "series": (11, 16),
    "dictation": (12, 16),
    "roll_call": (12, 16),
    "star_chart": (7, 10),
    "ledger": (6, 9),
}
OTHER_SIZES = (8, 12)
# Facts that a context can have: names differ in their first and last syllables, so there are at most 64, and words run
# out too. A family that is not listed writes no more facts than it can, whatever its size.
LARGEST_SIZES = {
    "natural_history": 37,
    "geography": 21,
    "tariff": 37,
    "cipher": 32,
    "route": 63,
    "experiment": 29,
    "dictation": 64,
    "roll_call": 64,
    "star_chart": 31,
}
SMALLEST_SIZES = {"procedure": 2}  # it asks what comes after a step; any other family can do with one fact
SHORT_TASKS: dict[PriorKind, int] = {"contradict": 2, "agree": 1, "novel": 2}  # at most, per context


def check_families(argument: str, families: Sequence[str]) -> None:
    """Raises InputError where there is none, or one that the lab does not have."""
    unknown = set(families) - set(ALL_FAMILIES)
    if unknown or not families:
        raise InputError(
            argument,
            expected=f"families of the lab ({', '.join(ALL_FAMILIES)})",
            received=", ".join(sorted(unknown)) or "none",
            hint="use names from the list",
        )


def check_sizes(argument: str, sizes: tuple[int, int], families: Sequence[str]) -> None:
    """Raises InputError where a family can't write contexts of all these sizes (smallest and largest, inclusive)."""
    for family in families:
        least, most = SMALLEST_SIZES.get(family, 1), LARGEST_SIZES.get(family)
        if not least <= sizes[0] <= sizes[1] or (most is not None and sizes[1] > most):
            raise InputError(
                argument,
                expected=f"{least} ≤ smallest ≤ largest{'' if most is None else f' ≤ {most}'} for the family {family}",
                received=list(sizes),
                hint="change the sizes, or leave the family out",
            )


def has_long_task(family: str) -> bool:
    """Whether contexts of a family ask for a long answer; any one shows it."""
    return any(task.long for task in make_context(0, family, split="train", size=2, contradict=0.0).tasks)


def make_context(seed: int, family: str, *, split: Split, size: int, contradict: float) -> LabContext:
    """One context, fully determined by its arguments."""
    return ALL_FAMILIES[family](World(random.Random(f"{split}/{family}/{seed}"), split, size, contradict))


def messages(context: LabContext, task: LabTask) -> list[dict[str, str]]:
    """The chat of one task: the system line, then the context with the question under it."""
    return [
        {"role": "system", "content": context.system},
        {"role": "user", "content": f"{context.text}\n\n{task.question}"},
    ]


def to_row(context: LabContext, task: LabTask, context_id: str, number: int) -> dict[str, Any]:
    """A CL-bench-format row; ``metadata.lab`` holds what the program check needs (`grader.grade`)."""
    return {
        "messages": messages(context, task),
        "rubrics": task.rubrics,
        "metadata": {
            "task_id": f"{context_id}-{number}",
            "context_id": context_id,
            "context_category": context.category,
            "sub_category": context.sub_category,
            "lab": {name: value for name, value in task._asdict().items() if name not in ("question", "rubrics")},
        },
    }


def eval_rows(
    contexts_per_family: int,
    *,
    families: Sequence[str] = tuple(FAMILIES),
    sizes: tuple[int, int] | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Rows of held-out contexts: per context one long task where it has one, and short ones of every prior kind.

    ``sizes``: smallest and largest number of facts, inclusive; None takes ``EVAL_SIZES``. Seed 0 is the bundled set.
    """
    rows = []
    for family in families:
        smallest, largest = sizes or EVAL_SIZES.get(family, OTHER_SIZES)
        for number in range(contexts_per_family):
            context_seed = EVAL_SEED + seed * 10_000 + number
            rng = random.Random(f"tasks/{family}/{context_seed}")
            context = make_context(
                context_seed, family, split="eval", size=rng.randint(smallest, largest), contradict=EVAL_CONTRADICT
            )
            chosen = [task for task in context.tasks if task.long]
            for prior, most in SHORT_TASKS.items():
                some = [task for task in context.tasks if not task.long and task.prior == prior]
                chosen += rng.sample(some, min(most, len(some)))
            context_id = f"lab-{family}-{seed}-{number}"
            rows += [to_row(context, task, context_id, i) for i, task in enumerate(chosen)]
    return rows
