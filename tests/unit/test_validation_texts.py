"""Validation texts: written by the target behind the context, judged as decoding would, and a gate on them."""

from __future__ import annotations

import copy
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import make_pair
from torch import Tensor

from dgd_lightning import (
    InputError,
    Pair,
    TTTConfig,
    autoregressive_generate,
    load_pair,
    speculative_generate,
    ttt_adapt,
)
from dgd_lightning.decode.prefix_cache import PrefixCache
from dgd_lightning.decode.random_source import row_seeds
from dgd_lightning.draft.lora import DraftLora
from dgd_lightning.draft.model import DFlashDraft
from dgd_lightning.lab.rows import eval_rows
from dgd_lightning.modules.new_draft import new_draft_config
from dgd_lightning.modules.ttt_fit import _rolled_back
from dgd_lightning.seeds import mixed_seed
from dgd_lightning.ttt import validation_texts
from dgd_lightning.ttt.adapt import Fit, Material, gather, sure_gain
from dgd_lightning.ttt.objective import committed_per_block
from dgd_lightning.ttt.problem import DraftContext
from dgd_lightning.ttt.validation_texts import at_once, plan, turn_end
from dgd_lightning.types import HeldOutScore

SHORT = 24  # tokens of an answer: the lab's own are often shorter
CLOSE = 1e-9  # fp64 hidden states, read in one piece and in two


@pytest.fixture(scope="module")
def lab() -> Pair:
    return load_pair("lab", "lab", device="cpu")


def lab_prompt(pair: Pair, family: str = "procedure", task: int = 0) -> Tensor:
    row = eval_rows(1, families=(family,))[task]
    text = pair.tokenizer.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True)
    return torch.tensor(pair.tokenizer.encode(text, add_special_tokens=False))


def lab_context(pair: Pair, family: str = "procedure") -> Tensor:
    one, other = (lab_prompt(pair, family, task) for task in (0, 1))
    shortest = min(len(one), len(other))
    return one[: int((one[:shortest] == other[:shortest]).long().cumprod(0).sum())]


def tiny_context(length: int = 30) -> Tensor:
    return torch.randint(0, 60, (length,), generator=torch.Generator().manual_seed(0))


def prefix_of(pair: Pair, ids: Tensor, capacity: int) -> PrefixCache:
    """Target and draft have read ``ids``."""
    cache, draft_cache = pair.target.new_cache(1, capacity), pair.draft.new_cache(1, capacity)
    pair.target.prefill(
        ids[None],
        [len(ids)],
        cache,
        layer_ids=pair.draft.config.target_layer_ids,
        on_features=lambda features, positions: pair.draft.extend(draft_cache, features, positions),
    )
    return PrefixCache(ids, cache, draft_cache=draft_cache)


# A prefix that is read already.


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_one_prefix_serves_many_prompts(temperature: float) -> None:
    pair, begin = make_pair(), tiny_context()
    prefix = prefix_of(pair, begin, 80)
    knobs = {"max_new_tokens": 24, "temperature": temperature, "seed": 5}
    for seed in (0, 3):
        tail = torch.randint(0, 60, (seed + 1,), generator=torch.Generator().manual_seed(seed))
        prompt = torch.cat([begin, tail])
        for generate in (autoregressive_generate, speculative_generate):
            fresh, ours = generate(pair, [prompt], **knobs)[0], generate(pair, [prompt], **knobs, prefixes=[prefix])[0]
            assert torch.equal(ours.tokens, fresh.tokens)
            assert ours.acceptance_lengths == fresh.acceptance_lengths


def test_prefixes_that_do_not_fit_are_refused() -> None:
    pair, begin = make_pair(), tiny_context()
    prefix = prefix_of(pair, begin, 40)
    longer = torch.cat([begin, begin[:1]])
    with pytest.raises(InputError, match="begins with these 30 tokens"):
        autoregressive_generate(pair, [begin], max_new_tokens=2, prefixes=[prefix])
    with pytest.raises(InputError, match="begins with these 30 tokens"):
        autoregressive_generate(pair, [longer.flip(0)], max_new_tokens=2, prefixes=[prefix])
    with pytest.raises(InputError, match="a single row"):
        autoregressive_generate(pair, [longer, longer], max_new_tokens=2, prefixes=[prefix] * 2)
    with pytest.raises(InputError, match="caches of 43 positions"):
        speculative_generate(pair, [longer], max_new_tokens=8, prefixes=[prefix])
    with pytest.raises(InputError, match="features of layers"):
        speculative_generate(pair, [longer], max_new_tokens=2, prefixes=[prefix._replace(draft_cache=None)])


