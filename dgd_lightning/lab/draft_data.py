"""The lab's data for `DraftTraining`: prompts of training contexts, answered by the target itself."""

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import count
from typing import NamedTuple

import lightning as L
import torch
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from dgd_lightning.data.responses import Conversation, ResponseBatch, pad_responses, worth_training
from dgd_lightning.errors import InputError
from dgd_lightning.lab.families import FAMILIES
from dgd_lightning.lab.rows import check_families, check_sizes, has_long_task, make_context, messages
from dgd_lightning.lab.tokenizer import build_tokenizer
from dgd_lightning.lab.training_data import require_one_rank, stage_at
from dgd_lightning.lab.world import Split
from dgd_lightning.methods.autoregressive import autoregressive_generate
from dgd_lightning.pair import Pair, load_pair
from dgd_lightning.seeds import mixed_seed


class Prompts(NamedTuple):
    """Encoded prompts, and whether each asks for a long answer."""

    ids: list[Tensor]  # 1-D LongTensors
    long: list[bool]


@dataclass
class DraftStage:
    """One stage of the draft's curriculum.

    Args:
        steps: optimiser steps it lasts; the last stage goes on for as long as the training does.
        prompts: training prompts, answered by the target and shown again in a new order when all were seen.
        sizes: smallest and largest number of facts in a context, inclusive.
        long_share: share of the prompts that ask for a long answer; a family without such tasks gives short ones only.
        families: families to draw from; repeat one to weight it. The shifted domain is never among the defaults.
    """

    steps: int
    prompts: int
    sizes: tuple[int, int] = (5, 16)
    long_share: float = 0.6
    families: list[str] | None = None

    @property
    def drawn(self) -> list[str]:
        """The families to draw from, defaults included."""
        return list(FAMILIES) if self.families is None else self.families

    @property
    def has_long(self) -> bool:
        """Whether any of its families asks for long answers."""
        return any(map(has_long_task, self.drawn))

    def check(self, prefix: str = "") -> None:
        """Raises InputError where it can't be drawn; ``prefix`` goes before a setting's name."""
        check_families(f"{prefix}families", self.drawn)
        check_sizes(f"{prefix}sizes", self.sizes, self.drawn)
        if self.long_share > 0 and not self.has_long:
            raise InputError(
                f"{prefix}long_share",
                expected=f"0 where no family asks for a long answer ({', '.join(self.drawn)})",
                received=self.long_share,
                hint="set it to 0, or add a family with a long task, such as glossary or route",
            )

    def draw(self, count: int, seed: int, split: Split) -> Prompts:
        """``count`` prompts, one question each, from contexts with names of ``split``."""
        self.check()
        tokenizer = build_tokenizer()
        found = Prompts([], [])
        rng = random.Random(f"draft/{split}/{seed}")
        while len(found.ids) < count:
            number, family = rng.getrandbits(48), rng.choice(self.drawn)
            context = make_context(number, family, split=split, size=rng.randint(*self.sizes), contradict=0.2)
            want_long = rng.random() < self.long_share
            if tasks := [task for task in context.tasks if task.long is want_long]:
                chat = messages(context, rng.choice(tasks))
                text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
                found.ids.append(torch.tensor(tokenizer.encode(text, add_special_tokens=False)))
                found.long.append(want_long)
        return found


