"""Conversations for draft training: prompts with the target's own responses."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dgd_lightning.data.chat import prompt_ids
from dgd_lightning.data.rows import read_jsonl
from dgd_lightning.errors import InputError
from dgd_lightning.pair import load_tokenizer
from dgd_lightning.types import Task

PAD_TO = 32  # lengths are rounded up to this, so that few shapes occur


class ResponseBatch(NamedTuple):
    """Conversations padded on the right with token 0, which no loss and no earlier token sees."""

    input_ids: Tensor  # [B, S]
    loss_mask: Tensor  # [B, S] bool, true at response tokens


class ResponseDataset(Dataset[tuple[Tensor, Tensor]]):
    """(prompt ids, response ids) pairs, 1-D LongTensors; responses shorter than two tokens teach nothing and go."""

    def __init__(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self.pairs = [pair for pair in pairs if len(pair[1]) >= 2]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.pairs[index]


def pad_responses(pairs: list[tuple[Tensor, Tensor]]) -> ResponseBatch:
    """Join prompts and responses and pad them to one length."""
    longest = max(len(prompt) + len(response) for prompt, response in pairs)
    length = -(-longest // PAD_TO) * PAD_TO
    input_ids = torch.zeros(len(pairs), length, dtype=torch.long)
    loss_mask = torch.zeros(len(pairs), length, dtype=torch.bool)
    for row, (prompt, response) in enumerate(pairs):
        end = len(prompt) + len(response)
        input_ids[row, :end] = torch.cat([prompt, response])
        loss_mask[row, len(prompt) : end] = True
    return ResponseBatch(input_ids, loss_mask)


class ResponsesData(LightningDataModule):
    """Conversations of a predictions file: what `dgd predict` wrote when the target answered the training prompts.

    A row needs ``messages`` (or ``prompt``) and ``model_output``; the exact tokens in ``dgd.output_ids`` are used where
    the row has them, since text need not encode to the tokens it came from. Of several arms' rows for one task the
    first counts. Rows without an answer are left out.

    Args:
        path: predictions (``.jsonl`` or ``.jsonl.gz``).
        target: Hub id or folder whose tokenizer and chat template encode them, or ``lab``.
        batch_size: conversations per step and device.
        max_length: longer conversations are cut on the right.
        val_share: share of the rows (the last ones) whose prompts are decoded in validation.
        val_batch_size: prompts decoded together in validation.
        num_workers: processes that collate.
        enable_thinking: passed to the chat template.
    """

    def __init__(
        self,
        path: str,
        target: str,
        batch_size: int = 4,
        max_length: int = 3072,
        val_share: float = 0.02,
        val_batch_size: int = 4,
        num_workers: int = 0,
        enable_thinking: bool = False,
    ) -> None:
        super().__init__()
        if not 0.0 <= val_share < 1.0:
            raise InputError("data.val_share", expected="a share in [0, 1)", received=val_share, mend="use e.g. 0.02")
        if batch_size < 1 or max_length < 2:
            raise InputError(
                "data.batch_size, data.max_length",
                expected="at least 1 and 2",
                received=f"{batch_size}, {max_length}",
                mend="use larger ones",
            )
        self.path, self.target, self.batch_size = Path(path), target, batch_size
        self.max_length, self.val_share, self.val_batch_size = max_length, val_share, val_batch_size
        self.num_workers, self.enable_thinking = num_workers, enable_thinking
        self.train_pairs: list[tuple[Tensor, Tensor]] | None = None
        self.val_prompts: list[Tensor] = []

    def setup(self, stage: str) -> None:
        """Reads and encodes the file.

        Raises:
            InputError: it can't be read, a row lacks a field, or no answered row is left.
        """
        if self.train_pairs is not None:
            return
        tokenizer = load_tokenizer(self.target)
        pairs: list[tuple[Tensor, Tensor]] = []
        seen: set[str] = set()
        for row in read_jsonl(self.path, "data.path"):
            value = row.value
            idx = str(value.get("idx", row.number))
            if idx in seen or not value.get("model_output"):
                continue
            seen.add(idx)
            if "messages" not in value and "prompt" not in value:
                raise InputError(
                    row.place, expected="'messages' or 'prompt'", received=", ".join(value), mend="use predictions"
                )
            task = Task(idx, value.get("messages"), value.get("prompt"), value)
            prompt = prompt_ids(tokenizer, task, enable_thinking=self.enable_thinking)
            response = value.get("dgd", {}).get("output_ids") or [
                *tokenizer.encode(value["model_output"], add_special_tokens=False),  # type: ignore[union-attr]
                tokenizer.eos_token_id,  # type: ignore[union-attr]
            ]
            answer = torch.tensor(response, dtype=torch.long)[: max(0, self.max_length - len(prompt))]
            pairs.append((prompt, answer))
        held_out = round(len(pairs) * self.val_share)
        self.val_prompts = [prompt for prompt, _ in pairs[len(pairs) - held_out :]]
        self.train_pairs = [pair for pair in pairs[: len(pairs) - held_out] if len(pair[1]) >= 2]
        if not self.train_pairs:
            raise InputError(
                "data.path",
                expected=f"answers of at least two tokens within max_length = {self.max_length}",
                received="none",
                mend="decode training prompts first: dgd predict with an autoregressive arm",
            )

    def train_dataloader(self) -> DataLoader[ResponseBatch]:
        """Batches in random order."""
        assert self.train_pairs is not None
        return DataLoader(
            ResponseDataset(self.train_pairs),  # type: ignore[arg-type]  # collated into batches
            self.batch_size,
            shuffle=True,
            collate_fn=pad_responses,
            num_workers=self.num_workers,
        )

    def val_dataloader(self) -> DataLoader[list[Tensor]]:
        """Lists of prompts."""
        return DataLoader(self.val_prompts, self.val_batch_size, collate_fn=list)  # type: ignore[arg-type]