# What is written.


def test_the_template_tells_how_a_turn_ends(lab: Pair) -> None:
    assert lab.tokenizer.decode(turn_end(lab)) == "<|im_end|>\n<|im_start|>assistant\n"
    assert turn_end(make_pair()) == []


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('a system message is missing') }}",
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",  # the user's words are not found again
        "{% for m in messages %}USER: {{ m.content }} ASSISTANT:{% endfor %}",  # any text may hold what closes a turn
    ],
)
def test_templates_that_close_no_turn_give_continuations(lab: Pair, template: str) -> None:
    tokenizer = copy.deepcopy(lab.tokenizer)
    tokenizer.chat_template = template
    pair = Pair(lab.target, lab.draft, tokenizer)
    assert turn_end(pair) == []
    texts = gather(pair, lab_context(lab), TTTConfig(validation_texts=2, validation_tokens=16)).validation_texts
    assert (len(texts.held_out), texts.answers) == (2, 0)


def test_thinking_is_the_templates_business(lab: Pair) -> None:
    tokenizer = copy.deepcopy(lab.tokenizer)
    tokenizer.chat_template += "{% if not enable_thinking %}none{% endif %}"
    pair = Pair(lab.target, lab.draft, tokenizer)
    assert len(turn_end(pair)) > len(turn_end(pair, enable_thinking=True))


def lab_material(pair: Pair, **changes: object) -> Material:
    return gather(pair, lab_context(pair), TTTConfig(**{"validation_texts": 3, "validation_tokens": SHORT, **changes}))  # type: ignore[arg-type]


def test_questions_and_greedy_answers_behind_the_context(lab: Pair) -> None:
    context, end = lab_context(lab), turn_end(lab)
    texts = lab_material(lab, train_texts=2, repeats=2).validation_texts
    assert (len(texts.held_out), len(texts.trained)) == (3, 2)
    prompts = []
    for text in (*texts.held_out, *texts.trained):
        ids = text.ids[0]
        prompt, answer = ids[: text.first_anchor], ids[text.first_anchor :]
        assert torch.equal(ids[: len(context)], context)
        assert prompt[-len(end) :].tolist() == end
        # Written in a cache that holds the context's second reading and other validation texts, as if from nothing.
        assert torch.equal(autoregressive_generate(lab, [prompt], max_new_tokens=SHORT)[0].tokens, answer)
        prompts.append(tuple(prompt.tolist()))
    assert len(set(prompts)) == 5


@pytest.mark.parametrize(("chat", "repeats"), [(True, 2), (False, 1)], ids=["answers", "continuations"])
def test_texts_written_together_are_those_written_one_by_one(lab: Pair, chat: bool, repeats: int) -> None:
    pair, context = Pair(lab.target, lab.draft, lab.tokenizer if chat else None), lab_context(lab)
    knobs = {"validation_texts": 3, "train_texts": 2, "repeats": repeats, "validation_tokens": 12}
    found = [
        gather(pair, context, TTTConfig(**knobs, validation_batch=batch)).validation_texts for batch in (1, 2, None)
    ]
    for texts in found[1:]:
        assert texts.answers == found[0].answers
        for one, other in zip((*texts.held_out, *texts.trained), (*found[0].held_out, *found[0].trained), strict=True):
            assert torch.equal(one.ids, other.ids)
            assert one.first_anchor == other.first_anchor
            assert torch.equal(one.features, other.features)


def test_so_many_are_written_together_as_copies_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, context = make_pair(), tiny_context()
    config = TTTConfig(validation_texts=5, train_texts=2)
    planned = plan(pair, len(context), config)
    prefix = prefix_of(pair, context, planned.capacity)
    held = (slot for cache in (prefix.cache, prefix.draft_cache) for slot in cache.buffers)
    row = sum(part.nbytes for slot in held for part in (slot.keys, slot.values))  # both caches have one row
    for bytes_, expected in ((10 * row, 7), (3 * row, 3), (3 * row - 1, 2), (0, 1)):
        monkeypatch.setattr(validation_texts, "COPIES", bytes_)
        assert at_once(pair, prefix.cache, config, planned) == expected
    assert at_once(pair, prefix.cache, replace(config, validation_batch=4), planned) == 4
    assert at_once(pair, prefix.cache, replace(config, validation_batch=90), planned) == 7


