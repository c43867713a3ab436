"""Replay: what target and readouts say at every position of a text that is given (teacher forcing).

Diagnostics, divergences, rescoring and the check that a differing token was a near-tie all ask the same thing: given
these tokens, which logits stood before each of them? The readings are those of guided decoding, so the numbers are too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dgd_lightning.decode.engine import check_prompt, check_request
from dgd_lightning.decode.readouts import Readout, Stretch, split_taps
from dgd_lightning.decode.slots import DraftSlots

if TYPE_CHECKING:
    from dgd_lightning.pair import Pair


class Replayed(NamedTuple):
    """A stretch of Q tokens of the answer, and the logits that each was chosen from."""

    first: int  # how many tokens of the answer come before
    tokens: Tensor  # [Q]
    target: Tensor  # [Q, V]
    readouts: list[Tensor]  # [Q, V] each, in the order of the readouts; [Q, K − 1, V] for `DraftSlots`


@torch.no_grad()
def replay(
    pair: Pair, prompt: Tensor, answer: Tensor, readouts: Sequence[Readout | DraftSlots], *, chunk: int = 64
) -> Iterator[Replayed]:
    """Read a prompt and its answer, stretch by stretch.

    Args:
        pair: target and draft; a draft may be missing where no readout needs one.
        prompt: [S].
        answer: [T], whatever it came from: decoding, or a gold answer.
        readouts: read beside the target, each from the same forward of it.
        chunk: tokens of the answer that are read in one forward: more of them take more memory, chunk · V per readout.

    Yields:
        Stretches in order, T tokens in all.

    Raises:
        InputError: an unusable argument, or a readout that the pair or the prompt can't serve.
    """
    target = pair.target
    answer = check_prompt("answer", answer, target.vocab_size)
    request = check_request(pair, [prompt], max_new_tokens=len(answer))
    width = min(chunk, len(answer))
    layer_ids = tuple(dict.fromkeys(layer for readout in readouts for layer in readout.layers(pair)))
    readings = [readout.begin(pair, request, width) for readout in readouts]
    cache = target.new_cache(1, len(prompt) + len(answer))

    def extend(features: Tensor, positions: Tensor) -> None:
        for reading in readings:
            reading.extend(split_taps(features, layer_ids), positions)

    known = len(prompt) - 1  # the prompt's last token is the first stretch's first
    text = torch.cat([request.ids[0], answer]).to(target.device)[None]  # [1, S + T]
    if known:
        target.prefill(text[:, :known], [known], cache, layer_ids=layer_ids, on_features=extend if layer_ids else None)
    for reading in readings:
        reading.ready()
    for first in range(0, len(answer), width):
        low, high = known + first, min(known + first + width, known + len(answer))
        positions = torch.arange(low, high, device=target.device)[None]  # [1, Q]
        tokens = text[:, low:high]
        logits, features = target.step(tokens, positions, cache, max_length=high, layer_ids=layer_ids)
        taps = split_taps(features, layer_ids)
        for reading in readings:
            reading.extend(taps, positions)
        stretch = Stretch(tokens, positions, logits, taps, high - 1)
        yield Replayed(
            first, text[0, low + 1 : high + 1], logits[0], [reading.logits(stretch)[0] for reading in readings]
        )
