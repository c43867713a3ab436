"""Prediction rows: the input row with an answer, and in ``dgd`` everything that is known of how it was decoded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from dgd_lightning.errors import InputError
from dgd_lightning.modules.adaptation import Adapted
from dgd_lightning.modules.arms import Arm
from dgd_lightning.pair import Pair
from dgd_lightning.types import DecodeOutput, RankedAnswer, Task


class Decoded(NamedTuple):
    """A task as an arm decoded it."""

    task: Task
    prompt: Tensor  # [S], before truncation
    output: DecodeOutput | None  # None where the prompt was too long
    prefix_tokens: int = 0  # of the prompt, which were read with the context and copied
    prefix_seconds: float = 0.0  # spent on reading them, where this batch had to wait for it
    without_context: Tensor | None = None  # [S'] what the arm's readout read instead


def prediction_row(
    arm: Arm,
    decoded: Decoded,
    *,
    pair: Pair,
    limit: int,
    adapted: Adapted | None,
    joined_with: Sequence[str],
    control_of: str | None,
    tasks_together: int | None,
) -> dict[str, Any]:
    """The row of a task and an arm.

    Args:
        pair: has a tokenizer.
        limit: longest prompt; a longer one was cut on the left.
        adapted: the context's adaptation, where the arm uses it.
        joined_with: names of the other arms in the batch.
        control_of: the arm whose null control this one is.
        tasks_together: how many tasks of the group were decoded together, where memory did not hold all of them.

    Raises:
        InputError: a method commits more tokens at a time than its ``block`` says.
    """
    task, prompt, output = decoded.task, decoded.prompt, decoded.output
    block = arm.method.block(pair)
    head = {
        "arm": arm.name,
        **arm.settings(),
        "control_of": control_of,
        "block_size": block,
        "prompt_tokens": len(prompt),
        "ttt": adapted and adapted.record,
        **(adapted.cost if adapted else {}),
        **({} if tasks_together is None else {"tasks_together": tasks_together}),
    }
    if output is None:
        reason = f"prompt of {len(prompt)} tokens, at most {limit} fit"
        return {**task.row, "idx": task.idx, "model_output": None, "dgd": {**head, "skipped": reason}}
    trace, lengths, answers = output.trace, output.acceptance_lengths, output.trace.answers
    if (most := max(trace.verified_lengths, default=1)) > (block or 1):
        raise InputError(
            f"model.arms[{arm.name}].method",
            expected=f"verifications of at most {block or 1} tokens, as its block() says",
            received=f"one of {most}",
            hint=f"let {arm.method.name}.block(pair) return the K that it drafts with",
        )
    own_time = not joined_with and answers is None and trace.decode_seconds > 0
    result = {
        "prefix_tokens": decoded.prefix_tokens,
        "truncated_tokens": max(0, len(prompt) - limit),
        "tokens": len(output.tokens),
        # committed for this row after the prefill's first token, by all of its answers
        "decoded_tokens": sum(lengths) if answers is None else sum(len(one.tokens) - 1 for one in answers),
        "stop_reason": output.stop_reason,
        "tau": sum(lengths) / len(lengths) if lengths else None,
        "acceptance_lengths": lengths,
        "verified_lengths": trace.verified_lengths,
        "target_forwards": trace.target_forwards,
        "draft_forwards": trace.draft_forwards,
        "seed": trace.seed,
        "prompt_ids": prompt[-limit:].tolist(),  # what the target read
        "output_ids": output.tokens.tolist(),
        # Wall times are those of the whole batch, whose rows share forwards: of a group of tasks, of all arms that are
        # joined, of all answers among which one is chosen. Only where none of that is so is the speed the arm's own.
        "batch_tokens": trace.batch_tokens,
        "prefix_seconds": decoded.prefix_seconds,
        "prefill_seconds": trace.prefill_seconds,  # of what is behind the prefix
        "decode_seconds": trace.decode_seconds,
        "seconds": decoded.prefix_seconds + trace.prefill_seconds + trace.decode_seconds + trace.rank_seconds,
        "tokens_per_second": trace.batch_tokens / trace.decode_seconds if own_time else None,
    }
    own = _plain_record(arm, output)
    if joined_with:
        result["joined_with"] = list(joined_with)
    if answers is not None:
        result["rank_seconds"] = trace.rank_seconds
        result["chosen"] = trace.chosen
        result["answers"] = [_answer(pair, one) for one in answers]
    if decoded.without_context is not None:
        result["without_context_ids"] = decoded.without_context.tolist()
    return {**task.row, "idx": task.idx, "model_output": _text(pair, output.tokens), "dgd": {**own, **head, **result}}


def _plain_record(arm: Arm, output: DecodeOutput) -> dict[str, Any]:
    """What the method says of an answer, for JSON."""
    own = arm.method.record(output)
    try:
        return {str(name): _json(value) for name, value in own.items()}
    except (AttributeError, TypeError) as error:
        raise InputError(
            f"model.arms[{arm.name}].method",
            expected="a record() that gives a dictionary of numbers, texts, lists, tensors and dictionaries",
            received=repr(own)[:80],
            hint="return {} where there is nothing to say",
        ) from error


def _json(value: Any) -> Any:
    """Infinity and NaN, which JSON does not know, become null."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(name): _json(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_json(one) for one in value]
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    raise TypeError(type(value).__name__)


def _answer(pair: Pair, one: RankedAnswer) -> dict[str, Any]:
    """An answer for JSON, which knows no infinity: a blend's constraints can make an answer impossible."""
    score = {} if one.score is None else {"score": one.score if math.isfinite(one.score) else None}
    return {
        "text": _text(pair, one.tokens),
        "tokens": len(one.tokens),
        **score,
        "beta": one.beta,
        "seed": one.seed,
        "stop_reason": one.stop_reason,
    }


def _text(pair: Pair, tokens: Tensor) -> str:
    return pair.tokenizer.decode(tokens, skip_special_tokens=True)  # type: ignore[union-attr]
