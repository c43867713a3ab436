"""Prediction rows: the input row with an answer, and in ``dgd`` what is known of how it was decoded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dgd_lightning.checks import check_integer, check_number
from dgd_lightning.decode.blending import Blend
from dgd_lightning.decode.readouts.draft import DraftReadout, as_readout
from dgd_lightning.decode.replay import Replayed, replay
from dgd_lightning.decode.stop_strings import answer_text
from dgd_lightning.errors import InputError
from dgd_lightning.methods.base import Guidance
from dgd_lightning.metrics.divergence import TokenDivergence, token_divergence
from dgd_lightning.modules.adaptation import Adapted, finite
from dgd_lightning.modules.arms import Arm
from dgd_lightning.pair import Pair
from dgd_lightning.types import DecodeOutput, Task

DECIMALS = 5  # of divergences


def prediction_row(
    arm: Arm,
    task: Task,
    prompt: Tensor,  # [S], before truncation
    output: DecodeOutput | None,  # None where the prompt was too long
    *,
    pair: Pair,  # has a tokenizer
    limit: int,  # longest prompt; a longer one was cut on the left
    stop_strings: Sequence[str] | None = None,  # answers end before them
    prefix_tokens: int = 0,  # of the prompt, which were read with the context and copied
    prefix_seconds: float = 0.0,  # spent on reading them, where this batch had to wait for it
    without_context: Tensor | None = None,  # [S'] what the arm's readout read instead
    adapted: Adapted | None = None,  # the context's adaptation, where the arm uses it
    joined_with: Sequence[str] = (),  # names of the other arms in the batch
    control_of: str | None = None,  # the arm whose null control this one is
    tasks_together: int | None = None,  # tasks of the group decoded together, where memory did not hold all of them
) -> dict[str, Any]:
    """The row of a task and an arm."""
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
    spent = trace.spent or (trace.target_forwards, trace.draft_forwards)
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
        # of all that was decoded and ranked for the answer, counted per row
        "spent_forwards": dict(zip(("target", "draft"), spent, strict=True)),
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
        return answer_text(pair.tokenizer, tokens.tolist(), stop_strings)

    if trace.states is not None:
        result["states"] = [text(state) for state in trace.states]
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


@dataclass
class DivergenceSettings:
    """Record, for every token of every answer, how target and readout differ and what guidance changed.

    Each answer is read once more for it (its prompt too), after it was decoded.

    Args:
        top: so many of the likeliest tokens are kept where it says most, see ``large``; 0 keeps none.
        large: they are kept where guidance changed the top-1 token, and where JS(target, readout) is at least so many
            nats (0 … ln 2); elsewhere they are left out, so that rows stay small.
        guided_only: record it for arms that blend alone; otherwise other arms record what the draft would have said.
    """

    top: int = 5
    large: float = 0.2
    guided_only: bool = False

    def __post_init__(self) -> None:
        check_integer("divergence.top", self.top, least=0, hint="use 5")
        check_number("divergence.large", self.large, least=0, hint="use e.g. 0.2, in nats")


def divergence_record(
    pair: Pair,
    guidance: Guidance | None,
    prompt: Tensor,  # [S] as the target read it
    answer: Tensor,  # [T] tokens
    settings: DivergenceSettings,
    name: str = "prompt",  # in errors
) -> dict[str, Any] | None:
    """A row's ``dgd.divergence``: a list per number of `TokenDivergence`, the tokens' texts, and ``top``.

    An answer drawn from the target itself, with no guidance, is compared with the draft at β = 0: what the draft would
    have said; None where there is no draft either. The draft is read as it is: an arm with an adapter needs it in
    place. Numbers are rounded to 5 decimals; infinite ones are null.
    """
    if guidance is None and pair.draft is None:
        return None
    blend, readout = guidance or Guidance(Blend(0.0), DraftReadout())
    betas = blend.betas(1)
    numbers: dict[str, list[Any]] = {name: [] for name in TokenDivergence._fields}
    top: list[dict[str, Any]] = []
    for part in replay(pair, prompt, [answer], [as_readout(readout)], name=name):
        guided = blend.mix_along(part.target, part.readouts[0], part.first)  # [Q, V]
        values = token_divergence(part.target, part.readouts[0], guided, part.tokens)
        for name, column in values._asdict().items():
            numbers[name] += _plain(column)
        if settings.top:
            top += _top(pair.tokenizer, part, guided if betas != [0.0] else None, values, settings)
    return {"beta": betas[0], "tokens": token_texts(pair.tokenizer, answer.tolist()), **numbers, "top": top}


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text that each token adds, special tokens included; together they are the text of all.

    A token that ends inside a character adds nothing, and the one that completes it adds the character.
    """

    def text(some: list[int]) -> str:
        return tokenizer.decode(some, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    texts: list[str] = []
    start = done = 0  # what is before `start` no longer matters; what is before `done` has its text
    for end in range(1, len(ids) + 1):
        whole = text(ids[start:end])
        if whole.endswith("\ufffd") and end < len(ids):
            texts.append("")
            continue
        texts.append(whole[len(text(ids[start:done])) :])
        start, done = done, end
    return texts


def _plain(column: Tensor) -> list[Any]:
    """Numbers for JSON, which knows no infinity; yes and no as 1 and 0."""
    if not column.is_floating_point():
        return column.long().tolist()
    return [finite(round(number, DECIMALS)) for number in column.tolist()]


def _top(
    tokenizer: Any, part: Replayed, guided: Tensor | None, values: TokenDivergence, settings: DivergenceSettings
) -> list[dict[str, Any]]:
    """The likeliest tokens of each distribution, where guidance changed something or target and readout differ much."""
    distributions = {"target": part.target, "readout": part.readouts[0]}
    distributions |= {} if guided is None else {"guided": guided}
    entries: list[dict[str, Any]] = []
    for at in (values.argmax_changed | (values.js >= settings.large)).nonzero()[:, 0].tolist():
        entry: dict[str, Any] = {"at": part.first + at}
        for name, logits in distributions.items():
            kind = torch.promote_types(logits.dtype, torch.float32)
            best = logits[at].to(kind).softmax(-1).topk(min(settings.top, logits.shape[-1]))
            words = [tokenizer.decode([token], skip_special_tokens=False) for token in best.indices.tolist()]
            entry[name] = [[w, p] for w, p in zip(words, _plain(best.values), strict=True)]
        entries.append(entry)
    return entries