def test_features_are_those_of_a_prefill_of_the_whole_text() -> None:
    pair = make_pair()
    material = gather(pair, tiny_context(), TTTConfig(validation_texts=2, validation_tokens=12, repeats=2))
    for text in material.validation_texts.held_out:
        assert text.origin == 29
        assert text.first_anchor == 38  # without a chat template a validation text is a continuation
        assert text.length == 50
        greedy = autoregressive_generate(pair, [text.ids[0, :38]], max_new_tokens=12)[0].tokens
        assert torch.equal(text.ids[0, 38:], greedy)
        hidden = pair.target.model(text.ids, output_hidden_states=True).hidden_states
        taps = torch.cat([hidden[i + 1] for i in pair.draft.config.target_layer_ids], dim=-1)[:, text.origin :]
        torch.testing.assert_close(text.features, taps, atol=CLOSE, rtol=0)
        torch.testing.assert_close(text.states, hidden[-1][:, text.origin :], atol=CLOSE, rtol=0)


def test_no_validation_text_is_a_task_and_no_trained_one_held_out(lab: Pair) -> None:
    context = lab_context(lab)
    config = TTTConfig(validation_texts=2, train_texts=3, validation_tokens=SHORT)
    texts = gather(lab, context, config).validation_texts
    avoided = [text.ids[0, : text.first_anchor] for text in (texts.held_out[0], *texts.trained)]
    again = gather(lab, context, config, avoid=avoided).validation_texts
    kept = [text.ids[0, : text.first_anchor].tolist() for text in (*again.held_out, *again.trained)]
    assert len(again.held_out) == 2
    assert again.trained
    assert not [ids for ids in kept if ids in [prompt.tolist() for prompt in avoided]]
    assert len({tuple(ids) for ids in kept}) == len(kept)


@pytest.mark.parametrize("dots", [True, False], ids=["a turn's end", "no space yet"])
def test_a_question_that_was_asked_for_follows_the_context(
    lab: Pair, monkeypatch: pytest.MonkeyPatch, dots: bool
) -> None:
    """The lab's target asks nothing when told to; here its dictations count as questions."""
    monkeypatch.setattr(validation_texts, "QUESTION", re.compile(r"\.$"))
    encode = lab.tokenizer.encode
    context = lab_context(lab, "dictation")
    if not dots:
        context = torch.cat([context, torch.tensor(encode("Repeat", add_special_tokens=False))])
    texts = gather(lab, context, TTTConfig(validation_texts=2, validation_tokens=60, steps=1)).validation_texts
    assert (texts.answers, texts.asked) == (2, 2)
    end, space = turn_end(lab), [] if dots else encode("\n\n", add_special_tokens=False)
    ask = [*context.tolist(), *encode("\n\n" + validation_texts.ASK, add_special_tokens=False), *end]
    drawn = autoregressive_generate(  # the first two seeds that a draw of four gives
        lab,
        [torch.tensor(ask)] * 4,
        max_new_tokens=60,
        temperature=0.8,
        seed=[row_seeds(mixed_seed(0, -1, number), 1)[0] for number in range(4)],
    )
    questions = [one.tokens[:-1].tolist() for one in drawn]
    for text in texts.held_out:
        prompt = text.ids[0, : text.first_anchor]
        behind = prompt[len(context) :].tolist()
        assert behind[: len(space)] == space
        assert behind[-len(end) :] == end
        assert behind[len(space) : -len(end)] in questions
        answer = autoregressive_generate(lab, [prompt], max_new_tokens=60)[0].tokens
        assert torch.equal(text.ids[0, text.first_anchor :], answer)


