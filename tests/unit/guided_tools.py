"""What the tests of guided decoding share: readouts, a naive oracle, set proposals, a record of what is mixed.

The oracle is one row without a cache: transformers' plain forward over the whole text for every token, the draft's
training forward with a single block, and the formula written out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from decode_tools import random_prompts
from tiny import make_target
from torch import Tensor

from dgd_lightning.decode.blending import Blend
from dgd_lightning.decode.drafter import Proposal
from dgd_lightning.decode.readouts.ablated_draft import AblatedDraft
from dgd_lightning.decode.readouts.base import Readout
from dgd_lightning.decode.readouts.dola import DoLa
from dgd_lightning.decode.readouts.draft import DraftReadout
from dgd_lightning.decode.readouts.logit_lens import LogitLens
from dgd_lightning.decode.readouts.matched_entropy import MatchedEntropy
from dgd_lightning.decode.readouts.noise import Noise
from dgd_lightning.decode.readouts.other_model import OtherModel
from dgd_lightning.decode.readouts.without_context import WithoutContext
from dgd_lightning.methods import guided
from dgd_lightning.pair import Pair

BETAS = (-1.0, -0.25, 0.0, 0.1, 0.5, 1.0)
READOUTS = (
    "draft",
    "small_block",
    "shuffled",
    "random",
    "lens",
    "raw_lens",
    "dola",
    "without",
    "other",
    "noise",
    "entropy",
    "ablated",
)

Read = Callable[[list[int]], Tensor]  # a text -> the readout's logits [V] for its next token


def without_context(prompts: Sequence[Tensor]) -> list[Tensor]:
    """The last third of each prompt, one token at least, and another last token than the prompt's."""
    return [(prompt[-max(1, len(prompt) // 3) :] + 1) % 60 for prompt in prompts]


def ragged(rows: int, seed: int) -> list[Tensor]:
    """Random prompts, the first of one token."""
    return (
        [torch.tensor([seed % 60]), *random_prompts(rows - 1, seed, longest=24)]
        if rows > 1
        else random_prompts(1, seed)
    )


def tapped(pair: Pair) -> tuple[int, ...]:
    """Layers that the draft reads."""
    assert pair.draft is not None
    return tuple(pair.draft.config.target_layer_ids)


def middle(pair: Pair) -> int:
    """A layer amid the target's."""
    return pair.target.num_layers // 2


def early(pair: Pair) -> tuple[int, ...]:
    """Every other layer of the target, without the last."""
    return tuple(range(0, pair.target.num_layers - 1, 2))


def readout_of(name: str, pair: Pair, prompts: Sequence[Tensor]) -> Readout:
    """Every readout."""
    target = pair.target
    if name == "other":
        changes = {"num_hidden_layers": 2, "hidden_size": 24, "vocab_size": target.vocab_size}
        return OtherModel(make_target("llama", seed=77, dtype=target.dtype, **changes))
    readouts: dict[str, Readout] = {
        "draft": DraftReadout(),
        "small_block": DraftReadout(block_size=2),
        "shuffled": DraftReadout(features="shuffled", seed=3),
        "random": DraftReadout(features="random", seed=3),
        "lens": LogitLens(middle(pair)),
        "raw_lens": LogitLens(middle(pair), norm=False),
        "dola": DoLa(early(pair)),
        "without": WithoutContext(without_context(prompts)),
        "noise": Noise(seed=5),
        "entropy": MatchedEntropy(),
        "ablated": AblatedDraft(tapped(pair)[:1]),
    }
    return readouts[name]


# The naive oracle.


@torch.no_grad()
def plain_forward(model: Any, text: Sequence[int]) -> Any:
    return model(torch.tensor([list(text)]), output_hidden_states=True)


@torch.no_grad()
def naive_draft(pair: Pair, text: Sequence[int], block_size: int | None = None) -> Tensor:
    """Slot 1 of one block anchored at the text's last token, over the features before it."""
    draft, model = pair.draft, pair.target.model
    assert draft is not None
    size, at = block_size or draft.config.block_size, len(text) - 1
    states = plain_forward(model, text).hidden_states
    features = torch.cat([states[i + 1] for i in draft.config.target_layer_ids], dim=-1)[:, :at]  # [1, S, F·H]
    block = torch.tensor([[text[-1], *[draft.config.mask_token_id] * (size - 1)]])
    hidden = draft.multi_anchor(features, model.get_input_embeddings()(block), torch.tensor([[at]]))  # [1, K, H]
    return model.get_output_embeddings()(hidden[0, 1])


def naive_dola(model: Any, layers: Sequence[int], output: Any) -> Tensor:
    """Of these layers, the one whose distribution is furthest from the last one's by JS divergence."""
    last = output.logits[0, -1].softmax(-1)
    best, furthest = last, -1.0
    for layer in layers:
        logits = model.get_output_embeddings()(model.get_decoder().norm(output.hidden_states[layer + 1][0, -1]))
        distribution = logits.softmax(-1)
        middle = (distribution + last) / 2
        distance = sum(float((one * (one / middle).log()).sum()) for one in (distribution, last)) / 2
        if distance > furthest:
            best, furthest = logits, distance
    return best


def naive_read(name: str, pair: Pair, prompt: Tensor) -> Read:
    """The readouts that can be said in a line of transformers."""
    model = pair.target.model
    head, norm = model.get_output_embeddings(), model.get_decoder().norm
    if name == "lens":
        return lambda text: head(norm(plain_forward(model, text).hidden_states[middle(pair) + 1][0, -1]))
    if name == "dola":
        return lambda text: naive_dola(model, early(pair), plain_forward(model, text))
    if name == "raw_lens":
        return lambda text: head(plain_forward(model, text).hidden_states[middle(pair) + 1][0, -1])
    if name == "other":
        other: Any = readout_of("other", pair, [prompt])
        return lambda text: plain_forward(other.model.model, text).logits[0, -1]
    if name == "without":
        short = without_context([prompt])[0].tolist()
        return lambda text: plain_forward(model, [*short, *text[len(prompt) :]]).logits[0, -1]
    assert name in ("draft", "small_block")
    return lambda text: naive_draft(pair, text, 2 if name == "small_block" else None)


class Naive(NamedTuple):
    """What the oracle says."""

    tokens: list[int]
    readout: Tensor  # [T, V]
    guided: Tensor  # [T, V]


@torch.no_grad()
def naive_guided(pair: Pair, prompt: Tensor, new: int, beta: float, read: Read) -> Naive:
    """Greedy tokens of ``(1 − β)·target + β·readout``."""
    text, readouts, mixes = prompt.tolist(), [], []
    for _ in range(new):
        readouts.append(read(text))
        mixes.append((1 - beta) * plain_forward(pair.target.model, text).logits[0, -1] + beta * readouts[-1])
        text.append(int(mixes[-1].argmax()))
    return Naive(text[len(prompt) :], torch.stack(readouts), torch.stack(mixes))


# The loops.


class Mixed(NamedTuple):
    """What was blended for the tokens of a batch, [B, T, V] each."""

    target: Tensor
    readout: Tensor
    guided: Tensor


class Record:
    """Remembers, inside the block, what every position was mixed of; for batches whose rows all end together.

    A position that was rejected is read again, and only its last reading is kept: the one its token was chosen from.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.steps: dict[tuple[int, int], tuple[Tensor, ...]] = {}

    def __enter__(self) -> Record:
        self.patch = self.monkeypatch.context()
        patches, mix = self.patch.__enter__(), Blend.mix

        def remembered(blend: Blend, target: Tensor, readout: Tensor, beta: Tensor, step: Tensor) -> Tensor:
            mixed = mix(blend, target, readout, beta, step)
            for row, steps in enumerate(step.tolist()):
                for slot, at in enumerate(steps):
                    self.steps[row, at] = (target[row, slot], readout[row, slot], mixed[row, slot])
            return mixed

        patches.setattr(Blend, "mix", remembered)
        return self

    def __exit__(self, *_: object) -> None:
        self.patch.__exit__(None, None, None)

    def of(self, rows: int, new: int) -> Mixed:
        """The first ``new`` tokens of every row."""
        parts = [[self.steps[row, at] for at in range(new)] for row in range(rows)]
        return Mixed(*(torch.stack([torch.stack([step[i] for step in row]) for row in parts]) for i in range(3)))


def known_proposals(
    monkeypatch: pytest.MonkeyPatch, prompts: Sequence[Tensor], tokens: Sequence[Sequence[int]], acceptance: float
) -> None:
    """Let the loop propose each row's known greedy token with this probability, another one otherwise.

    A random draft is hardly ever right; and a draft that was told what to say could not be a readout too.
    """
    texts = [[*prompt.tolist(), *row] for prompt, row in zip(prompts, tokens, strict=True)]
    truth = torch.nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], batch_first=True)  # [B, P]
    wrong = torch.rand(truth.shape, generator=torch.Generator().manual_seed(4)) >= acceptance

    def propose(drafter: Any, batch: Any, positions: Tensor, scheme: str) -> Proposal:
        at = positions[:, 1:].clamp(max=truth.shape[1] - 1)
        rows = torch.tensor(batch.live)[:, None]
        return Proposal((truth[rows, at] + wrong[rows, at]) % drafter.target.vocab_size, None)

    monkeypatch.setattr(guided, "propose", propose)
