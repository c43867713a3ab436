"""What the decoding tests share: random prompts, a dialled draft, margins of teacher-forced replays."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from dgd_lightning.pair import Pair
from dgd_lightning.types import DecodeOutput

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from dialled import DialledDraft  # type: ignore[import-not-found]


def random_prompts(count: int, seed: int, longest: int = 40, vocab: int = 64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(vocab, (length,), generator=generator) for length in lengths]


def tokens_of(outputs: list[DecodeOutput]) -> list[list[int]]:
    return [output.tokens.tolist() for output in outputs]


def dial(pair: Pair, prompts: list[Tensor], plain: list[DecodeOutput], acceptance: float, seed: int = 0) -> Pair:
    """The same target with a draft that proposes its greedy token with this probability."""
    texts = [[*prompt.tolist(), *output.tokens.tolist()] for prompt, output in zip(prompts, plain, strict=True)]
    assert pair.draft is not None
    return Pair(pair.target, DialledDraft(pair.draft, pair.target, texts, acceptance, seed), None)


@torch.no_grad()
def shortfalls(pair: Pair, prompt: Tensor, tokens: list[int]) -> Tensor:
    """[T] by how much transformers, teacher-forced on these tokens, prefers its own choice to each of them."""
    logits = pair.target.model(torch.tensor([[*prompt.tolist(), *tokens]])).logits[0, len(prompt) - 1 : -1].double()
    return logits.amax(-1) - logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
