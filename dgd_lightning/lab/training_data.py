"""Lightning datamodules that feed `TargetPretraining` with the lab's world."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import asdict
from typing import NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dgd_lightning.errors import InputError
from dgd_lightning.lab.rows import ALL_FAMILIES, make_context
from dgd_lightning.lab.stream import Encoder, LabBatch, LabStream, Part, Stage, Turn
from dgd_lightning.lab.tokenizer import VOCAB_SIZE, build_tokenizer


def require_one_rank(trainer: L.Trainer | None) -> None:
    """Raises InputError on several ranks: the lab's models are too small to gain, and all would do the same."""
    if trainer is not None and trainer.world_size > 1:
        raise InputError(
            "trainer.devices",
            expected="1 for the lab's training data",
            received=f"{trainer.world_size} ranks",
            hint="set trainer.devices: 1",
        )


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
        """Raises:
        InputError: there are several ranks.
        """
        require_one_rank(self.trainer)

    def train_dataloader(self) -> DataLoader[LabBatch]:
        """The stream, from the batch where a resumed run goes on."""
        first = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready if self.trainer else 0
        stream = LabStream(self.encoder, self.stages, self.seed, first)
        return DataLoader(stream, batch_size=None, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader[ProbeBatch]:
        return DataLoader(probe_batches(self.encoder, self.probes, self.probe_sizes), batch_size=None)  # type: ignore[arg-type]

    def test_dataloader(self) -> DataLoader[ProbeBatch]:
        """Those of validation."""
        return self.val_dataloader()


def probe_batches(encoder: Encoder, contexts: int, sizes: tuple[int, int], batch_size: int = 32) -> list[ProbeBatch]:
    """Validation probes of every family: held-out names, half of the prior facts contradicted."""
    samples: list[tuple[list[int], list[float], str]] = []
    for family in ALL_FAMILIES:
        for seed in range(contexts):
            rng = random.Random(f"probe/{family}/{seed}")
            context = make_context(seed, family, split="eval", size=rng.randint(*sizes), contradict=0.5)
            for task in rng.sample(context.tasks, min(3, len(context.tasks))):
                turns = [
                    Turn("system", [Part(context.system)]),
                    Turn("user", [Part(f"{context.text}\n\n{task.question}")]),
                    Turn("assistant", [Part(task.answer)]),
                ]
                ids, weights = encoder.conversation(turns)
                group = task.kind if task.prior in ("novel", "closed") else task.prior
                samples.append((ids, weights, group))
    samples.sort(key=lambda sample: len(sample[0]))
    batches = []
    for start in range(0, len(samples), batch_size):
        part = samples[start : start + batch_size]
        length = max(len(ids) for ids, _, _ in part)
        input_ids = torch.zeros(len(part), length, dtype=torch.long)
        mask = torch.zeros(len(part), length, dtype=torch.bool)
        for row, (ids, weights, _) in enumerate(part):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = torch.tensor(weights) > encoder.context_weight
        batches.append(ProbeBatch(input_ids, mask, [group for _, _, group in part]))
    return batches
