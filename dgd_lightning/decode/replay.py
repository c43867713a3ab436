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

CHUNK = 64  # tokens of an answer per forward


class Replayed(NamedTuple):
    """A chunk of Q tokens of an answer, and the logits that each was chosen from."""

    answer: int  # number of the answer
    first: int  # how many of the answer's tokens come before
    tokens: Tensor  # [Q]
    target: Tensor  # [Q, V]
    readouts: list[Tensor]  # [Q, V] each, in the order of the readouts; [Q, K − 1, V] for `DraftSlots`


class ReplayedRows(NamedTuple):
    """A chunk of Q tokens of one answer of each of B prompts; what is behind an answer's end is padding."""

    answer: int  # number of the answer among those of its prompt
    first: int  # how many of the answer's tokens come before
    tokens: Tensor  # [B, Q]
    target: Tensor  # [B, Q, V]
    readouts: list[Tensor]  # [B, Q, V] each


def replay(
    pair: Pair,
    prompt: Tensor,
    answers: Sequence[Tensor],
    readouts: Sequence[Readout | DraftSlots],
    *,
    chunk: int = CHUNK,
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
    for part in replay_rows(pair, [prompt], [answers], readouts, chunk=chunk, names=[name]):
        readings = [rows[0] for rows in part.readouts]
        yield Replayed(part.answer, part.first, part.tokens[0], part.target[0], readings)


@torch.no_grad()
def replay_rows(
    pair: Pair,
    prompts: Sequence[Tensor],
    answers: Sequence[Sequence[Tensor]],
    readouts: Sequence[Readout | DraftSlots],
    *,
    chunk: int = CHUNK,
    names: Sequence[str] | None = None,
) -> Iterator[ReplayedRows]:
    """The same of several prompts [S], a row each, with answers [T] of their own; the longest must fit behind all."""
    answers = [[check_prompt("answer", one, pair.target.vocab_size) for one in own] for own in answers]
    longest = max((len(one) for own in answers for one in own), default=1)
    request, width = check_request(pair, prompts, Call(longest, names=names), unread=1), min(chunk, longest)
    layer_ids = tuple(dict.fromkeys(layer for readout in readouts for layer in readout.layers(pair)))
    states = [readout.begin(pair, request, width) for readout in readouts]
    session = Session(pair.target, request, width=width, layer_ids=layer_ids)

    def extend(features: Tensor | None, positions: Tensor) -> None:
        for state in states:
            state.extend(split_taps(features, layer_ids), positions)

    session.prefill(extend, hold_last=True)  # the prompts' last tokens come first in every answer's first chunk
    for state in states:
        state.ready()
    starts = torch.tensor(request.lengths)[:, None] - 1  # [B, 1]
    lasts, longest_prompt = request.ids.gather(1, starts), max(request.lengths)
    starts = starts.to(pair.target.device)
    for number in range(max(map(len, answers))):  # caches are written by position: the next answers overwrite these
        rows = [own[number] if number < len(own) else own[0][:0] for own in answers]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # [B, T]
        text = torch.cat([lasts, padded], dim=1).to(starts.device)  # [B, 1 + T]
        ends = torch.tensor([[len(row)] for row in rows], device=starts.device)  # [B, 1]
        for first in range(0, padded.shape[1], width):
            chosen = text[:, first + 1 : first + 1 + width]  # [B, Q]
            tokens = text[:, first : first + chosen.shape[1]]  # [B, Q]
            positions = starts + torch.arange(first, first + chosen.shape[1], device=starts.device)  # [B, Q]
            high = longest_prompt - 1 + first + chosen.shape[1]
            logits, features = session.step(tokens, positions, max_length=high)
            extend(features, positions)
            out = TargetOutput(tokens, positions, logits, split_taps(features, layer_ids), high - 1)
            readings = [state.logits(out) for state in states]
            said = torch.arange(first, first + chosen.shape[1], device=starts.device) < ends  # [B, Q]
            highest = [peaks(one).flatten(2).sum(2) if one.dim() > 3 else peaks(one) for one in (logits, *readings)]
            highest = [torch.where(said, one, 0.0) for one in highest]  # [B, Q] each; padding may be anything
            if not (sums := torch.stack(highest).sum((0, 2))).isfinite().all():
                row = sums.isfinite().tolist().index(False)
                whose = ["target", *(f"readout {type(readout).__name__}" for readout in readouts)]
                found = [(what, one[row]) for what, one in zip(whose, highest, strict=True)]
                raise not_finite(request.names[row], found, request.lengths[row] + first, pair.target.dtype)
            yield ReplayedRows(number, first, chosen, logits, readings)
