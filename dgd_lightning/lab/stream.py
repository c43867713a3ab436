"""Training text of the lab: packed conversations, answers weighted most, short contexts before long ones."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerBase

from dgd_lightning.lab.rows import make_context
from dgd_lightning.lab.tokenizer import END, START


@dataclass
class Stage:
    """One stage of the curriculum.

    Args:
        steps: optimiser steps it lasts.
        sequence_length: tokens per row, T.
        batch_size: rows per step, B.
        sizes: smallest and largest number of facts in a context, inclusive.
        long_share: share of the contexts whose long task is asked too.
        recall_share: share of the contexts where all short questions are answered in one turn, in random order and
            twice: many look-ups in few tokens, without which they are not learnt in reasonable time.
        contradict: share of the facts with a prior that contradict it.
        families: names of the families to draw from; repeat one to weight it.
        end_weight: loss weight of the mark that ends a long answer: there is one in a hundred tokens.
    """

    steps: int
    sequence_length: int
    batch_size: int
    sizes: tuple[int, int]
    long_share: float
    recall_share: float
    contradict: float
    families: list[str]
    end_weight: float = 0.3


class LabBatch(NamedTuple):
    """``weights`` [B, T] belong to the token at their place (as a label)."""

    input_ids: Tensor  # [B, T]
    weights: Tensor  # [B, T]


class Part(NamedTuple):
    """A sentence of a message; ``value`` is the part of a short answer that only the context gives."""

    text: str
    value: str | None = None


class Turn(NamedTuple):
    """One message: its parts joined by spaces."""

    role: str
    parts: list[Part]
    end_weight: float | None = None  # of an answer's end mark; None: as the words of an answer


class Encoder:
    """Encodes conversations as the chat template would, with a loss weight for every token.

    Values weigh 1: they are what a context teaches. The words around them weigh ``ANSWER``, long answers throughout
    ``LONG``, and everything else ``context_weight``, since names in a context cannot be foreseen.
    """

    ANSWER, LONG = 0.3, 0.5

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context_weight: float) -> None:
        self.tokenizer, self.context_weight = tokenizer, context_weight
        self.start, self.end = (int(tokenizer.convert_tokens_to_ids(mark)) for mark in (START, END))  # type: ignore[arg-type]
        self.newline: list[int] = self.encode("\n")
        self.roles = {role: [self.start, *self.encode(role + "\n")] for role in ("system", "user", "assistant")}

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def conversation(self, turns: list[Turn]) -> tuple[list[int], list[float]]:
        """Token ids of the turns and their loss weights."""
        ids: list[int] = []
        weights: list[float] = []
        for turn in turns:
            head, tail = self.roles[turn.role], [self.end, *self.newline]
            ids += head
            weights += [self.context_weight] * len(head)
            for i, part in enumerate(turn.parts):
                body = self.encode(" " + part.text if i else part.text)
                ids += body
                weights += self.answer_weights(body, part.value) if turn.role == "assistant" else self.plain(body)
            ids += tail
            answer_end = self.ANSWER if turn.end_weight is None else turn.end_weight
            end = answer_end if turn.role == "assistant" else self.context_weight
            weights += [end, *self.plain(self.newline)]
        return ids, weights

    def plain(self, body: list[int]) -> list[float]:
        """Weights of what is no answer."""
        return [self.context_weight] * len(body)

    def answer_weights(self, body: list[int], value: str | None) -> list[float]:
        """Weights of an answer's tokens ``body``."""
        if value is None:
            return [self.LONG] * len(body)
        weights = [self.ANSWER] * len(body)
        inner = self.encode(" " + value)
        for start in range(len(body) - len(inner) + 1):
            if body[start : start + len(inner)] == inner:
                weights[start : start + len(inner)] = [1.0] * len(inner)
        return weights


def document(rng: random.Random, stage: Stage, seed: int) -> list[Turn]:
    """One context with several of its questions, as chat turns."""
    family = rng.choice(stage.families)
    context = make_context(seed, family, split="train", size=rng.randint(*stage.sizes), contradict=stage.contradict)
    turns = [Turn("system", [Part(context.system)])]
    if rng.random() < stage.recall_share:
        short = [Part(task.answer, task.checks[0]["value"]) for task in context.tasks if not task.long]
        recalled = rng.sample(short, len(short)) + rng.sample(short, len(short))
        question = f"{context.text}\n\nTell all you know, and tell it again."
        return [*turns, Turn("user", [Part(question)]), Turn("assistant", recalled)]
    ask_long = rng.random() < stage.long_share
    tasks = [task for task in context.tasks if ask_long or not task.long]
    rng.shuffle(tasks)
    if ask_long and rng.random() < 0.5:  # evaluation asks each task first, straight under the context
        tasks.sort(key=lambda task: not task.long)
    for i, task in enumerate(tasks):
        question = task.question if i else f"{context.text}\n\n{task.question}"
        value = None if task.long else task.checks[0]["value"]
        end = stage.end_weight if task.long else None
        turns += [Turn("user", [Part(question)]), Turn("assistant", [Part(task.answer, value)], end)]
    return turns


class LabStream(IterableDataset[LabBatch]):
    """Batches of packed documents; batch ``i`` depends on (seed, i) alone, so a resumed run goes on as it would have.

    Args:
        encoder: turns conversations into ids and weights.
        stages: the curriculum.
        seed: base seed.
        first_step: where to start, for a resumed run.
    """

    def __init__(self, encoder: Encoder, stages: list[Stage], seed: int, first_step: int = 0) -> None:
        self.encoder, self.stages, self.seed, self.first_step = encoder, stages, seed, first_step

    def stage_at(self, step: int) -> Stage:
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        return self.stages[-1]

    def batch(self, step: int) -> LabBatch:
        """The batch of one optimiser step."""
        rng, stage = random.Random(f"{self.seed}/{step}"), self.stage_at(step)
        ids: list[int] = []
        weights: list[float] = []
        total = stage.batch_size * stage.sequence_length
        rows: list[list[int]] = []
        row_weights: list[list[float]] = []
        while len(rows) * stage.sequence_length < total:
            more_ids, more_weights = self.encoder.conversation(document(rng, stage, rng.getrandbits(48)))
            ids += more_ids
            weights += more_weights
            if len(ids) >= stage.sequence_length:  # cut: every row starts with a whole context
                rows.append(ids[: stage.sequence_length])
                row_weights.append(weights[: stage.sequence_length])
                ids, weights = [], []
        return LabBatch(torch.tensor(rows), torch.tensor(row_weights))

    def __iter__(self) -> Iterator[LabBatch]:
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        step = self.first_step + worker
        while True:
            yield self.batch(step)
            step += workers