def test_without_questions_continuations_judge_and_the_run_says_so(lab: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that closes no turn; as many misses in a row as texts are wanted end the asking."""
    context, asked = lab_context(lab), []
    questions = validation_texts.Writer.questions

    def silent(self: validation_texts.Writer, seeds: list[int]) -> list[None]:
        asked.extend(seeds)
        assert len(questions(self, seeds)) == len(seeds)
        return [None] * len(seeds)

    monkeypatch.setattr(validation_texts.Writer, "questions", silent)
    for batch in (1, None):
        asked.clear()
        config = TTTConfig(validation_texts=3, validation_tokens=8, validation_batch=batch)
        with pytest.warns(UserWarning, match="no question behind a context"):
            texts = gather(lab, context, config).validation_texts
        assert (len(texts.held_out), texts.answers, texts.asked) == (3, 0, 0)
        assert len(asked) == len(set(asked)) == 3


@pytest.mark.slow
def test_a_real_model_asks_when_it_is_asked(smollm2: Path) -> None:
    """SmolLM2 seldom closes a user's turn that it goes on with; asked, it writes a question three times of four."""
    target = load_pair(smollm2, None, device="cpu", dtype="float32")
    draft = DFlashDraft(new_draft_config(target.target, 1, 4, None, 0))
    pair = Pair(target.target, draft, target.tokenizer)
    text = "The lighthouse of Marrow Point was built in 1874. Its lamp burned whale oil. Its last keeper was Ada Finch."
    chat = [{"role": "user", "content": text}]
    prompt = pair.tokenizer.apply_chat_template(chat, tokenize=False).rpartition("<|im_end|>")[0]
    context = torch.tensor(pair.tokenizer.encode(prompt, add_special_tokens=False))
    texts = gather(pair, context, TTTConfig(validation_texts=8, validation_tokens=64)).validation_texts
    assert len(texts.held_out) == 8
    assert texts.asked >= 5
    assert texts.answers >= 6


def test_a_whole_prompt_is_continued_not_asked(lab: Pair) -> None:
    prompt = lab_prompt(lab)  # a single task's context is its prompt: the answer is to come
    texts = gather(lab, prompt, TTTConfig(validation_texts=2, validation_tokens=SHORT), avoid=[prompt]).validation_texts
    assert texts.answers == 0
    for text in texts.held_out:
        assert torch.equal(text.ids[0, : len(prompt)], prompt)
        assert len(prompt) < text.first_anchor <= len(prompt) + 8


def test_pairs_of_two_dtypes_write_texts() -> None:
    pair = load_pair("lab", "lab", device="cpu", dtype="bfloat16", draft_dtype="float32")
    material = gather(pair, lab_context(pair), TTTConfig(validation_texts=2, validation_tokens=8))
    assert len(material.validation_texts.held_out) == 2


# How adaptations are judged.


@pytest.mark.parametrize("chat", [True, False], ids=["answers", "continuations"])
def test_tau_of_validation_texts_is_that_of_decoding_them(lab: Pair, chat: bool) -> None:
    pair = lab if chat else Pair(lab.target, lab.draft, None)
    config = TTTConfig(validation_texts=4, validation_tokens=SHORT, anchors_per_step=16)
    material = gather(pair, lab_context(lab), config)
    assert (material.validation_texts.answers > 0) == chat
    lora = DraftLora(lab.draft, rank=8, alpha=8, modules=config.modules, seed=0)
    score = material.problem(lab, config, lora).score(0)
    lora.remove()
    lengths: list[int] = []
    for text in material.validation_texts.held_out:
        stops = None if chat else []
        output = speculative_generate(
            pair, [text.ids[0, : text.first_anchor]], max_new_tokens=SHORT, stop_token_ids=stops
        )[0]
        assert torch.equal(output.tokens, text.ids[0, text.first_anchor :])
        lengths += output.acceptance_lengths
    assert score.tau == pytest.approx(sum(lengths) / len(lengths), rel=1e-12)
    assert len(score.acceptance) == lab.draft.config.block_size - 1
    assert len(score.tau_by_text) == 4


def test_blocks_are_walked_as_decoding_does() -> None:
    assert committed_per_block([3, 0, 0, 1, 2, 0]) == [4, 2]  # the last one is cut at the end of the text
    assert committed_per_block([0, 0]) == [1, 1]
    assert committed_per_block([]) == []


def test_a_gain_must_be_more_than_one_texts() -> None:
    def score(tau: float, *by_text: float) -> HeldOutScore:
        return HeldOutScore(0, 1.0, tau, list(by_text), [])

    before = score(2.0, 2.0, 2.0, 2.0, 2.0)
    assert sure_gain(before, score(2.4, 2.4, 2.4, 2.4, 2.4)) == pytest.approx(0.1823, abs=1e-4)  # ln 1.2
    assert sure_gain(before, score(2.5, 4.0, 2.0, 2.0, 2.0)) == pytest.approx(0.0, abs=1e-12)  # one of four
    # mean 0.0912, standard error 0.0526 of ln(1.2), ln(1.2), 0, 0
    assert sure_gain(before, score(2.2, 2.4, 2.4, 2.0, 2.0)) == pytest.approx(0.0385, abs=1e-4)
    assert sure_gain(score(2.0, 2.0), score(2.4, 2.4)) == pytest.approx(0.1823, abs=1e-4)


def test_what_ruins_answers_is_rolled_back(lab: Pair) -> None:
    harmful = {"steps": 12, "lr": 1e-2, "rank": 16, "weighting": "dpace", "eval_every": 12, "anchors_per_step": 32}
    context = lab_context(lab)
    judged = ttt_adapt(lab, context, TTTConfig(**harmful))
    assert judged.trace.held_out_by == "validation_texts"
    assert not judged.kept
    assert judged.trace.scores[-1].tau < 0.9 * judged.trace.scores[0].tau
    # the context's end sees nothing of it
    blind = ttt_adapt(lab, context, TTTConfig(**harmful, validation_texts=0))
    assert blind.trace.held_out_by == "span"
    assert blind.kept


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        ([(0, 2.0, 1.3), (5, 1.9, 1.2)], "the highest τ was 1.30"),
        ([(0, 2.0, 1.3), (5, 1.9, 1.365)], "the highest τ was 1.36, at step 5: +5%"),
        ([(0, 2.0, 1.3), (5, 2.1, 1.69)], "the highest τ was 1.69, at step 5: +30%, but the loss on them did not fall"),
        (
            [(0, 2.0, 1.3), (5, 1.9, 1.69), (10, 1.8, 1.5)],
            "the highest τ was 1.69, at step 5: +30%, but not beyond its standard error over 3 validation texts",
        ),
    ],
)
def test_what_was_lacking_is_said(scores: list[tuple[int, float, float]], words: str) -> None:
    held_out = [HeldOutScore(step, loss, tau, [tau] * 3, []) for step, loss, tau in scores]
    told = _rolled_back(
        SimpleNamespace(stopped="done", scores=held_out, held_out_by="validation_texts"),  # type: ignore[arg-type]
        TTTConfig(),
    )
    _, _, told = told.partition("and a lower loss; ")
    assert told.partition(" (with more")[0] == words


