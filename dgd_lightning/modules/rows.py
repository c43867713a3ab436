"""Prediction rows: the input row with an answer, and in ``dgd`` everything that is known of how it was decoded."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dgd_lightning.errors import InputError
from dgd_lightning.modules.adaptation import Adapted, finite
from dgd_lightning.modules.arms import Arm
from dgd_lightning.pair import Pair
from dgd_lightning.types import DecodeOutput, Task


def prediction_row(
    arm: Arm,
    task: Task,
    prompt: Tensor,
    output: DecodeOutput | None,
    *,
    pair: Pair,
    limit: int,
    prefix_tokens: int = 0,
    prefix_seconds: float = 0.0,
    without_context: Tensor | None = None,
    adapted: Adapted | None = None,
    joined_with: Sequence[str] = (),
    control_of: str | None = None,
    tasks_together: int | None = None,
) -> dict[str, Any]:
    """The row of a task and an arm.

    Args:
        prompt: [S], before truncation.
        output: None where the prompt was too long.
        pair: has a tokenizer.
        limit: longest prompt; a longer one was cut on the left.
        prefix_tokens: of the prompt, which were read with the context and copied.
        prefix_seconds: spent on reading them, where this batch had to wait for it.
        without_context: [S'] what the arm's readout read instead.
        adapted: the context's adaptation, where the arm uses it.
        joined_with: names of the other arms in the batch.
        control_of: the arm whose null control this one is.
        tasks_together: how many tasks of the group were decoded together, where memory did not hold all of them.
    """
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
        "prefix_tokens": prefix_tokens,
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
        "prefix_seconds": prefix_seconds,
        "prefill_seconds": trace.prefill_seconds,  # of what is behind the prefix
        "decode_seconds": trace.decode_seconds,
        "seconds": prefix_seconds + trace.prefill_seconds + trace.decode_seconds + trace.rank_seconds,
        "tokens_per_second": trace.batch_tokens / trace.decode_seconds if own_time else None,
    }
    own = arm.method.record(output)
    try:
        own = {str(name): _json(value) for name, value in own.items()}
    except (AttributeError, TypeError) as error:
        raise InputError(
            f"model.arms[{arm.name}].method",
            expected="a record() that gives a dictionary of numbers, texts, lists, tensors and dictionaries",
            received=repr(own)[:80],
            hint="return {} where there is nothing to say",
        ) from error

    def text(tokens: Tensor) -> str:
        return pair.tokenizer.decode(tokens, skip_special_tokens=True)  # type: ignore[union-attr]

    if joined_with:
        result["joined_with"] = list(joined_with)
    if answers is not None:
        result["rank_seconds"] = trace.rank_seconds
        result["chosen"] = trace.chosen
        result["answers"] = [
            {
                "text": text(one.tokens),
                "tokens": len(one.tokens),
                **({} if one.score is None else {"score": finite(one.score)}),  # constraints can rule an answer out
                "beta": one.beta,
                "seed": one.seed,
                "stop_reason": one.stop_reason,
            }
            for one in answers
        ]
    if without_context is not None:
        result["without_context_ids"] = without_context.tolist()
    return {**task.row, "idx": task.idx, "model_output": text(output.tokens), "dgd": {**own, **head, **result}}


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
        return finite(value)
    raise TypeError(type(value).__name__)
