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
        contradict: share of the facts with a prior that contradict it.
        families: names of the families to draw from; repeat one to weight it.
    """

    steps: int
    sequence_length: int
    batch_size: int
    sizes: tuple[int, int]
    long_share: float
    contradict: float
    families: list[str]


class LabBatch(NamedTuple):
    """``weights`` [B, T] belong to the token they stand at (as a label)."""

    input_ids: Tensor  # [B, T]
    weights: Tensor  # [B, T]


class Encoder:
    """Encodes conversations piece by piece with a memory, as the chat template would, and marks the answers."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context_weight: float) -> None:
        self.tokenizer, self.context_weight = tokenizer, context_weight
        self.start = tokenizer.convert_tokens_to_ids(START)
        self.end = tokenizer.convert_tokens_to_ids(END)
        self.newline = self.encode("\n")
        self.roles = {role: [self.start, *self.encode(role + "\n")] for role in ("system", "user", "assistant")}

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def conversation(self, turns: list[tuple[str, str]]) -> tuple[list[int], list[float]]:
        """Token ids and loss weights of (role, content) turns; answers and their end marks weigh 1."""
        ids: list[int] = []
        weights: list[float] = []
        for role, content in turns:
            head, body = self.roles[role], [*self.encode(content), self.end]
            ids += head + body + self.newline
            answer = 1.0 if role == "assistant" else self.context_weight
            weights += (
                [self.context_weight] * len(head) + [answer] * len(body) + [self.context_weight] * len(self.newline)
            )
        return ids, weights


def document(rng: random.Random, stage: Stage, seed: int) -> list[tuple[str, str]]:
    """One context with several of its questions, as chat turns."""
    family = rng.choice(stage.families)
    context = make_context(seed, family, split="train", size=rng.randint(*stage.sizes), contradict=stage.contradict)
    ask_long = rng.random() < stage.long_share
    tasks = [task for task in context.tasks if ask_long or not task.long]
    rng.shuffle(tasks)
    if ask_long and rng.random() < 0.5:  # evaluation asks each task first, straight under the context
        tasks.sort(key=lambda task: not task.long)
    turns = [("system", context.system)]
    for i, task in enumerate(tasks):
        turns += [("user", task.question if i else f"{context.text}\n\n{task.question}"), ("assistant", task.answer)]
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
