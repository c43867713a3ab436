"""The few records that travel from room to room, so that each room can be tested alone on CPU.

Letters: B batch rows, S context length, Q query tokens of one forward, H target hidden size, F tapped layers,
K block size, N anchors, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:  # scoring reads these records too, and need not wait for torch
    from torch import Tensor

StopReason = Literal["stop", "length"]


class TargetStep(NamedTuple):
    """What one target forward gives."""

    logits: Tensor  # [B, Q, V]
    features: Tensor | None  # [B, Q, F·H], tapped layers concatenated in the order of their ids


class Prefill(NamedTuple):
    """What reading the prompts gives; row b's next token has position ``lengths[b]``."""

    logits: Tensor  # [B, V], at each row's last prompt token
    features: Tensor | None  # [B, S, F·H] (kept only on request), rows padded on the right
    lengths: Tensor  # [B], prompt lengths


class RankedAnswer(NamedTuple):
    """One of the answers among which the best was chosen."""

    tokens: Tensor  # [T] LongTensor on CPU
    score: float | None  # by which it was ranked, such as a log-likelihood: the higher the better; None: by nothing
    beta: float | None  # with which it was decoded; None: drawn from the target
    seed: int | None  # None for greedy decoding
    stop_reason: StopReason


class DecodeTrace(NamedTuple):
    """How a row was decoded. Seconds are those of the whole batch the row was in (rows share forwards)."""

    verified_lengths: list[int]  # tokens agreed per verification + 1, not cut at a stop token or the limit
    target_forwards: int  # verifications (or single steps) this row took part in, prefill excluded
    draft_forwards: int
    prefill_seconds: float  # wall seconds of the batch's prefill
    decode_seconds: float  # wall seconds of the batch's decode loop
    batch_tokens: int  # tokens committed by the whole batch in those decode seconds, first tokens excluded
    seed: int | None  # the row's own seed; None for greedy decoding
    log_probs: Tensor | None = None  # [T] fp64, of every token at temperature 1 without filters; where asked for
    log_normalisers: Tensor | None = None  # [T] fp64, log Σ_v p(v)^(1/temperature); 0 for greedy decoding
    answers: list[RankedAnswer] | None = None  # all that were decoded, where a method chooses among several
    chosen: int | None = None  # number of the chosen one
    rank_seconds: float = 0.0  # wall seconds of choosing it
    # Forwards of target and draft for all that was decoded and ranked for this answer, counted per row; None: as above.
    spent: tuple[int, int] | None = None
    states: list[Tensor] | None = None  # of a chain: the answers [T] that it was at, one after the other
    details: dict[str, Any] | None = None  # what else a method knows of an answer; JSON-able


class DecodeOutput(NamedTuple):
    """One row's result."""

    tokens: Tensor  # [T] LongTensor on CPU, new tokens only, stop token included
    acceptance_lengths: list[int]  # tokens each verification committed, bonus included; sums to T − 1 (the prefill's
    # first token belongs to none); tokens past a stop token or the limit are not counted. Of a method that draws more
    # than it returns it is that of all it drew.
    stop_reason: StopReason
    trace: DecodeTrace


class HeldOutScore(NamedTuple):
    """How well a draft does on what is held out: validation texts (see `ttt.validation_texts`) or the context's end."""

    step: int  # optimiser steps made before
    loss: float
    tau: float  # micro: tokens per verification, bonus included; along the context a lower bound, see `ttt.objective`
    tau_by_text: list[float]  # of every validation text; empty where the context's end is held out
    acceptance: list[float]  # [K − 1], slots 1 … j all accepted: share of the blocks that have a slot j


class AdaptTrace(NamedTuple):
    """What test-time training on one context did."""

    losses: list[float]  # of every step
    scores: list[HeldOutScore]  # before, during and after; empty where nothing is held out
    best_step: int  # whose weights the adapter has; 0: none
    kept: bool  # False: nothing was gained, and the draft stays as it is
    stopped: str  # "done", "early" (no better score for a while), or what went wrong
    context_tokens: int
    parameters: int  # trained numbers
    held_out_by: Literal["validation_texts", "span", "nothing"]  # what the scores are of
    validation_texts: int  # texts held out; fewer than asked for where the target repeats itself
    validation_answers: int  # of these, questions with their answers; the others are continuations
    validation_asked: int  # of these, questions that the target was asked for; the others are of a user's turn gone on
    train_texts: int  # texts trained on
    prefill_seconds: float
    validation_seconds: float
    fit_seconds: float
    peak_memory: int | None  # bytes on a CUDA device; None elsewhere
    attention: str  # how blocks read the context: what ``ttt.attention: auto`` stood for
    prefix_kept: bool  # decoding goes on from what was read for the fit; False: it was let go, and is read again


class Task(NamedTuple):
    """One question. ``row`` is the input row as read, so that predictions can carry it on unchanged."""

    idx: str  # unique in a run (CL-bench's task_id)
    messages: list[dict[str, Any]] | None  # chat messages (role, content as text, …), or None for a raw prompt
    prompt: str | None  # raw text prompt, or None for chat messages
    row: dict[str, Any]


class Score(NamedTuple):
    """A graded answer."""

    value: float | None  # 1.0 solved, 0.0 not; None where grading failed, never a silent 0
    status: list[str]  # per rubric "yes" or "no"; empty where a benchmark has no rubrics, or grading failed
    rationale: str  # for people: why; for value None: the reason ("judge_error: …")
    details: dict[str, Any] | None = None  # JSON-able: tokens, attempts, seconds, what was compared


@dataclass
class Summary:
    """The table, the sentences and the pointers that a run prints, and the details that it keeps in `summary.txt`.

    A module holds one as ``summary``; callbacks add to it before the last ``on_predict_end``, which prints it.
    """

    cells: dict[str, dict[str, str]] = field(default_factory=dict)  # [arm][column]: the one table that is printed
    sentences: list[str] = field(default_factory=list)  # the result in plain words, printed
    pointers: list[str] = field(default_factory=list)  # where something is, or what is left to do, a line each, printed
    details: list[Any] = field(default_factory=list)  # tables (rich) and lines, printed with --verbose only

    def add_cell(self, arm: str, column: str, text: str) -> None:
        """Sets a cell; columns appear in the order in which they are first set."""
        self.cells.setdefault(arm, {})[column] = text
