"""Validation texts: what the target writes itself behind a context; adaptations are judged by it, or trained on it.

A context's own text does not show what an adapted draft does to answers: learning prose lowers the loss on prose. Text
of the kind that will be decoded does. An instruct model that is given a chat up to the user's turn writes
the question it would expect there (Xu et al. 2024, arXiv 2406.08464, made training data so), and its own greedy answer
is what decoding will produce. Where no turn is closed (no chat template, raw text), a validation text is a
continuation: a few tokens drawn at random, the rest greedy. No gold answer is read for it, and no task's question
becomes one.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgd_lightning.decode.prefix_cache import PrefixCache
from dgd_lightning.decode.random_source import row_seeds
from dgd_lightning.errors import ContextError
from dgd_lightning.methods.autoregressive import autoregressive_generate
from dgd_lightning.methods.speculative import speculative_generate
from dgd_lightning.pair import Pair
from dgd_lightning.seeds import mixed_seed
from dgd_lightning.target.cache import PositionCache
from dgd_lightning.ttt.config import TTTConfig
from dgd_lightning.ttt.context import ReadText

TRIES = 4  # draws per validation text wanted: a model that always asks the same gives fewer
LEAD = 8  # tokens of a continuation that are drawn, so that no two are alike
FEWEST_TOKENS = 3  # of an answer: a shorter one is one verification, whatever the draft
COPIES = 2**30  # bytes of the context's keys and values that are copied, so that validation texts are written together
MARK = "dgd-mark"  # in place of a user's words, where the template is asked what follows them


class Written(NamedTuple):
    """Tokens of a validation text."""

    ids: list[int]  # context included
    first_anchor: int  # where the greedy part begins
    answers: bool  # a question and its answer; False: a continuation


class Chosen(NamedTuple):
    """The texts of a context."""

    held_out: list[Written]
    trained: list[Written]


Share = Callable[[Callable[[], Chosen]], Chosen]  # gives every rank what the function gives on rank 0


class ValidationTexts(NamedTuple):
    """All texts of a context as the target read them; no question is in both lists."""

    held_out: list[ReadText]
    trained: list[ReadText]
    answers: int = 0  # of the held-out ones, those that are a question and its answer


def turn_end(pair: Pair, *, enable_thinking: bool = False) -> list[int]:
    """What the pair's chat template writes between a user's words and the answer; empty where no turns are closed.

    A template counts where the first token behind a user's words is a special one, which no user's words contain.
    """
    tokenizer: Any = pair.tokenizer
    if getattr(tokenizer, "chat_template", None) is None:
        return []
    chat = [{"role": "user", "content": MARK}]
    try:
        text = tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True, enable_thinking=enable_thinking
        )
    except Exception:  # templates raise what they like, e.g. at a chat without a system message
        return []
    _, found, behind = text.rpartition(MARK)
    end = list(tokenizer.encode(behind, add_special_tokens=False)) if found else []
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values(), *pair.target.stop_token_ids}
    return end if end and end[0] in special else []


class Plan(NamedTuple):
    """How validation texts are written behind a context of S tokens."""

    turn_end: list[int]  # empty: they are continuations
    tokens: int  # limit of each question and of each answer
    capacity: int  # positions that the target's cache needs


def plan(pair: Pair, length: int, config: TTTConfig, *, enable_thinking: bool = False) -> Plan | None:
    """How texts are written behind a context of S = ``length`` tokens; None where there is nothing to write."""
    if config.steps == 0 or config.validation_texts + config.train_texts == 0:
        return None
    end = turn_end(pair, enable_thinking=enable_thinking)
    besides = len(end) + pair.require_draft().config.block_size
    tokens = min(config.validation_tokens, (pair.target.max_positions - length - besides) // 2)
    if tokens < LEAD:
        least = 2 * LEAD + besides
        expected = f"a context that leaves {least} of the target's {pair.target.max_positions} positions"
        hint = "set ttt.validation_texts and ttt.train_texts to 0: the context's end is held out then"
        raise ContextError("ttt.validation_texts", expected=expected, received=f"{length} tokens", hint=hint)
    return Plan(end, tokens, length + 2 * tokens + besides)


@torch.no_grad()
def write_texts(
    pair: Pair,
    context: Tensor,
    features: Tensor,
    cache: PositionCache,
    config: TTTConfig,
    planned: Plan,
    avoid: Sequence[Tensor] = (),
    share: Share = lambda make: make(),
    on_text: Callable[[], None] = lambda: None,
) -> ValidationTexts:
    """Let the target write validation texts behind a context that it has read.

    Several together where copies of the cache are small, else one after the other in the cache itself
    (`ttt.validation_batch`). Every text has a seed of its own, so they are the same, but for near-ties: a batch of
    another shape may round half precision in another way.

    Args:
        context: [S].
        features: [1, ≥ S, F·H], of the context.
        cache: holds the context at positions 0 … S − 1, and has the planned capacity.
        config: how many.
        planned: from :func:`plan`.
        avoid: prompts that no validation text may be: those of tasks whose answers are to be measured.
        share: gives every rank the texts of rank 0.
        on_text: called before questions are drawn, and before they are answered.
    """
    draft = pair.require_draft()
    known = len(context) - 1  # decoding reads a prompt's last token itself
    width = at_once(pair, cache, config, planned)
    if width == 1:
        draft_cache = draft.new_cache(1, planned.capacity)
        positions = torch.arange(known, device=features.device)[None]
        draft.extend(draft_cache, features[:, :known], positions)
        prefix = PrefixCache(context[:known], cache, draft_cache=draft_cache)
    else:
        layer_ids = tuple(draft.config.target_layer_ids)
        prefix = PrefixCache(context[:known], cache, layer_ids, features[:, :known])

    write = partial(_write, pair, context, prefix, planned, on_text)
    written = share(lambda: _choose(write, width, pair.tokenizer, config, avoid, len(context)))
    held_out, trained = ([_read(pair, text, known, cache) for text in texts] for texts in written)
    return ValidationTexts(held_out, trained, sum(text.answers for text in written.held_out))


def at_once(pair: Pair, cache: PositionCache, config: TTTConfig, planned: Plan) -> int:
    """Validation texts that are written together, each in a copy of the context's keys and values in ``cache``.

    As many as the configuration says, or as fit in :data:`COPIES` bytes.
    """
    wanted = config.validation_texts + config.train_texts
    if config.validation_batch is not None:
        return min(config.validation_batch, wanted)
    draft = pair.require_draft()
    shape = draft.config
    own = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * torch.finfo(draft.dtype).bits // 8
    theirs = sum(part[0, :, 0].nbytes for slot in cache.buffers for part in (slot.keys, slot.values))  # of a position
    return max(1, min(wanted, COPIES // (planned.capacity * (own + theirs))))


def _write(
    pair: Pair, context: Tensor, prefix: PrefixCache, planned: Plan, on_text: Callable[[], None], seeds: list[int]
) -> list[Written]:
    """A validation text for each seed, all of them at a time."""
    end, stops = planned.turn_end, pair.target.stop_token_ids
    # Where the context closes the user's turn, the answer is to come: there is nothing to ask.
    asks = bool(end) and context[-len(end) :].tolist() != end
    same_dtype = pair.require_draft().dtype == pair.target.dtype
    generate = speculative_generate if same_dtype else autoregressive_generate
    on_text()
    drawn = autoregressive_generate(
        pair,
        [context] * len(seeds),
        max_new_tokens=planned.tokens if asks else LEAD,
        temperature=1.0,
        seed=seeds,
        stop_token_ids=(*end[:1], *stops) if asks else (),
        prefixes=[prefix] * len(seeds),
        names=["context"] * len(seeds),
    )
    written = [Written(context.tolist(), len(context), answers=False)] * len(seeds)  # those that stopped at once
    asked: dict[bool, dict[int, Tensor]] = {True: {}, False: {}}  # questions that the target ended itself, and others
    for i, one in enumerate(drawn):
        ids, last = one.tokens, int(one.tokens[-1])
        closed = asks and last == end[0]
        words = ids[:-1] if closed or last in stops else ids
        behind = [words, torch.tensor(end)] if closed else [words[:LEAD]]
        if sum(map(len, behind)) > 0:
            asked[closed][i] = torch.cat([context, *behind])
    for closed, prompts in asked.items():
        if not prompts:
            continue
        on_text()
        # A continuation goes on past its stop tokens: a chat model writes the next turns too.
        answers = generate(
            pair,
            list(prompts.values()),
            max_new_tokens=planned.tokens,
            stop_token_ids=None if closed else (),
            prefixes=[prefix] * len(prompts),
            names=["context"] * len(prompts),
        )
        for (i, prompt), answer in zip(prompts.items(), answers, strict=True):
            written[i] = Written([*prompt.tolist(), *answer.tokens.tolist()], len(prompt), closed)
    return written


def _choose(
    write: Callable[[list[int]], list[Written]],
    width: int,
    tokenizer: Any | None,
    config: TTTConfig,
    avoid: Sequence[Tensor],
    length: int,
) -> Chosen:
    """The held-out texts, then those trained on: other questions and other answers; none of ``avoid``.

    ``write`` is asked for at most ``width`` texts at a time, and for no more than are missing; ``length`` is the
    context's.
    """

    def words(ids: Sequence[int]) -> str:  # the same words can be other tokens
        return repr(ids) if tokenizer is None else str(tokenizer.decode(ids)).strip()

    seen = {words(prompt.tolist()[length:]) for prompt in avoid}
    answers: set[str] = set()
    chosen = Chosen([], [])
    number = 0
    for kept, count in zip(chosen, (config.validation_texts, config.train_texts), strict=True):
        last = number + TRIES * count
        while len(kept) < count and number < last:
            together = range(number, min(number + width, number + count - len(kept), last))
            number = together.stop
            for text in write([row_seeds(mixed_seed(config.seed, -1, one), 1)[0] for one in together]):
                ids, first, _ = text
                question, answer = words(ids[length:first]), words(ids[first:])
                trained = kept is chosen.trained
                if question in seen or len(ids) < first + FEWEST_TOKENS or (trained and answer in answers):
                    continue
                seen.add(question)
                if not trained:
                    answers.add(answer)
                kept.append(text)
    if config.validation_texts and not chosen.held_out:
        raise ContextError(
            "ttt.validation_texts",
            expected=f"a target that writes {FEWEST_TOKENS} tokens behind the context, and not for a task's question",
            received=f"none in {TRIES * config.validation_texts} draws",
            hint="set ttt.validation_texts to 0: the context's end is held out then",
        )
    return chosen


def _read(pair: Pair, text: Written, known: int, cache: PositionCache) -> ReadText:
    """Features and last hidden states behind the context, in one forward."""
    target, draft = pair.target, pair.require_draft()
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
    return ReadText(ids, taps[..., :width], taps[..., width:], known, known, text.first_anchor)
