"""Rehearsals: what the target writes itself behind a context; adaptations are judged, and if asked trained, by it.

A context's own text does not tell what an adapted draft does to answers: learning prose lowers the loss on prose. What
does tell is text of the kind that will be decoded. An instruct model that is given a chat up to the user's turn writes
the question it would expect there (Xu et al. 2024, arXiv 2406.08464, made training data so), and its own greedy answer
is what decoding will produce. No task, question or gold answer is read for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgd_lightning.decode.autoregressive import autoregressive_generate
from dgd_lightning.decode.engine import Prefix
from dgd_lightning.decode.speculative import speculative_generate
from dgd_lightning.errors import InputError
from dgd_lightning.pair import Pair
from dgd_lightning.seeds import mixed_seed
from dgd_lightning.target.cache import PositionCache
from dgd_lightning.ttt.config import TTTConfig
from dgd_lightning.ttt.context import Rehearsal

TRIES = 4  # draws per rehearsal wanted: a model that always asks the same gives fewer
MARK = "dgd-mark"  # stands for a user's words where the template is asked what follows them

Share = Callable[[Any], Any]  # what rank 0 has, for every rank


class Written(NamedTuple):
    """Tokens of a rehearsal."""

    ids: list[int]  # context included
    first_anchor: int


class Rehearsals(NamedTuple):
    """All texts of a context; no question stands in both lists."""

    held_out: list[Rehearsal]
    trained: list[Rehearsal]


def turn_end(tokenizer: Any | None) -> list[int]:
    """What the chat template writes between a user's words and the answer; empty where there is no template.

    Args:
        tokenizer: a transformers tokenizer, or None.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return []
    text = tokenizer.apply_chat_template(  # type: ignore[union-attr]
        [{"role": "user", "content": MARK}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    return list(tokenizer.encode(text[text.rindex(MARK) + len(MARK) :], add_special_tokens=False))  # type: ignore[union-attr]


def room(pair: Pair, config: TTTConfig) -> int:
    """Positions behind the context that rehearsals need."""
    if not config.rehearsals + config.train_rehearsals:
        return 0
    assert pair.draft is not None
    return 2 * config.rehearsal_tokens + len(turn_end(pair.tokenizer)) + pair.draft.config.block_size


@torch.no_grad()
def rehearse(
    pair: Pair,
    context: Tensor,
    features: Tensor,
    cache: PositionCache,
    config: TTTConfig,
    avoid: Sequence[Tensor] = (),
    share: Share = lambda x: x,
) -> Rehearsals:
    """Let the target write rehearsals behind a context that it has read, one after the other in the same cache.

    Args:
        context: [S].
        features: [1, ≥ S, F·H], of the context.
        cache: holds the context at positions 0 … S − 1 and has :func:`room` behind it.
        config: how many and how long.
        avoid: prompts that no trained rehearsal may be: those of tasks whose answers are to be measured.
        share: gives every rank the texts of rank 0.

    Raises:
        InputError: the target has too few positions for them, or it has nothing to say.
    """
    draft, target = pair.draft, pair.target
    assert draft is not None
    length = len(context)
    if length + room(pair, config) > target.max_positions:
        raise InputError(
            "ttt.rehearsals",
            expected=f"a context with {room(pair, config)} of the target's {target.max_positions} positions left",
            received=f"{length} tokens",
            mend="lower ttt.rehearsal_tokens, or set ttt.rehearsals and ttt.train_rehearsals to 0",
        )
    known = length - 1  # decoding reads a prompt's last token itself
    draft_cache = draft.new_cache(1, length + room(pair, config))
    positions = torch.arange(known, device=features.device)[None]
    draft.extend(draft_cache, features[:, :known].to(draft.dtype), positions)
    prefix = Prefix(context[:known], cache, draft_cache)
    written = share(_choose(_write(pair, context, prefix, config), config, avoid, length))
    texts = [_read(pair, text, known, cache) for text in written[0] + written[1]]
    held_out = len(written[0])
    return Rehearsals(texts[:held_out], texts[held_out:])


class _Draft(NamedTuple):
    question: tuple[int, ...]
    answer: tuple[int, ...]  # empty where no turn was closed: the question is a continuation then
    text: Written


def _write(pair: Pair, context: Tensor, prefix: Prefix, config: TTTConfig) -> Iterator[_Draft]:
    """Rehearsals without end, each from a seed of its own."""
    end, limit = turn_end(pair.tokenizer), config.rehearsal_tokens
    spoken = bool(end) and context[-len(end) :].tolist() == end  # the answer is to come: there is nothing to ask
    stops = None if spoken or not end else end[:1]
    number = 0
    while True:
        seed, number = mixed_seed(config.seed, -1, number), number + 1
        output = autoregressive_generate(
            pair, [context], max_new_tokens=limit, temperature=1.0, seed=seed, stop_token_ids=stops, prefix=prefix
        )[0]
        question = output.tokens
        if stops is None or output.stop_reason != "stop":
            ids = [*context.tolist(), *question.tolist()]
            yield _Draft(tuple(question.tolist()), (), Written(ids, len(context)))
            continue
        prompt = torch.cat([context, question[:-1], torch.tensor(end)])
        answer = speculative_generate(pair, [prompt], max_new_tokens=limit, prefix=prefix)[0].tokens
        ids = [*prompt.tolist(), *answer.tolist()]
        yield _Draft(tuple(question.tolist()), tuple(answer.tolist()), Written(ids, len(prompt)))


def _choose(
    drafts: Iterator[_Draft], config: TTTConfig, avoid: Sequence[Tensor], length: int
) -> tuple[list[Written], list[Written]]:
    """The held-out texts, then those trained on: other questions, other answers, and none of ``avoid``."""
    wanted, forbidden = (config.rehearsals, config.train_rehearsals), {tuple(prompt.tolist()) for prompt in avoid}
    chosen: tuple[list[Written], list[Written]] = ([], [])
    questions: set[tuple[int, ...]] = set()
    answers: set[tuple[int, ...]] = set()
    for trained, count in enumerate(wanted):
        for _, draft in zip(range(TRIES * count), drafts, strict=False):
            ids, first = draft.text
            known = draft.question in questions or (trained and draft.answer and draft.answer in answers)
            if known or len(ids) < first + 2 or (trained and tuple(ids[:first]) in forbidden):
                continue
            questions.add(draft.question)
            if not trained:
                answers.add(draft.answer)
            chosen[trained].append(draft.text)
            if len(chosen[trained]) == count:
                break
    if config.rehearsals and not chosen[0]:
        raise InputError(
            "ttt.rehearsals",
            expected="a target that goes on writing behind the context",
            received=f"nothing of two tokens in {TRIES * config.rehearsals} draws",
            mend="set ttt.rehearsals to 0: the context's end is held out then",
        )
    return chosen


def _read(pair: Pair, text: Written, known: int, cache: PositionCache) -> Rehearsal:
    """Features and last hidden states behind the context, in one forward."""
    target, draft = pair.target, pair.draft
    assert draft is not None
    ids = torch.tensor(text.ids, device=target.device)[None]  # [1, L]
    taps = target.prefill(
        ids[:, known:],
        [ids.shape[1] - known],
        cache,
        start=known,
        layer_ids=(*draft.config.target_layer_ids, target.num_layers - 1),
        keep_features=True,
    ).features
    assert taps is not None
    width = draft.config.num_features
    return Rehearsal(ids, known, text.first_anchor, taps[..., :width], taps[..., width:])