def test_gains_below_the_least_are_not_worth_it(lab: Pair) -> None:
    context = lab_context(lab, "ledger")
    knobs = {"steps": 16, "lr": 1e-2, "rank": 16, "eval_every": 8, "anchors_per_step": 32}
    knobs |= {"validation_texts": 4, "train_texts": 1, "validation_tokens": 40}
    result = ttt_adapt(lab, context, TTTConfig(**knobs, min_gain=0.02))
    assert result.kept
    gain = max(score.tau for score in result.trace.scores) / result.trace.scores[0].tau - 1
    assert gain >= 0.02
    assert not ttt_adapt(lab, context, TTTConfig(**knobs, min_gain=gain + 0.01)).kept


def test_too_few_positions_are_told() -> None:
    pair = make_pair()
    config = TTTConfig(validation_tokens=250)
    with pytest.raises(InputError, match=r"ttt\.validation_texts.*of the target's 512 positions"):
        ttt_adapt(pair, tiny_context(500), config)
    planned = plan(pair, 400, config)
    assert planned.tokens == 54  # shorter ones fit
    assert planned.capacity <= 512
    assert plan(pair, 30, TTTConfig(validation_texts=0)) is None
    assert plan(pair, 30, TTTConfig(steps=0)) is None


def test_the_best_of_the_worthy_scores_is_kept() -> None:
    scores = [
        HeldOutScore(0, 1.0, 2.0, [2.0, 2.0], []),
        HeldOutScore(1, 1.01, 2.6, [2.6, 2.6], []),  # the loss rose
        HeldOutScore(2, 0.9, 2.19, [2.2, 2.2], []),  # less than a tenth
        HeldOutScore(3, 0.9, 2.5, [4.0, 1.9], []),  # one text alone gained
        HeldOutScore(4, 0.9, 2.2, [2.2, 2.2], []),
        HeldOutScore(5, 0.9, 2.3, [2.5, 2.3], []),
        HeldOutScore(6, 0.9, 2.25, [2.5, 2.5], []),
    ]

    class Problem:
        has_validation_texts = True

        def score(self, step: int) -> HeldOutScore:
            return scores[step]

    class Weights:
        def state(self) -> dict[str, Tensor]:
            return {}

    fit = Fit(Problem(), Weights(), TTTConfig(steps=6, eval_every=1, patience=9))  # type: ignore[arg-type]
    best = []
    while not fit.finished:
        fit.advance(0.0)
        best.append(fit.best_step)
    assert best == [0, 0, 0, 4, 5, 5]


