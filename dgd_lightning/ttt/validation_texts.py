"""Validation texts: what the target writes itself behind a context; adaptations are judged by it, or trained on it.

A context's own text does not show what an adapted draft does to answers: learning prose lowers the loss on prose. Text
of the kind that will be decoded does: a question on the context, and the target's own greedy answer to it, which is
what decoding will produce. The target is asked for a question. Where its reply is none, it goes on with the user's
turn, as an instruct model does that expects a question there (Xu et al. 2024, arXiv 2406.08464, made training data so).
Where it closes no turn either, and where the chat template closes none (no template, raw text), a validation text is a
continuation of the context: a few tokens drawn at random, the rest greedy. No gold answer is read for it, and no task's
question becomes one.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from dgd_lightning.decode.prefix_cache import PrefixCache
from dgd_lightning.decode.random_source import row_seeds
from dgd_lightning.errors import ContextError
from dgd_lightning.methods.autoregressive import autoregressive_generate
from dgd_lightning.methods.speculative import speculative_generate
from dgd_lightning.pair import Pair, user_turn
from dgd_lightning.seeds import mixed_seed
from dgd_lightning.target.cache import PositionCache
from dgd_lightning.ttt.config import TTTConfig
from dgd_lightning.ttt.context import ReadText

TRIES = 4  # draws per validation text wanted: a model that always asks the same gives fewer
LEAD = 8  # tokens of a continuation that are drawn, so that no two are alike
FEWEST_TOKENS = 3  # of an answer: a shorter one is one verification, whatever the draft
COPIES = 2**30  # bytes of the context's keys and values that are copied, so that validation texts are written together
SPACE = "\n\n"  # between the context and the question
ASK = "Write one question that the text above answers."
ASK_TEMPERATURE = 0.8
QUESTION = re.compile(r"[?？؟՞;⁇፧]\W*$")  # how one ends, quotes or brackets around it included
NO_QUESTIONS = (
    "the target wrote no question behind a context: continuations of the text decide whether its adaptation is kept, a "
    "weak proxy for answers (dgd.ttt.validation_answers is 0 in such rows)"
)

Kind = Literal["asked", "turn", "continuation"]  # whose question: one asked for, one of the user's turn gone on; none


class Written(NamedTuple):
    """Tokens of a validation text."""

    ids: list[int]  # context included
    first_anchor: int  # where the greedy part begins
    kind: Kind


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
    asked: int = 0  # of these, those whose question was asked for


def turn_end(pair: Pair, *, enable_thinking: bool = False) -> list[int]:
    """What the pair's chat template writes between a user's words and the answer; empty where no turns are closed.

    A template counts where the first token behind a user's words is a special one, which no user's words contain.
    """
    tokenizer: Any = pair.tokenizer
    turn = user_turn(tokenizer, enable_thinking=enable_thinking)
    if turn is None:
        return []
    end = _encode(pair, turn[1])
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values(), *pair.target.stop_token_ids}
    return end if end and end[0] in special else []


class Plan(NamedTuple):
    """How validation texts are written behind a context of S tokens."""

    turn_end: list[int]  # empty: they are continuations
    ask: list[int]  # what asks for a question, the turn's end included; empty with ``turn_end``
    tokens: int  # limit of each question and of each answer
    capacity: int  # positions that the target's cache needs


def plan(pair: Pair, length: int, config: TTTConfig, *, enable_thinking: bool = False) -> Plan | None:
    """How texts are written behind a context of S = ``length`` tokens; None where there is nothing to write."""
    if config.steps == 0 or config.validation_texts + config.train_texts == 0:
        return None
    end = turn_end(pair, enable_thinking=enable_thinking)
    ask = [*_encode(pair, SPACE + ASK), *turn_end(pair)] if end else []  # a question needs no thoughts
    besides = len(ask) + len(end) + pair.require_draft().config.block_size
    tokens = min(config.validation_tokens, (pair.target.max_positions - length - besides) // 2)
    if tokens < LEAD:
        least = 2 * LEAD + besides
        expected = f"a context that leaves {least} of the target's {pair.target.max_positions} positions"
        hint = "set ttt.validation_texts and ttt.train_texts to 0: the context's end is held out then"
        raise ContextError("ttt.validation_texts", expected=expected, received=f"{length} tokens", hint=hint)
    return Plan(end, ask, tokens, length + 2 * tokens + besides)


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

    writer = Writer(pair, context, prefix, planned, on_text)
    written = share(lambda: _choose(writer, width, config, avoid))
    held_out, trained = ([_read(pair, text, known, cache) for text in texts] for texts in written)
    kinds = [text.kind for text in written.held_out]
    answers = len(kinds) - kinds.count("continuation")
    if kinds and not answers:
        rank_zero_warn(NO_QUESTIONS)
    return ValidationTexts(held_out, trained, answers, kinds.count("asked"))


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


class Writer:
    """Writes validation texts behind a context [S] that the target has read."""

    def __init__(
        self, pair: Pair, context: Tensor, prefix: PrefixCache, planned: Plan, on_text: Callable[[], None]
    ) -> None:
        self.pair, self.context, self.prefix, self.planned, self.on_text = pair, context, prefix, planned, on_text
        end = planned.turn_end
        # Where the context closes the user's turn, the answer is to come: there is nothing to ask.
        self.asks = bool(end) and context[-len(end) :].tolist() != end
        same_dtype = pair.require_draft().dtype == pair.target.dtype
        self.generate = speculative_generate if same_dtype else autoregressive_generate

    def words(self, ids: Sequence[int]) -> str:
        """What identifies a text: the same words can be other tokens."""
        return repr(ids) if self.pair.tokenizer is None else str(self.pair.tokenizer.decode(ids)).strip()

    def questions(self, seeds: Sequence[int]) -> list[Written | None]:
        """A question and its greedy answer for each seed, all of them at a time; None where the target writes none."""
        written: list[Written | None] = [None] * len(seeds)
        if not self.asks:
            return written
        end, stops = self.planned.turn_end, self.pair.target.stop_token_ids
        ends = self.pair.tokenizer.decode(self.context[-LEAD:].tolist())  # type: ignore[union-attr]
        before = torch.tensor(_encode(self.pair, "" if ends[-1:].isspace() else SPACE)).long()
        prompts: dict[int, tuple[Kind, Tensor]] = {}  # by place in the list

        def draw(kind: Kind, prompt: Tensor, temperature: float) -> None:
            places = [place for place in range(len(seeds)) if place not in prompts]
            if not places:
                return
            drawn = self._draw(prompt, self.planned.tokens, [seeds[place] for place in places], temperature, end[:1])
            for place, (*ids, last) in zip(places, drawn, strict=True):
                asked = kind == "asked"
                closed = last in (end[0], *stops) if asked else last == end[0]
                if closed and (not asked or QUESTION.search(self.words(ids))):
                    question = [self.context, *([before] if asked else []), torch.tensor([*ids, *end])]
                    prompts[place] = kind, torch.cat(question)

        draw("asked", torch.cat([self.context, torch.tensor(self.planned.ask)]), ASK_TEMPERATURE)
        draw("turn", self.context, 1.0)
        for place, text in zip(prompts, self._answered(list(prompts.values()), None), strict=True):
            written[place] = text
        return written

    def continuations(self, seeds: Sequence[int]) -> list[Written | None]:
        """A continuation of the context for each seed, all of them at a time; None where the target stops at once.

        It goes on past its stop tokens: a chat model writes the next turns too.
        """
        stops = self.pair.target.stop_token_ids
        drawn = [ids[:-1] if ids[-1] in stops else ids for ids in self._draw(self.context, LEAD, seeds, 1.0, ())]
        prompts: list[tuple[Kind, Tensor]] = [
            ("continuation", torch.cat([self.context, torch.tensor(ids)])) for ids in drawn if ids
        ]
        texts = iter(self._answered(prompts, ()))
        return [next(texts) if ids else None for ids in drawn]

    def _draw(
        self, prompt: Tensor, tokens: int, seeds: Sequence[int], temperature: float, stops: Sequence[int]
    ) -> list[list[int]]:
        """At most so many tokens behind a prompt [S] for each seed, the stop token included."""
        self.on_text()
        outputs = autoregressive_generate(
            self.pair,
            [prompt] * len(seeds),
            max_new_tokens=tokens,
            temperature=temperature,
            seed=seeds,
            stop_token_ids=stops,
            **self._behind(len(seeds)),
        )
        return [output.tokens.tolist() for output in outputs]

    def _answered(self, prompts: Sequence[tuple[Kind, Tensor]], stops: Sequence[int] | None) -> list[Written]:
        """The prompts, each [S], with the target's greedy answers."""
        if not prompts:
            return []
        self.on_text()
        texts = [prompt for _, prompt in prompts]
        outputs = self.generate(
            self.pair,
            texts,
            max_new_tokens=self.planned.tokens,
            stop_token_ids=stops,
            **self._behind(len(texts)),
        )
        return [
            Written([*prompt.tolist(), *output.tokens.tolist()], len(prompt), kind)
            for (kind, prompt), output in zip(prompts, outputs, strict=True)
        ]

    def _behind(self, rows: int) -> dict[str, Any]:
        return {"prefixes": [self.prefix] * rows, "names": ["context"] * rows}


