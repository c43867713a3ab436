"""`LabTargetData`: the lab's texts for `TargetPretraining`.

Packed conversations, answers weighted most, short contexts before long ones; and probes for its validation.
"""

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count
from typing import NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerBase

from dgd_lightning.errors import InputError
from dgd_lightning.lab.families import ALL_FAMILIES
from dgd_lightning.lab.rows import make_context, messages
from dgd_lightning.lab.tokenizer import END, START, VOCAB_SIZE, build_tokenizer


def require_one_rank(trainer: L.Trainer | None) -> None:
    """Raises InputError on several ranks: the lab's models are too small to gain, and all would do the same."""
    if trainer is not None and trainer.world_size > 1:
        raise InputError(
            "trainer.devices",
            expected="1 for the lab's training data",
            received=f"{trainer.world_size} ranks",
            hint="set trainer.devices: 1",
        )


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
            ids += self.roles[turn.role]
            weights += [self.context_weight] * len(self.roles[turn.role])
            for i, part in enumerate(turn.parts):
                body = self.encode(" " + part.text if i else part.text)
                ids += body
                plain = [self.context_weight] * len(body)
                weights += self.answer_weights(body, part.value) if turn.role == "assistant" else plain
            ids += [self.end, *self.newline]
            answer_end = self.ANSWER if turn.end_weight is None else turn.end_weight
            end = answer_end if turn.role == "assistant" else self.context_weight
            weights += [end] + [self.context_weight] * len(self.newline)
        return ids, weights

    def answer_weights(self, body: list[int], value: str | None) -> list[float]:
        """Weights of an answer's tokens ``body``."""
        if value is None:
            return [self.LONG] * len(body)
        weights = [self.ANSWER] * len(body)
        inner = self.encode(" " + value)
        for start in range(len(body)):
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


def stage_at(step: int, lengths: list[int]) -> tuple[int, int]:
    """The stage in which a step falls, and the step's number in it; the last stage goes on for ever."""
    for stage, length in enumerate(lengths[:-1]):
        if step < length:
            return stage, step
        step -= length
    return len(lengths) - 1, step


class LabStream(IterableDataset[LabBatch]):
    """Batches of packed documents; batch ``i`` depends on (seed, i) alone, so a run resumed at ``first_step`` goes on
    as it would have.
    """

    def __init__(self, encoder: Encoder, stages: list[Stage], seed: int, first_step: int = 0) -> None:
        self.encoder, self.stages, self.seed, self.first_step = encoder, stages, seed, first_step

    def batch(self, step: int) -> LabBatch:
        """The batch of one optimiser step."""
        rng = random.Random(f"{self.seed}/{step}")
        stage = self.stages[stage_at(step, [stage.steps for stage in self.stages])[0]]
        rows: list[list[int]] = []
        row_weights: list[list[float]] = []
        while len(rows) < stage.batch_size:
            ids: list[int] = []
            weights: list[float] = []
            while len(ids) < stage.sequence_length:
                more_ids, more_weights = self.encoder.conversation(document(rng, stage, rng.getrandbits(48)))
                ids += more_ids
                weights += more_weights
            rows.append(ids[: stage.sequence_length])  # cut: every row starts with a whole context
            row_weights.append(weights[: stage.sequence_length])
        return LabBatch(torch.tensor(rows), torch.tensor(row_weights))

    def __iter__(self) -> Iterator[LabBatch]:
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        yield from map(self.batch, count(self.first_step + worker, workers))


class ProbeBatch(NamedTuple):
    """Single-question conversations for validation: a task is solved if every answer token is the argmax."""

    input_ids: Tensor  # [B, T]
    answer_mask: Tensor  # [B, T] bool, true at answer tokens (as labels)
    kinds: list[str]  # B names to group by


class LabTargetData(L.LightningDataModule):
    """The lab's training stream for the target, and probes from held-out names for its validation.

    Args:
        stages: the curriculum.
        context_weight: loss weight of tokens that are not part of an answer.
        seed: base seed of the stream.
        probes: contexts per family in the validation set.
        probe_sizes: smallest and largest number of facts in a probe's context.
        num_workers: processes that write text ahead of the training step.
    """

    def __init__(
        self,
        stages: list[Stage],
        context_weight: float = 0.02,
        seed: int = 0,
        probes: int = 16,
        probe_sizes: tuple[int, int] = (7, 11),
        num_workers: int = 1,
    ) -> None:
        super().__init__()
        self.tokenizer = build_tokenizer()
        self.vocab_size = VOCAB_SIZE
        self.encoder = Encoder(self.tokenizer, context_weight)
        self.stages, self.seed, self.num_workers = stages, seed, num_workers
        self.probes, self.probe_sizes = probes, probe_sizes

    def fingerprint(self) -> str:
        """Short hash of everything that shapes the text and the probes, for the run's provenance."""
        stages = [asdict(stage) for stage in self.stages]
        settings = [stages, self.encoder.context_weight, self.seed, self.probes, self.probe_sizes]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]

    def setup(self, stage: str) -> None:
        require_one_rank(self.trainer)

    def train_dataloader(self) -> DataLoader[LabBatch]:
        """The stream, from the batch where a resumed run goes on."""
        first = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready if self.trainer else 0
        stream = LabStream(self.encoder, self.stages, self.seed, first)
        return DataLoader(stream, batch_size=None, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader[ProbeBatch]:
        return DataLoader(probe_batches(self.encoder, self.probes, self.probe_sizes), batch_size=None)  # type: ignore[arg-type]

    def test_dataloader(self) -> DataLoader[ProbeBatch]:
        return self.val_dataloader()


def probe_batches(encoder: Encoder, contexts: int, sizes: tuple[int, int], batch_size: int = 32) -> list[ProbeBatch]:
    """Validation probes of every family: held-out names, half of the prior facts contradicted."""
    samples: list[tuple[list[int], list[float], str]] = []
    for family in ALL_FAMILIES:
        for seed in range(contexts):
            rng = random.Random(f"probe/{family}/{seed}")
            context = make_context(seed, family, split="eval", size=rng.randint(*sizes), contradict=0.5)
            for task in rng.sample(context.tasks, min(3, len(context.tasks))):
                chat = [*messages(context, task), {"role": "assistant", "content": task.answer}]
                ids, weights = encoder.conversation([Turn(one["role"], [Part(one["content"])]) for one in chat])
                group = task.kind if task.prior in ("novel", "closed") else task.prior
                samples.append((ids, weights, group))
    samples.sort(key=lambda sample: len(sample[0]))
    batches = []
    for start in range(0, len(samples), batch_size):
        part = samples[start : start + batch_size]
        input_ids = pad_sequence([torch.tensor(ids) for ids, _, _ in part], batch_first=True)
        answers = [torch.tensor(weights) > encoder.context_weight for _, weights, _ in part]
        groups = [group for _, _, group in part]
        batches.append(ProbeBatch(input_ids, pad_sequence(answers, batch_first=True), groups))
    return batches