@pytest.mark.parametrize("changes", [{"query_only": True}, {"gradient_checkpointing": True}, {}])
def test_a_window_may_begin_behind_the_context(changes: dict) -> None:
    pair, context = make_pair(), tiny_context()
    config = TTTConfig(validation_texts=2, train_texts=1, window=6, validation_tokens=16, **changes)
    material = gather(pair, context, config)
    lora = DraftLora(pair.draft, rank=4, alpha=4, modules=config.modules, seed=0)
    problem = material.problem(pair, config, lora)
    score = problem.score(0)
    problem.loss(1).backward()  # an odd step: a validation text's
    pair.draft.gradient_checkpointing = False
    lora.remove()
    lengths = []
    for text in material.validation_texts.held_out:  # the same, block by block over the last six positions
        first, accepted = text.first_anchor - 6, []
        hidden = pair.target.model(text.ids, output_hidden_states=True)
        taps = torch.cat([hidden.hidden_states[i + 1] for i in pair.draft.config.target_layer_ids], dim=-1)[:, first:]
        choices = hidden.logits[0].argmax(-1)
        for anchor in range(text.first_anchor, text.length - 1):
            block = torch.full((1, 4), pair.draft.config.mask_token_id)
            block[0, 0] = text.ids[0, anchor]
            states = pair.draft.multi_anchor(taps, pair.target.embed(block), torch.tensor([[anchor - first]]))
            drafted = pair.target.lm_head(states)[0, 1:].argmax(-1)
            count = 0
            while count < 3 and anchor + 1 + count < text.length and drafted[count] == choices[anchor + count]:
                count += 1
            accepted.append(count)
        lengths += committed_per_block(accepted)
    assert score.tau == pytest.approx(sum(lengths) / len(lengths))


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, {"window": 6}, {}])
def test_scores_hold_the_contexts_keys(changes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are made once for all texts, give what each would have made, and are gone before the next step."""
    pair, context = make_pair(), tiny_context()
    config = TTTConfig(validation_texts=3, validation_tokens=16, **changes)
    material = gather(pair, context, config)
    lora = DraftLora(pair.draft, rank=4, alpha=4, modules=config.modules, seed=0)
    problem = material.problem(pair, config, lora)
    with torch.no_grad():
        for weight in lora.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=weight.dtype))
    lengths, make = list[int](), pair.draft.context_keys_values
    monkeypatch.setattr(
        pair.draft, "context_keys_values", lambda x, first: (lengths.append(x.shape[1]), make(x, first))[1]
    )
    held = problem.score(0)
    assert lengths.count(len(context) - 1) == 1
    assert problem.contexts[0].keys_values is None
    monkeypatch.setattr(DraftContext, "held", lambda self, end: nullcontext())
    alone = problem.score(0)
    lora.remove()
    assert held.tau_by_text == alone.tau_by_text
    assert held.loss == pytest.approx(alone.loss, rel=1e-12)


@pytest.mark.parametrize("name", ["validation_texts", "train_texts", "validation_tokens", "min_gain"])
def test_bad_numbers_are_named(name: str) -> None:
    with pytest.raises(InputError, match=f"ttt.{name}"):
        TTTConfig(**{name: -1})
