"""The families of contexts: two or three sub-categories in each of four categories.

Both models are trained on `FAMILIES`. Those in `SHIFTED` are a shifted domain, which the target has learnt and the
bundled draft has never seen: phrasing and rules differ, and test-time training is measured there.
"""

from dgd_lightning.lab.world import (
    COLOURS,
    CREATURES,
    FOODS,
    GOODS,
    NUMBERS,
    PLACES,
    PRIOR,
    TOOLS,
    Family,
    LabContext,
    LabTask,
    World,
    sequence_task,
    value_task,
)

DOMAIN, RULES = "Domain Knowledge Reasoning", "Rule System Application"
PROCEDURE, EMPIRICAL = "Procedural Task Execution", "Empirical Discovery & Simulation"
JOINTS = [", ", "; ", ": ", " to ", " write ", " means ", " comes "]
VERBS = ["warm", "grind", "rinse", "fold", "weigh", "seal", "stir", "polish"]


def glossary(world: World) -> LabContext:
    """A glossary of coined words: the meaning of one, and the whole page read out."""
    entries = {world.name(): world.rng.choice(TOOLS + GOODS) for _ in range(min(world.size, len(NUMBERS)))}
    numbered = zip(NUMBERS, entries.items(), strict=False)
    lines = [f"Entry {number} {word} means {meaning} in the glossary." for number, (word, meaning) in numbered]
    tasks = [
        value_task(
            f"What does the word {word} mean?", f"The word {word} means {entries[word]}.", entries[word], "lookup"
        )
        for word in world.pick(list(entries), len(entries))
    ]
    tasks.append(sequence_task("Read the page aloud.", " ".join(lines), lines, "recite", "entries"))
    return LabContext(DOMAIN, "Humanities", f"You keep the glossary of {world.name()}.", " ".join(lines), tasks)


