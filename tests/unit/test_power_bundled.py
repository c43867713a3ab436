"""Power sampling on the bundled pair: chains that begin at exact draws of p^α keep its frequencies."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from power_tools import Answer, Law
from test_bundled import prompts_of
from test_power_distribution import no_length_factor, plant_ratio, surprise

from dgd_lightning import Pair, load_pair
from dgd_lightning.methods.power import power_generate

ALPHA, TOKENS, ROWS = 1.5, 6, 4000
QUESTION = "Read the page aloud."  # of no page: answers of 3 to 6 tokens, none of them sure
UNLIKELY = 1e-7


def enumerated(pair: Pair, prompt: torch.Tensor, stop: int) -> Law:
    """p^α of all answers but the unlikeliest, by transformers' forward over whole texts."""
    law: Law = {}
    frontier: dict[Answer, float] = {(): 1.0}
    with torch.no_grad():
        for _ in range(TOKENS):
            texts = torch.stack([torch.cat([prompt, torch.tensor(answer, dtype=torch.long)]) for answer in frontier])
            rows = torch.cat([pair.target.model(part).logits[:, -1] for part in texts.split(64)]).double().softmax(-1)
            longer: dict[Answer, float] = {}
            for (answer, mass), row in zip(frontier.items(), rows, strict=True):
                for token in (row * mass > UNLIKELY).nonzero()[:, 0].tolist():
                    longer[(*answer, token)] = mass * float(row[token])
            law |= {answer: mass for answer, mass in longer.items() if answer[-1] == stop}
            frontier = {answer: mass for answer, mass in longer.items() if answer[-1] != stop}
    powers = {answer: mass**ALPHA for answer, mass in (law | frontier).items()}
    return {answer: power / sum(powers.values()) for answer, power in powers.items()}


@pytest.mark.slow
def test_chains_keep_the_frequencies_of_exact_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = load_pair("lab", "lab", dtype="float32", device="cpu")
    (prompt,) = prompts_of(pair, [{"messages": [{"role": "user", "content": QUESTION}]}])
    (stop,) = pair.target.stop_token_ids
    law = enumerated(pair, prompt, stop)
    lengths = Counter({length: sum(m for x, m in law.items() if len(x) == length) for length in range(1, TOKENS + 1)})
    assert sum(share > 0.02 for share in lengths.values()) >= 2  # answers of several lengths
    answers, generator = list(law), torch.Generator().manual_seed(0)
    drawn = torch.multinomial(torch.tensor(list(law.values())), ROWS, replacement=True, generator=generator)
    start = [torch.tensor(answers[number]) for number in drawn.tolist()]
    assert surprise(Counter(tuple(one.tolist()) for one in start), law) < 1

    def after() -> Counter[Answer]:
        outputs = power_generate(
            pair, [prompt] * ROWS, max_new_tokens=TOKENS, alpha=ALPHA, steps=2, blocks=1, start=start, seed=3
        )
        moved = sum(not torch.equal(one.tokens, own) for one, own in zip(outputs, start, strict=True))
        assert moved > ROWS / 10
        return Counter(tuple(output.tokens.tolist()) for output in outputs)

    assert surprise(after(), law) < 1
    plant_ratio(no_length_factor)(monkeypatch)
    assert surprise(after(), law) > 1
