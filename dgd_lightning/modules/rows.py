"""Prediction rows: the input row with an answer, and in ``dgd`` everything that is known of how it was decoded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dgd_lightning.decode.rerank import best_of
from dgd_lightning.modules.adaptation import Adapted
from dgd_lightning.modules.arms import Arm
from dgd_lightning.pair import Pair
from dgd_lightning.types import DecodeOutput, RankedAnswer, Task


def prediction_row(
    task: Task,
    arm: Arm,
    output: DecodeOutput | None,
    prompt: Tensor,
    *,
    pair: Pair,
    limit: int,
    adapted: Adapted | None,
    prefix_tokens: int,
    prefix_seconds: float,
    joined_with: Sequence[str],
    without_context: Tensor | None,
    control_of: str | None,
) -> dict[str, Any]:
    """The row of a task and an arm.

    Args:
        task: whose input row is carried on.
        arm: that decoded it.
        output: what came; None where the prompt was too long.
        prompt: [S], before truncation.
        pair: has a tokenizer.
        limit: longest prompt; a longer one was cut on the left.
        adapted: the context's adaptation, where the arm uses it.
        prefix_tokens: of the prompt, which were read with the context and copied.
        prefix_seconds: spent on reading them, where this batch had to wait for it.
        joined_with: names of the other arms in the batch.
        without_context: [S'] what the arm's readout read instead.
        control_of: the arm whose null control this one is.
    """
    settings = {name: value for name, value in arm.settings().items() if name != "name"}
    head = {
        "arm": arm.name,
        **settings,
        "control_of": control_of,
        "block_size": _block_size(arm, pair),
        "prompt_tokens": len(prompt),
        "ttt": adapted and adapted.record,
        **(adapted.cost if adapted else {}),
    }
    if output is None:
        reason = f"prompt of {len(prompt)} tokens, at most {limit} fit"
        return {**task.row, "idx": task.idx, "model_output": None, "dgd": {**head, "skipped": reason}}
    trace, lengths = output.trace, output.acceptance_lengths
    own_time = not joined_with and trace.answers is None
    result = {
        "prefix_tokens": prefix_tokens,
        "truncated_tokens": max(0, len(prompt) - limit),
        "tokens": len(output.tokens),
        "stop_reason": output.stop_reason,
        "tau": sum(lengths) / len(lengths) if lengths else None,
        "acceptance_lengths": lengths,
        "verified_lengths": trace.verified_lengths,
        "target_forwards": trace.target_forwards,
        "draft_forwards": trace.draft_forwards,
        "seed": trace.seed,
        "prompt_ids": prompt[-limit:].tolist(),  # what the target read
        "output_ids": output.tokens.tolist(),
        # Wall times are those of the whole batch, whose rows share forwards: of a group of tasks, and where arms are
        # joined of all their rows, where answers are reranked of all answers. Only else is its speed the arm's own.
        "batch_tokens": trace.batch_tokens,
        "prefix_seconds": prefix_seconds,
        "prefill_seconds": trace.prefill_seconds,  # of what stands behind the prefix
        "decode_seconds": trace.decode_seconds,
        "seconds": prefix_seconds + trace.prefill_seconds + trace.decode_seconds + trace.rank_seconds,
        "tokens_per_second": trace.batch_tokens / trace.decode_seconds
        if own_time and trace.decode_seconds > 0
        else None,
    }
    if joined_with:
        result["joined_with"] = list(joined_with)
    if trace.answers is not None:
        result["rank_seconds"] = trace.rank_seconds
        result["chosen"] = best_of(trace.answers)
        result["answers"] = [_answer(pair, one) for one in trace.answers]
    if without_context is not None:
        result["without_context_ids"] = without_context.tolist()
    text = _text(pair, output.tokens)
    return {**task.row, "idx": task.idx, "model_output": text, "dgd": {**head, **result}}


def _answer(pair: Pair, one: RankedAnswer) -> dict[str, Any]:
    """A answer for JSON, which knows no infinity: a blend's constraints can make an answer impossible."""
    return {
        "text": _text(pair, one.tokens),
        "tokens": len(one.tokens),
        "score": one.score if math.isfinite(one.score) else None,
        "beta": one.beta,
        "seed": one.seed,
        "stop_reason": one.stop_reason,
    }


def _text(pair: Pair, tokens: Tensor) -> str:
    return pair.tokenizer.decode(tokens, skip_special_tokens=True)  # type: ignore[union-attr]


def _block_size(arm: Arm, pair: Pair) -> int | None:
    return arm.block_size or pair.draft.config.block_size if arm.drafts and pair.draft else None
