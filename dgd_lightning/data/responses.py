"""Conversations for draft training: prompts with the target's own responses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

PAD_TO = 32  # lengths are rounded up to this, so that few shapes occur


class ResponseBatch(NamedTuple):
    """Conversations padded on the right with token 0, which no loss and no earlier token sees."""

    input_ids: Tensor  # [B, S]
    loss_mask: Tensor  # [B, S] bool, true at response tokens


class ResponseDataset(Dataset[tuple[Tensor, Tensor]]):
    """(prompt ids, response ids) pairs, each a 1-D LongTensor; responses shorter than two tokens teach nothing and go."""

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
