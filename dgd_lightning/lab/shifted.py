"""A shifted domain: families that the target has learnt and the bundled draft has never seen.

Phrasing and rules differ from `families`; test-time training is measured here.
"""

from __future__ import annotations

from dgd_lightning.lab.families import DOMAIN, PROCEDURE
from dgd_lightning.lab.names import COLOURS, GOODS, NUMBERS, PLACES
from dgd_lightning.lab.world import Family, LabContext, LabTask, World, sequence_task, value_task


def star_chart(world: World) -> LabContext:
    """A chart of stars: one star's light, and the whole chart read aloud."""
    stars = [world.name() for _ in range(world.size)]
    shades = [world.rng.choice(COLOURS) for _ in stars]
    lines = [
        f"{star} glows {shade} high above {world.rng.choice(PLACES)} {world.name()};"
        for star, shade in zip(stars, shades, strict=True)
    ]
    tasks: list[LabTask] = []
    for i in world.rng.sample(range(len(stars)), min(2, len(stars))):
        tasks.append(
            value_task(f"Tell me the light of {stars[i]}.", f"{stars[i]} glows {shades[i]}.", shades[i], "lookup")
        )
    tasks.append(sequence_task("Read the chart aloud.", " ".join(lines), lines, "recite", "entries of the chart"))
    return LabContext(DOMAIN, "Star Charts", f"Astronomer of {world.name()}:", " ".join(lines), tasks)


def ledger(world: World) -> LabContext:
    """A ledger of debts: who owes whom, and the whole book copied out."""
    entries, lines = [], []
    for number in NUMBERS[: min(world.size, len(NUMBERS))]:
        debtor, lender = world.name(), world.name()
        sum_, good = world.rng.choice(NUMBERS), world.rng.choice(GOODS)
        entries.append((debtor, lender))
        lines.append(f"({number}) {debtor} owes {lender} {sum_} sacks of {good} by dawn!")
    tasks: list[LabTask] = []
    for i in world.rng.sample(range(len(entries)), min(2, len(entries))):
        debtor, lender = entries[i]
        tasks.append(value_task(f"Name the lender of {debtor}.", f"{lender} lends to {debtor}.", lender, "lookup"))
    tasks.append(sequence_task("Copy out the book of debts.", " ".join(lines), lines, "recite", "entries of the book"))
    return LabContext(PROCEDURE, "Ledgers", f"Clerk of {world.name()}:", " ".join(lines), tasks)


SHIFTED: dict[str, Family] = {"star_chart": star_chart, "ledger": ledger}