class StagedOrder(Sampler[list[int]]):
    """Endless batches of indices into the stages' data sets laid end to end; batch i depends on (seed, i) alone.

    ``counts`` and ``steps``: conversations and batches of each stage, the last of which goes on.
    """

    def __init__(self, counts: list[int], steps: list[int], batch_size: int, seed: int, first: int = 0) -> None:
        self.counts, self.steps, self.batch_size, self.seed, self.first = counts, steps, batch_size, seed, first

    def batch(self, number: int) -> list[int]:
        """The indices of one batch."""
        stage, number = stage_at(number, self.steps)
        offset, total = sum(self.counts[:stage]), self.counts[stage]
        epoch, at = divmod(number, max(1, total // self.batch_size))
        order = torch.randperm(total, generator=torch.Generator().manual_seed(mixed_seed(self.seed, stage, epoch)))
        return [offset + int(index) for index in order[at * self.batch_size : (at + 1) * self.batch_size]]

    def __iter__(self) -> Iterator[list[int]]:
        yield from map(self.batch, count(self.first))


class LabDraftData(L.LightningDataModule):
    """Conversations for the draft: lab prompts with the target's own greedy responses, written before training starts.

    Args:
        target: Hub id or folder of the target that answers, or ``lab``.
        stages: the curriculum: short copies first, as for the target.
        batch_size: conversations per step.
        max_new_tokens: longest response.
        generation_batch: prompts answered at once.
        val_prompts: held-out prompts of the last stage whose τ is validated: long ones where its families have any.
        seed: base seed.
    """

    def __init__(
        self,
        target: str,
        stages: list[DraftStage],
        batch_size: int = 16,
        max_new_tokens: int = 160,
        generation_batch: int = 64,
        val_prompts: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not stages or any(stage.prompts < batch_size for stage in stages):
            raise InputError(
                "data.stages",
                expected=f"at least one, each with at least batch_size = {batch_size} prompts",
                received=[stage.prompts for stage in stages],
                hint="add stages or prompts, or lower data.batch_size",
            )
        for i, stage in enumerate(stages):
            stage.check(f"data.stages[{i}].")
        self.target, self.stages, self.batch_size = target, stages, batch_size
        self.max_new_tokens, self.generation_batch = max_new_tokens, generation_batch
        self.val_prompts, self.seed = val_prompts, seed
        self.dataset: list[Conversation] | None = None
        self.counts: list[int] = []

    def fingerprint(self) -> str:
        """Short hash of everything that shapes the conversations and their order, for the run's provenance."""
        answers = [self.target, self.max_new_tokens, self.generation_batch]
        settings = [[*map(asdict, self.stages)], answers, self.batch_size, self.val_prompts, self.seed]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]

    def setup(self, stage: str) -> None:
        """Let the target answer the training prompts."""
        require_one_rank(self.trainer)
        if stage != "fit" or self.dataset is not None:
            return
        pair = load_pair(self.target, None)
        parts: list[list[Conversation]] = []
        for i, part in enumerate(self.stages):
            prompts = part.draw(part.prompts, mixed_seed(self.seed, i), "train")
            parts.append(worth_training(self.answer(pair, prompts)))
        self.counts, self.dataset = [len(part) for part in parts], [one for part in parts for one in part]

    def answer(self, pair: Pair, prompts: Prompts) -> list[Conversation]:
        """Prompts with the target's greedy responses; those of about one length are decoded together."""
        pairs: list[Conversation] = []
        order = sorted(range(len(prompts.ids)), key=lambda i: (prompts.long[i], len(prompts.ids[i])))
        starts = range(0, len(order), self.generation_batch)
        for start in track(starts, description="The target answers", transient=True):
            part = [prompts.ids[i] for i in order[start : start + self.generation_batch]]
            outputs = autoregressive_generate(pair, part, max_new_tokens=self.max_new_tokens)
            pairs += [(prompt, output.tokens) for prompt, output in zip(part, outputs, strict=True)]
        return pairs

    def train_dataloader(self) -> DataLoader[ResponseBatch]:
        """Batches in random order, from the one where a resumed run goes on."""
        assert self.dataset is not None
        first = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready if self.trainer else 0
        order = StagedOrder(self.counts, [stage.steps for stage in self.stages], self.batch_size, self.seed, first)
        return DataLoader(self.dataset, batch_sampler=order, collate_fn=pad_responses)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[list[Tensor]]:
        last = self.stages[-1]
        prompts = replace(last, long_share=float(last.has_long)).draw(self.val_prompts, self.seed, "eval").ids
        return DataLoader(prompts, batch_size=16, collate_fn=list)  # type: ignore[arg-type]

    def test_dataloader(self) -> DataLoader[list[Tensor]]:
        return self.val_dataloader()
