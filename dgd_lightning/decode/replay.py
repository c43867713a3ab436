"""Replay: what target and readouts say at every position of a text that is given (teacher forcing).

Diagnostics, divergences, rescoring and the check that a differing token was a near-tie all ask the same thing: given
these tokens, from which logits was each of them chosen? The readouts are those of guided decoding, so the numbers are
too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dgd_lightning.decode.call import Call, check_prompt, check_request
from dgd_lightning.decode.readouts.base import Readout, TargetOutput, split_taps
from dgd_lightning.decode.readouts.draft_slots import DraftSlots

if TYPE_CHECKING:
    from dgd_lightning.pair import Pair


class Replayed(NamedTuple):
    """A chunk of Q tokens of an answer, and the logits that each was chosen from."""

    answer: int  # number of the answer
    first: int  # how many of the answer's tokens come before
    tokens: Tensor  # [Q]
    target: Tensor  # [Q, V]
    readouts: list[Tensor]  # [Q, V] each, in the order of the readouts; [Q, K − 1, V] for `DraftSlots`


def replay(
    pair: Pair, prompt: Tensor, answer: Tensor, readouts: Sequence[Readout | DraftSlots], *, chunk: int = 64
) -> Iterator[Replayed]:
    """Read a prompt and its answer, chunk by chunk: :func:`replays` of one answer."""
    return replays(pair, prompt, [answer], readouts, chunk=chunk)


@torch.no_grad()
def replays(
    pair: Pair, prompt: Tensor, answers: Sequence[Tensor], readouts: Sequence[Readout | DraftSlots], *, chunk: int = 64
) -> Iterator[Replayed]:
    """Read a prompt once, and behind it one answer after the other, chunk by chunk.

    Args:
        pair: target and draft; a draft may be missing where no readout needs one.
        prompt: [S].
        answers: [T] each: decoded ones or gold answers.
        readouts: read beside the target, each from the same forward of it.
        chunk: tokens of an answer per forward; memory holds chunk · V logits per readout.

    Yields:
        The chunks of the first answer in order, then those of the next.

    Raises:
        InputError: an unusable argument, or a readout that the pair or the prompt can't serve.
    """
    target = pair.target
    answers = [check_prompt("answer", answer, target.vocab_size) for answer in answers]
    longest = max(map(len, answers), default=1)
    request = check_request(pair, [prompt], Call(longest))
    width = min(chunk, longest)
    layer_ids = tuple(dict.fromkeys(layer for readout in readouts for layer in readout.layers(pair)))
    states = [readout.begin(pair, request, width) for readout in readouts]
    cache = target.new_cache(1, len(prompt) + longest)

    def extend(features: Tensor, positions: Tensor) -> None:
        for state in states:
            state.extend(split_taps(features, layer_ids), positions)

    known = len(prompt) - 1  # the prompt's last token comes first in every answer's first chunk
    ids = request.ids.to(target.device)  # [1, S]
    if known:
        target.prefill(ids[:, :known], [known], cache, layer_ids=layer_ids, on_features=extend if layer_ids else None)
    for state in states:
        state.ready()
    for number, answer in enumerate(answers):  # caches are written by position: the next answer overwrites this one
        text = torch.cat([ids[0, known:], answer.to(target.device)])[None]  # [1, 1 + T]
        for first in range(0, len(answer), width):
            count = min(width, len(answer) - first)
            low, high = known + first, known + first + count
            positions = torch.arange(low, high, device=target.device)[None]  # [1, Q]
            tokens = text[:, first : first + count]
            logits, features = target.step(tokens, positions, cache, max_length=high, layer_ids=layer_ids)
            taps = split_taps(features, layer_ids)
            for state in states:
                state.extend(taps, positions)
            out = TargetOutput(tokens, positions, logits, taps, high - 1)
            made = [state.logits(out)[0] for state in states]
            yield Replayed(number, first, text[0, first + 1 : first + 1 + count], logits[0], made)