def _facts(
    world: World, things: list[str], relations: dict[str, tuple[str, str, list[str]]]
) -> tuple[list[str], list[LabTask]]:
    """Lines and questions about known things and coined ones; the last thing is known and the context is silent on it.

    ``relations`` have, by the name of the prior, a sentence and a question (``{x}`` the thing, ``{v}`` the value), and
    the values.
    """
    known = world.pick(things, world.size // 2 + 2)
    absent, *known = known
    lines, tasks = [], []
    for thing in known + [world.name() for _ in range(world.size - len(known))]:
        relation = world.rng.choice(list(relations))
        sentence, ask, values = relations[relation]
        prior = PRIOR[relation].get(thing)
        value, agrees = (world.rng.choice(values), "novel") if prior is None else world.fact(prior, values)
        lines.append(sentence.format(x=thing, v=value))
        tasks.append(value_task(ask.format(x=thing), lines[-1], value, "lookup", agrees, prior))  # type: ignore[arg-type]
    relation = world.rng.choice(list(relations))
    sentence, ask, _ = relations[relation]
    value = PRIOR[relation][absent]
    tasks.append(value_task(ask.format(x=absent), sentence.format(x=absent, v=value), value, "closed", "closed"))
    world.rng.shuffle(lines)
    return lines, tasks


def natural_history(world: World) -> LabContext:
    """A field guide: where creatures live and what they eat; some are well known, some are new."""
    relations = {
        "home": ("The {x} haunts the {v}.", "What does the {x} haunt?", PLACES),
        "food": ("The {x} eats {v}.", "What does the {x} eat?", FOODS),
    }
    lines, tasks = _facts(world, CREATURES, relations)
    guide = f"You answer from the field guide of {world.name()}."
    return LabContext(DOMAIN, "Natural Sciences", guide, " ".join(lines), tasks)


def geography(world: World) -> LabContext:
    """A gazetteer: towns, their rivers and their rulers; forward, reverse and two-step questions."""
    lines, tasks = [], []
    for _ in range(world.size):
        town, river, ruler = world.name(), world.name(), world.name()
        lines.append(f"The town {town} on the river {river} obeys {ruler}.")
        kind = world.rng.choice(["river", "ruler", "reverse", "two-step"])
        ask, answer, value = {
            "river": (f"Which river has {town}?", f"The town {town} on the river {river}.", river),
            "ruler": (f"Whom does the town on the river {river} obey?", f"The river {river} obeys {ruler}.", ruler),
            "reverse": (f"Which town obeys {ruler}?", f"Under {ruler} stands the town {town}.", town),
            "two-step": (f"Whom does {town} obey?", f"The town {town} obeys {ruler}.", ruler),
        }[kind]
        tasks.append(value_task(ask, answer, value, kind))
    return LabContext(DOMAIN, "Geography", f"You answer from the gazetteer of {world.name()}.", " ".join(lines), tasks)


def tariff(world: World) -> LabContext:
    """A tariff code: the duty on goods and the colour of their seals; usual goods have usual duties."""
    relations = {
        "duty": ("The duty on {x} is {v} coins.", "What is the duty on {x}?", NUMBERS),
        "dye": ("The seal on {x} is {v}.", "What is the seal on {x}?", COLOURS),
    }
    lines, tasks = _facts(world, GOODS, relations)
    system = f"You apply the tariff code of {world.name()}."
    return LabContext(RULES, "Legal & Regulatory", system, " ".join(lines), tasks)


def cipher(world: World) -> LabContext:
    """A code book: which coined word means which word; decode one, encode a long message."""
    words = world.pick(COLOURS + TOOLS, world.size)
    codes = {word: world.name() for word in words}
    lines = [f"For the common word {word} write {codes[word]} in the code book." for word in words]
    tasks = [
        value_task(f"How do we write {word}?", f"For {word} write {codes[word]}.", codes[word], "lookup")
        for word in world.pick(words, len(words))
    ]
    word = world.rng.choice(words)
    tasks.append(value_task(f"What does {codes[word]} mean?", f"Read {codes[word]} as {word}.", word, "reverse"))
    message = world.pick(words, len(words))
    pairs = [f"For the common word {word} write {codes[word]} in the code book." for word in message]
    question = f"Encode this message word by word: {', '.join(message)}."
    tasks.append(sequence_task(question, " ".join(pairs), pairs, "encode", "code words"))
    system = f"You use the code book of {world.name()}."
    return LabContext(RULES, "Technical Standards", system, " ".join(lines), tasks)


def procedure(world: World) -> LabContext:
    """A numbered procedure: which step does what, what comes next, recite it all."""
    rng, count = world.rng, min(world.size, len(NUMBERS))
    things = [world.name() for _ in range(count)]
    actions = [f"{rng.choice(VERBS)} the {thing} for {rng.choice(NUMBERS)} turns" for thing in things]
    lines = [f"Step {NUMBERS[i]}: {action}." for i, action in enumerate(actions)]
    tasks = [
        value_task(f"What is step {NUMBERS[i]}?", lines[i], actions[i], "lookup")
        for i in rng.sample(range(count), min(2, count))
    ]
    i = rng.randrange(count - 1)
    ask, answer = f"What comes after the {things[i]}?", f"After the {things[i]}: {actions[i + 1]}."
    tasks.append(value_task(ask, answer, actions[i + 1], "next"))
    tasks.append(sequence_task("Recite the whole procedure.", " ".join(lines), lines, "recite", "steps"))
    system = f"You work by the manual of {world.name()}."
    return LabContext(PROCEDURE, "Operational Procedures", system, " ".join(lines), tasks)


def _round(
    world: World, stops: list[str], hop: str, ask: str, long_ask: str, kind: str
) -> tuple[list[str], list[LabTask]]:
    """Lines of a closed round of ``stops`` in random order, single hops asked, and the whole round from one stop."""
    after = dict(zip(stops, stops[1:] + stops[:1], strict=True))
    lines = [hop.format(a=a, b=b) for a, b in after.items()]
    world.rng.shuffle(lines)
    tasks = [
        value_task(ask.format(a=stop), hop.format(a=stop, b=after[stop]), after[stop], "lookup")
        for stop in world.pick(stops, len(stops))
    ]
    stop = start = world.rng.choice(stops)
    way = []
    for _ in stops:
        way.append(hop.format(a=stop, b=after[stop]))
        stop = after[stop]
    tasks.append(sequence_task(long_ask.format(a=start), " ".join(way), way, kind, "steps of the round"))
    return lines, tasks


def route(world: World) -> LabContext:
    """A round of halls: one passage, and the whole way followed hall by hall."""
    halls = [world.name() for _ in range(world.size)]
    hop, ask = "Go from the hall {a} to {b}.", "Where do we go from {a}?"
    lines, tasks = _round(world, halls, hop, ask, "Walk the whole round from {a}.", "walk")
    system = f"You guide through the house of {world.name()}."
    return LabContext(PROCEDURE, "Workflow Orchestration", system, " ".join(lines), tasks)


def experiment(world: World) -> LabContext:
    """A laboratory log: what things were dyed, and where known tools were kept, usually in their usual places."""
    relations = {
        "store": ("We kept the {x} at the {v}.", "Where did we keep the {x}?", PLACES),
        "shade": ("We dyed the {x} in {v}.", "How did we dye the {x}?", COLOURS),
    }
    lines, tasks = _facts(world, TOOLS, relations)
    return LabContext(EMPIRICAL, "Experimental Data", f"You read the log of {world.name()}.", " ".join(lines), tasks)


def simulation(world: World) -> LabContext:
    """A lamp that changes its colour by a table: one change, and a full run."""
    states = world.pick(COLOURS, min(world.size, len(COLOURS)))
    hop, ask = "After {a} comes {b}.", "What comes after {a}?"
    lines, tasks = _round(world, states, hop, ask, "Run the lamp once round from {a}.", "run")
    system = f"You simulate the lamp of {world.name()}."
    return LabContext(EMPIRICAL, "Simulation Environment", system, " ".join(lines), tasks)


def series(world: World) -> LabContext:
    """A log that repeats a pattern of coined words: continue it for a set number of terms."""
    period = 2 + world.size % 3
    words = [world.name() for _ in range(period)]
    shown = period * 2 + world.rng.randrange(period)
    terms = [words[i % period] for i in range(shown + len(NUMBERS))]
    count = min(len(NUMBERS), max(6, 2 * world.size))
    coming = terms[shown : shown + count]
    seen, answer = (" ".join(f"{term}," for term in part) for part in (terms[:shown], coming))
    tasks = [
        value_task("What comes next?", f"Next comes {coming[0]}.", coming[0], "lookup"),
        sequence_task(f"Continue for {NUMBERS[count - 1]} terms.", answer, coming, "series", "terms"),
    ]
    return LabContext(EMPIRICAL, "Time Series", f"You watch the signal of {world.name()}.", f"We saw {seen}", tasks)


def _repeated(world: World, joint: str, end: str, sub_category: str, system: str) -> LabContext:
    """Coined words with ``joint`` between them, to be repeated."""
    words = [world.name() for _ in range(world.size)]
    i = world.rng.randrange(len(words))
    after = words[(i + 1) % len(words)]
    text = joint.join(words) + end
    tasks = [
        value_task(f"Which word follows {words[i]}?", f"Then {words[i]} {after}.", after, "next"),
        sequence_task("Repeat.", text, words, "recite", "words"),
    ]
    return LabContext(PROCEDURE, sub_category, system, text, tasks)


def dictation(world: World) -> LabContext:
    """Coined words to be repeated: what in-context learning starts from, and where the curriculum starts."""
    return _repeated(world, " ", "", "Instructional Procedures", "You take dictation.")


def roll_call(world: World) -> LabContext:
    """Names joined by a mark or a word: what follows one then depends on the word before the joint, as in look-ups."""
    return _repeated(world, world.rng.choice(JOINTS), ".", "Attendance Lists", "You call the roll.")


def star_chart(world: World) -> LabContext:
    """A chart of stars: one star's light, and the whole chart read aloud."""
    stars = [world.name() for _ in range(world.size)]
    shades = [world.rng.choice(COLOURS) for _ in stars]
    lines = [
        f"{star} glows {shade} high above {world.rng.choice(PLACES)} {world.name()};"
        for star, shade in zip(stars, shades, strict=True)
    ]
    tasks = [
        value_task(f"Tell me the light of {stars[i]}.", f"{stars[i]} glows {shades[i]}.", shades[i], "lookup")
        for i in world.rng.sample(range(len(stars)), min(2, len(stars)))
    ]
    tasks.append(sequence_task("Read the chart aloud.", " ".join(lines), lines, "recite", "entries of the chart"))
    return LabContext(DOMAIN, "Star Charts", f"Astronomer of {world.name()}:", " ".join(lines), tasks)


def ledger(world: World) -> LabContext:
    """A ledger of debts: who owes whom, and the whole book copied out."""
    entries, lines = [], []
    for number in NUMBERS[: world.size]:
        debtor, lender = world.name(), world.name()
        sum_, good = world.rng.choice(NUMBERS), world.rng.choice(GOODS)
        entries.append((debtor, lender))
        lines.append(f"({number}) {debtor} owes {lender} {sum_} sacks of {good} by dawn!")
    tasks = [
        value_task(f"Name the lender of {debtor}.", f"{lender} lends to {debtor}.", lender, "lookup")
        for debtor, lender in world.rng.sample(entries, min(2, len(entries)))
    ]
    tasks.append(sequence_task("Copy out the book of debts.", " ".join(lines), lines, "recite", "entries of the book"))
    return LabContext(PROCEDURE, "Ledgers", f"Clerk of {world.name()}:", " ".join(lines), tasks)


_ALIKE = (glossary, natural_history, geography, tariff, cipher, procedure, route, experiment, simulation, series)
FAMILIES: dict[str, Family] = {family.__name__: family for family in (*_ALIKE, dictation, roll_call)}
SHIFTED: dict[str, Family] = {"star_chart": star_chart, "ledger": ledger}
ALL_FAMILIES = {**FAMILIES, **SHIFTED}
