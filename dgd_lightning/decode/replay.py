"""Replay: what target and readouts say at every position of a text that is given (teacher forcing).

Diagnostics, divergences, rescoring and the check that a differing token was a near-tie all ask the same thing: given
these tokens, from which logits was each of them chosen? The readouts are those of guided decoding, so the numbers are
too.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dgd_lightning.decode.call import Call, check_prompt, check_request
from dgd_lightning.decode.finite import not_finite, peaks
from dgd_lightning.decode.readouts.base import Readout, TargetOutput, split_taps
from dgd_lightning.decode.readouts.draft import DraftSlots
from dgd_lightning.decode.session import Session
from dgd_lightning.pair import Pair


class Replayed(NamedTuple):
    """A chunk of Q tokens of an answer, and the logits that each was chosen from."""

    answer: int  # number of the answer
    first: int  # how many of the answer's tokens come before
    tokens: Tensor  # [Q]
    target: Tensor  # [Q, V]
    readouts: list[Tensor]  # [Q, V] each, in the order of the readouts; [Q, K − 1, V] for `DraftSlots`


@torch.no_grad()
def replay(
    pair: Pair,
    prompt: Tensor,
    answers: Sequence[Tensor],
    readouts: Sequence[Readout | DraftSlots],
    *,
    chunk: int = 64,
    name: str = "prompt",
) -> Iterator[Replayed]:
    """Read a prompt once, and behind it one answer after the other, chunk by chunk.

    Args:
        pair: target and draft; a draft may be missing where no readout needs one.
        prompt: [S].
        answers: [T] each: decoded ones or gold answers.
        readouts: read beside the target, each from the same forward of it.
        chunk: tokens of an answer per forward; memory holds chunk · V logits per readout.
        name: what the prompt is called in errors.

    Yields:
        The chunks of the first answer in order, then those of the next.

    Raises:
        InputError: logits that are no numbers, or a prompt or an answer that can't be read.
    """
    answers = [check_prompt("answer", answer, pair.target.vocab_size) for answer in answers]
    longest = max(map(len, answers), default=1)
    request, width = check_request(pair, [prompt], Call(longest, names=[name])), min(chunk, longest)
    layer_ids = tuple(dict.fromkeys(layer for readout in readouts for layer in readout.layers(pair)))
    states = [readout.begin(pair, request, width) for readout in readouts]
    session = Session(pair.target, request, width=width, layer_ids=layer_ids)

    def extend(features: Tensor | None, positions: Tensor) -> None:
        for state in states:
            state.extend(split_taps(features, layer_ids), positions)

    session.prefill(extend, hold_last=True)  # the prompt's last token comes first in every answer's first chunk
    for state in states:
        state.ready()
    for number, answer in enumerate(answers):  # caches are written by position: the next answer overwrites this one
        text = torch.cat([request.ids[0, -1:], answer]).to(pair.target.device)  # [1 + T]
        for first in range(0, len(answer), width):
            tokens = text[None, first : min(first + width, len(answer))]  # [1, Q]
            chosen = text[first + 1 : first + 1 + width]  # [Q]
            low = len(prompt) - 1 + first
            high = low + len(chosen)
            positions = torch.arange(low, high, device=tokens.device)[None]  # [1, Q]
            logits, features = session.step(tokens, positions, max_length=high)
            extend(features, positions)
            out = TargetOutput(tokens, positions, logits, split_taps(features, layer_ids), high - 1)
            part = Replayed(number, first, chosen, logits[0], [state.logits(out)[0] for state in states])
            highest = [peaks(one).view(len(chosen), -1).sum(1) for one in (part.target, *part.readouts)]  # [Q] each
            if not sum(highest).sum().isfinite():
                whose = ["target", *(f"readout {type(readout).__name__}" for readout in readouts)]
                raise not_finite(name, zip(whose, highest, strict=True), low + 1, pair.target.dtype)
            yield part
