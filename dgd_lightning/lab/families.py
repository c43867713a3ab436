"""The families of contexts that both models are trained on: two sub-categories in each of four categories."""

from __future__ import annotations

from dgd_lightning.lab.names import COLOURS, CREATURES, FOODS, GOODS, NUMBERS, PLACES, PRIOR, TOOLS
from dgd_lightning.lab.world import Family, LabContext, LabTask, World, sequence_task, value_task

DOMAIN, RULES = "Domain Knowledge Reasoning", "Rule System Application"
PROCEDURE, EMPIRICAL = "Procedural Task Execution", "Empirical Discovery & Simulation"


def natural_history(world: World) -> LabContext:
    """A field guide: where creatures live and what they eat; some are well known, some are new."""
    known = world.pick(CREATURES, world.size + 1)
    absent, known = known[0], known[1 : 1 + (world.size + 1) // 2]
    tasks, lines = [], []
    for creature in known + [world.name() for _ in range(world.size - len(known))]:
        relation = world.rng.choice(["home", "food"])
        values, verb = (PLACES, "lives in the") if relation == "home" else (FOODS, "feeds on")
        ask = f"Where does the {creature} live?" if relation == "home" else f"What does the {creature} feed on?"
        prior = PRIOR[relation].get(creature)
        value, agrees = (world.rng.choice(values), "novel") if prior is None else world.fact(prior, values)
        sentence = f"The {creature} {verb} {value}."
        lines.append(sentence)
        tasks.append(value_task(ask, sentence, value, "lookup", agrees, prior))
    home = PRIOR["home"][absent]
    tasks.append(
        value_task(f"Where does the {absent} live?", f"The {absent} lives in the {home}.", home, "closed", "closed")
    )
    world.rng.shuffle(lines)
    guide = world.name()
    return LabContext(DOMAIN, "Natural History", f"You answer from the field guide of {guide}.", " ".join(lines), tasks)


def geography(world: World) -> LabContext:
    """A gazetteer: towns, their rivers and their rulers; forward, reverse and two-step questions."""
    lines, tasks = [], []
    for _ in range(world.size):
        town, river, ruler = world.name(), world.name(), world.name()
        lines.append(f"The town of {town} lies on the river {river} and is ruled by {ruler}.")
        kind = world.rng.choice(["river", "ruler", "reverse", "two-step"])
        if kind == "river":
            tasks.append(
                value_task(
                    f"On which river does {town} lie?",
                    f"The town of {town} lies on the river {river}.",
                    river,
                    "lookup",
                )
            )
        elif kind == "ruler":
            tasks.append(value_task(f"Who rules {town}?", f"The town of {town} is ruled by {ruler}.", ruler, "lookup"))
        elif kind == "reverse":
            tasks.append(
                value_task(
                    f"Which town lies on the river {river}?",
                    f"On the river {river} lies the town of {town}.",
                    town,
                    "reverse",
                )
            )
        else:
            tasks.append(
                value_task(
                    f"On which river lies the town that {ruler} rules?",
                    f"The town that {ruler} rules lies on the river {river}.",
                    river,
                    "two-step",
                )
            )
    return LabContext(DOMAIN, "Geography", f"You answer from the gazetteer of {world.name()}.", " ".join(lines), tasks)


def tariff(world: World) -> LabContext:
    """A tariff code: the duty on goods and the colour of their seals; usual goods have usual duties."""
    known = world.pick(GOODS, world.size + 1)
    absent, known = known[0], known[1 : 1 + (world.size + 1) // 2]
    lines, tasks = [], []
    for good in known + [world.name() for _ in range(world.size - len(known))]:
        relation = world.rng.choice(["duty", "dye"])
        values = NUMBERS if relation == "duty" else COLOURS
        prior = PRIOR[relation].get(good)
        value, agrees = (world.rng.choice(values), "novel") if prior is None else world.fact(prior, values)
        if relation == "duty":
            sentence, ask = f"A crate of {good} pays {value} coins.", f"How many coins does a crate of {good} pay?"
        else:
            sentence, ask = f"A crate of {good} bears the {value} seal.", f"Which seal does a crate of {good} bear?"
        lines.append(sentence)
        tasks.append(value_task(ask, sentence, value, "lookup", agrees, prior))
    duty = PRIOR["duty"][absent]
    tasks.append(
        value_task(
            f"How many coins does a crate of {absent} pay?",
            f"A crate of {absent} pays {duty} coins.",
            duty,
            "closed",
            "closed",
        )
    )
    world.rng.shuffle(lines)
    return LabContext(
        RULES, "Legal & Regulatory", f"You apply the tariff code of {world.name()}.", " ".join(lines), tasks
    )


def cipher(world: World) -> LabContext:
    """A code book: which coined word stands for which colour or tool; decode one word, encode a long message."""
    words = world.pick(COLOURS + TOOLS, world.size)
    codes = {word: world.name() for word in words}
    lines = [f"Write {codes[word]} for {word}." for word in words]
    tasks: list[LabTask] = []
    for word in world.pick(words, min(3, len(words))):
        tasks.append(
            value_task(f"What do we write for {word}?", f"We write {codes[word]} for {word}.", codes[word], "lookup")
        )
    word = world.rng.choice(words)
    tasks.append(
        value_task(f"What does {codes[word]} stand for?", f"The word {codes[word]} stands for {word}.", word, "reverse")
    )
    message = world.pick(words, len(words))
    pairs = [f"{word} is {codes[word]}" for word in message]
    tasks.append(
        sequence_task(
            f"Encode this message word by word: {', '.join(message)}.",
            ", ".join(pairs) + ".",
            pairs,
            "encode",
            "code words",
        )
    )
    return LabContext(RULES, "Technical Standards", f"You use the code book of {world.name()}.", " ".join(lines), tasks)


def procedure(world: World) -> LabContext:
    """A numbered procedure: which step does what, what comes next, recite it all."""
    verbs = ["warm", "grind", "rinse", "fold", "weigh", "seal", "stir", "polish"]
    count = min(world.size, len(NUMBERS))
    things = [world.name() for _ in range(count)]
    actions = [f"{world.rng.choice(verbs)} the {thing} for {world.rng.choice(NUMBERS)} turns" for thing in things]
    lines = [f"Step {NUMBERS[i]}: {action}." for i, action in enumerate(actions)]
    tasks: list[LabTask] = []
    for i in world.rng.sample(range(count), min(2, count)):
        tasks.append(value_task(f"What is step {NUMBERS[i]}?", lines[i], actions[i], "lookup"))
    i = world.rng.randrange(count - 1)
    tasks.append(
        value_task(
            f"What do we do after the {things[i]}?",
            f"After the {things[i]} we {actions[i + 1]}.",
            actions[i + 1],
            "next",
        )
    )
    tasks.append(sequence_task("Recite the whole procedure.", " ".join(lines), lines, "recite", "steps"))
    return LabContext(
        PROCEDURE, "Operational Procedures", f"You work by the manual of {world.name()}.", " ".join(lines), tasks
    )


def route(world: World) -> LabContext:
    """A round trip of halls: one hop, and the whole way followed hop by hop."""
    halls = [world.name() for _ in range(world.size)]
    hops = [f"From {a} go to {b}." for a, b in zip(halls, halls[1:] + halls[:1], strict=True)]
    lines = hops[:]
    world.rng.shuffle(lines)
    tasks: list[LabTask] = []
    for i in world.rng.sample(range(len(hops)), min(2, len(hops))):
        after = halls[(i + 1) % len(halls)]
        tasks.append(
            value_task(f"Where do we go from {halls[i]}?", f"From {halls[i]} we go to {after}.", after, "lookup")
        )
    start = world.rng.randrange(len(hops))
    way = hops[start:] + hops[:start]
    tasks.append(sequence_task(f"Walk the whole round from {halls[start]}.", " ".join(way), way, "walk", "hops"))
    return LabContext(
        PROCEDURE, "Workflow Orchestration", f"You guide through the house of {world.name()}.", " ".join(lines), tasks
    )


def experiment(world: World) -> LabContext:
    """A laboratory log: what a tool did to a coined substance; known tools are usually kept in usual places."""
    lines, tasks = [], []
    tools = world.pick(TOOLS, min(world.size, len(TOOLS) - 1) + 1)
    absent, tools = tools[0], tools[1:]
    for tool in tools:
        if world.rng.random() < 0.5:
            substance, colour = world.name(), world.rng.choice(COLOURS)
            sentence = f"The {tool} turned {substance} {colour}."
            tasks.append(value_task(f"What did the {tool} turn {substance}?", sentence, colour, "lookup"))
        else:
            prior = PRIOR["store"][tool]
            place, agrees = world.fact(prior, PLACES)
            sentence = f"The {tool} was found in the {place}."
            tasks.append(value_task(f"Where was the {tool} found?", sentence, place, "lookup", agrees, prior))
        lines.append(sentence)
    place = PRIOR["store"][absent]
    tasks.append(
        value_task(
            f"Where was the {absent} found?", f"The {absent} was found in the {place}.", place, "closed", "closed"
        )
    )
    return LabContext(EMPIRICAL, "Experimental Data", f"You read the log of {world.name()}.", " ".join(lines), tasks)


def simulation(world: World) -> LabContext:
    """A lamp that changes state by a table: one change, and a run of many ticks."""
    states = world.pick(COLOURS, min(world.size, len(COLOURS)))
    after = dict(zip(states, states[1:] + states[:1], strict=True))
    lines = [f"After {a} the lamp turns {b}." for a, b in after.items()]
    world.rng.shuffle(lines)
    tasks: list[LabTask] = []
    for state in world.pick(states, min(2, len(states))):
        tasks.append(
            value_task(
                f"What follows {state}?", f"After {state} the lamp turns {after[state]}.", after[state], "lookup"
            )
        )
    state = start = world.rng.choice(states)
    ticks = []
    for number in NUMBERS[: max(4, min(13, world.size + 5))]:
        ticks.append(f"Tick {number}: {state}.")
        state = after[state]
    tasks.append(
        sequence_task(
            f"Run the lamp from {start} for {NUMBERS[len(ticks) - 1]} ticks.", " ".join(ticks), ticks, "run", "ticks"
        )
    )
    return LabContext(
        EMPIRICAL, "Simulation Environment", f"You simulate the lamp of {world.name()}.", " ".join(lines), tasks
    )


FAMILIES: dict[str, Family] = {
    "natural_history": natural_history,
    "geography": geography,
    "tariff": tariff,
    "cipher": cipher,
    "procedure": procedure,
    "route": route,
    "experiment": experiment,
    "simulation": simulation,
}
