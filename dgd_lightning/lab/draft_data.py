"""The lab's data for `DraftTraining`: prompts of training contexts, answered by the target itself."""

from __future__ import annotations

import random
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from dgd_lightning.data.responses import ResponseBatch, ResponseDataset, response_loader
from dgd_lightning.decode import autoregressive_generate
from dgd_lightning.lab.families import FAMILIES
from dgd_lightning.lab.names import Split
from dgd_lightning.lab.rows import make_context, messages
from dgd_lightning.lab.tokenizer import build_tokenizer
from dgd_lightning.lab.training_data import require_one_rank
from dgd_lightning.pair import load_pair


class Prompts(NamedTuple):
    """Encoded prompts, and whether each asks for a long answer."""

    ids: list[Tensor]  # 1-D LongTensors
    long: list[bool]


def lab_prompts(
    count: int, *, seed: int, split: Split, families: list[str], sizes: tuple[int, int], long_share: float
) -> Prompts:
    """``count`` prompts, one question each, drawn from contexts of ``split``."""
    tokenizer = build_tokenizer()
    ids: list[Tensor] = []
    longs: list[bool] = []
    rng = random.Random(f"draft/{split}/{seed}")
    while len(ids) < count:
        context = make_context(
            rng.getrandbits(48), rng.choice(families), split=split, size=rng.randint(*sizes), contradict=0.2
        )
        want_long = rng.random() < long_share
        tasks = [task for task in context.tasks if task.long is want_long]
        if not tasks:
            continue
        text = tokenizer.apply_chat_template(
            messages(context, rng.choice(tasks)), tokenize=False, add_generation_prompt=True
        )
        ids.append(torch.tensor(tokenizer.encode(text, add_special_tokens=False)))
        longs.append(want_long)
    return Prompts(ids, longs)


class LabDraftData(L.LightningDataModule):
    """Conversations for the draft: lab prompts with the target's own greedy responses, written before training starts.

    Args:
        target: Hub id or folder of the target that answers, or ``lab``.
        prompts: training prompts.
        batch_size: conversations per step.
        sizes: smallest and largest number of facts in a context.
        long_share: share of the prompts that ask for a long answer.
        max_new_tokens: longest response.
        generation_batch: prompts answered at once.
        val_prompts: held-out long prompts whose τ is validated.
        families: families to draw from; the shifted domain is never among the defaults.
        seed: base seed.
    """

    def __init__(
        self,
        target: str,
        prompts: int = 8000,
        batch_size: int = 16,
        sizes: tuple[int, int] = (5, 13),
        long_share: float = 0.6,
        max_new_tokens: int = 160,
        generation_batch: int = 64,
        val_prompts: int = 32,
        families: list[str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.target, self.prompts, self.batch_size = target, prompts, batch_size
        self.draw: dict[str, Any] = {"families": families or list(FAMILIES), "sizes": sizes}
        self.long_share, self.max_new_tokens, self.generation_batch = long_share, max_new_tokens, generation_batch
        self.val_prompts, self.seed = val_prompts, seed
        self.dataset: ResponseDataset | None = None

    def setup(self, stage: str) -> None:
        """Let the target answer the training prompts.

        Raises:
            InputError: there are several ranks, or the target can't be loaded.
        """
        require_one_rank(self.trainer)
        if stage != "fit" or self.dataset is not None:
            return
        prompts = lab_prompts(self.prompts, seed=self.seed, split="train", long_share=self.long_share, **self.draw)
        pair = load_pair(self.target, None)
        pairs: list[tuple[Tensor, Tensor]] = []
        order = sorted(range(len(prompts.ids)), key=lambda i: (prompts.long[i], len(prompts.ids[i])))
        for start in range(0, len(order), self.generation_batch):
            part = [prompts.ids[i] for i in order[start : start + self.generation_batch]]
            outputs = autoregressive_generate(pair, part, max_new_tokens=self.max_new_tokens)
            pairs += [(prompt, output.tokens) for prompt, output in zip(part, outputs, strict=True)]
        self.dataset = ResponseDataset(pairs)

    def train_dataloader(self) -> DataLoader[ResponseBatch]:
        """Batches in random order."""
        assert self.dataset is not None
        return response_loader(self.dataset, self.batch_size, seed=self.seed, trainer=self.trainer)

    def val_dataloader(self) -> DataLoader[list[Tensor]]:
        prompts = lab_prompts(self.val_prompts, seed=self.seed, split="eval", long_share=1.0, **self.draw).ids
        return DataLoader(prompts, batch_size=16, collate_fn=list)  # type: ignore[arg-type]

    def test_dataloader(self) -> DataLoader[list[Tensor]]:
        """Those of validation."""
        return self.val_dataloader()
