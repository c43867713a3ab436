"""The slow, obvious oracles: one row, no cache, every forward over the whole text. Kept for ever; never made faster.

They read hidden states as transformers names them and draw in the plainest order, so that whatever the fast loops do
with caches, masks, batches and buffers has something simple to equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dgd_lightning.decode.random_source import ACCEPT, DRAFT, TARGET, RandomTable, Stream, random_table
from dgd_lightning.decode.sampling import GREEDY, SamplingParams, probabilities

if TYPE_CHECKING:
    from dgd_lightning.pair import Pair


class ReferenceOutput(NamedTuple):
    """Tokens of one row, and what every verification agreed on (not cut at a stop token or the limit)."""

    tokens: list[int]
    verified_lengths: list[int]


class _Dice:
    """One row's random numbers; greedy decoding never throws them."""

    def __init__(self, seed: int, start: int, positions: int) -> None:
        self.random_source = RandomTable(random_table([seed], positions), torch.tensor([start]))

    def token(self, distribution: Tensor, stream: Stream, position: int) -> int:  # distribution [V]
        return int(self.random_source.categorical(distribution[None, None].cpu(), stream, torch.tensor([[position]])))

    def coin(self, chance: Tensor, position: int) -> bool:
        return bool(self.random_source.bernoulli(chance[None, None].cpu(), ACCEPT, torch.tensor([[position]])))


@torch.no_grad()
def reference_autoregressive(
    pair: Pair,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    sampling: SamplingParams = GREEDY,
    stop_token_ids: Sequence[int] = (),
    row_seed: int = 0,
) -> ReferenceOutput:
    """Continue ``prompt`` [S] one token at a time, each from a full forward."""
    text, dice = prompt.tolist(), _Dice(row_seed, len(prompt), max_new_tokens)
    while len(text) - len(prompt) < max_new_tokens:
        distribution = probabilities(_forward(pair, text).logits[-1], sampling)  # [V]
        text.append(dice.token(distribution, TARGET, len(text)))
        if text[-1] in stop_token_ids:
            break
    tokens = text[len(prompt) :]
    return ReferenceOutput(tokens, [1] * (len(tokens) - 1))


@torch.no_grad()
def reference_speculative(
    pair: Pair,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    block_size: int,
    sampling: SamplingParams = GREEDY,
    scheme: str = "rejection",
    stop_token_ids: Sequence[int] = (),
    row_seed: int = 0,
) -> ReferenceOutput:
    """Continue ``prompt`` [S] block by block: draft, verify from a full forward, commit; nothing is remembered.

    Greedily and with ``exact_match`` the draft proposes its argmax; ``rejection`` draws proposals and judges them by q.
    """
    match = scheme == "exact_match" or sampling.greedy
    text, start = prompt.tolist(), len(prompt)
    dice = _Dice(row_seed, start, max_new_tokens + block_size)
    text.append(dice.token(probabilities(_forward(pair, text).logits[-1], sampling), TARGET, start))
    verified: list[int] = []
    while len(text) - start < max_new_tokens and not set(text[start:]) & set(stop_token_ids):
        anchor = len(text) - 1
        drafted = _draft_logits(pair, text, block_size)  # [K - 1, V]
        q = probabilities(drafted, sampling)  # [K - 1, V]
        if match:
            proposals = drafted.argmax(-1).tolist()
        else:
            proposals = [dice.token(q[j], DRAFT, anchor + 1 + j) for j in range(block_size - 1)]
        p = probabilities(_forward(pair, text + proposals).logits[anchor:], sampling)  # [K, V]
        committed: list[int] = []
        for j, token in enumerate(proposals):
            position = anchor + 1 + j
            if match:
                committed.append(dice.token(p[j], TARGET, position))
                if committed[-1] != token:
                    break
            elif dice.coin((p[j, token] / q[j, token]).clamp(max=1), position):
                committed.append(token)
            else:
                rest = (p[j] - q[j]).clamp(min=0)  # [V]
                committed.append(dice.token(rest if rest.sum() > 0 else p[j], TARGET, position))
                break
        else:
            committed.append(dice.token(p[-1], TARGET, anchor + block_size))
        text += committed
        verified.append(len(committed))
    tokens = text[start : start + max_new_tokens]
    stops = [i for i, token in enumerate(tokens) if token in stop_token_ids]
    return ReferenceOutput(tokens[: stops[0] + 1] if stops else tokens, verified)


class _Forward(NamedTuple):
    logits: Tensor  # [S, V]
    features: Tensor  # [S, F·H]


def _forward(pair: Pair, text: list[int]) -> _Forward:
    ids = torch.tensor([text], device=pair.target.device)
    output = pair.target.model(input_ids=ids, use_cache=False, output_hidden_states=True)
    layer_ids = () if pair.draft is None else pair.draft.config.target_layer_ids
    tapped = [output.hidden_states[i + 1][0] for i in layer_ids]  # index 0 is the embedding
    return _Forward(output.logits[0], torch.cat(tapped, dim=-1) if tapped else output.logits.new_empty(len(text), 0))


def _draft_logits(pair: Pair, text: list[int], block_size: int) -> Tensor:
    """[K - 1, V] for the tokens after the last of ``text``."""
    assert pair.draft is not None
    block = torch.tensor([text[-1:] + [pair.draft.config.mask_token_id] * (block_size - 1)], device=pair.target.device)
    features = _forward(pair, text[:-1]).features[None]  # [1, S - 1, F·H], what comes before the anchor
    anchors = torch.tensor([[len(text) - 1]], device=pair.target.device)
    hidden = pair.draft.multi_anchor(features, pair.target.embed(block), anchors)  # [1, K, H]
    return pair.target.lm_head(hidden)[0, 1:]