def _choose(writer: Writer, width: int, config: TTTConfig, avoid: Sequence[Tensor]) -> Chosen:
    """The held-out texts, then those trained on: other questions and other answers; none of ``avoid``.

    The writer is asked for at most ``width`` texts at a time, and for no more than are missing. Continuations fill up
    what is missing once as many questions in a row as are wanted came to nothing.
    """
    length = len(writer.context)
    seen = {writer.words(prompt.tolist()[length:]) for prompt in avoid}
    answers: set[str] = set()
    chosen = Chosen([], [])
    number = 0
    for kept, count in zip(chosen, (config.validation_texts, config.train_texts), strict=True):
        for write in (writer.questions, writer.continuations):
            last, missed = number + TRIES * count, 0
            while len(kept) < count and number < last and missed < count:
                together = range(number, min(number + width, number + count - len(kept), last))
                texts = write([row_seeds(mixed_seed(config.seed, -1, one), 1)[0] for one in together])
                for text in texts:
                    number += 1
                    missed = missed + 1 if text is None else 0
                    if missed >= count:  # whatever the width: the same texts
                        break
                    if text is None or len(text.ids) < text.first_anchor + FEWEST_TOKENS:
                        continue
                    question = writer.words(text.ids[length : text.first_anchor])
                    answer = writer.words(text.ids[text.first_anchor :])
                    trained = kept is chosen.trained
                    if question in seen or (trained and answer in answers):
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


def _encode(pair: Pair, text: str) -> list[int]:
    tokenizer: Any = pair.tokenizer
    return list(tokenizer.encode(text, add_special_tokens=False))


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
