"""The lab: its world is deterministic, its answers pass their own checks, names are held out, any text encodes."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dgd_lightning.callbacks.provenance import Provenance
from dgd_lightning.errors import InputError
from dgd_lightning.lab.contexts import LabContexts
from dgd_lightning.lab.draft_data import DraftStage, LabDraftData, StagedOrder
from dgd_lightning.lab.families import FAMILIES, SHIFTED
from dgd_lightning.lab.grader import grade, reverted_to_prior
from dgd_lightning.lab.rows import (
    ALL_FAMILIES,
    EVAL_SIZES,
    LARGEST_SIZES,
    SMALLEST_SIZES,
    eval_rows,
    has_long_task,
    make_context,
    messages,
    to_row,
)
from dgd_lightning.lab.tokenizer import MASK_TOKEN_ID, VOCAB_SIZE, build_tokenizer
from dgd_lightning.lab.training_data import Encoder, LabStream, LabTargetData, Part, Stage, Turn, probe_batches
from dgd_lightning.lab.world import SYLLABLES, Namer, is_held_out
from dgd_lightning.run_folder import PROVENANCE


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.mark.parametrize("family", sorted(ALL_FAMILIES))
def test_context_is_determined_by_its_arguments(family):
    first = make_context(5, family, split="eval", size=9, contradict=0.5)
    assert first == make_context(5, family, split="eval", size=9, contradict=0.5)
    assert first != make_context(6, family, split="eval", size=9, contradict=0.5)


@pytest.mark.parametrize("family", sorted(ALL_FAMILIES))
def test_gold_answers_solve_and_others_fail(family):
    for seed in range(10):
        context = make_context(seed, family, split="eval", size=10, contradict=0.5)
        for number, task in enumerate(context.tasks):
            row = to_row(context, task, "c", number)
            assert len(task.rubrics) == len(task.checks)
            assert grade(row, task.answer).value == 1.0, task
            assert grade(row, "").value == 0.0
            cut = task.answer.rsplit(" ", 1)[0]
            assert grade(row, cut).value == 0.0, task
            if task.prior_answer is not None:
                value = task.checks[0]["value"]
                reverted = task.answer.replace(value, task.prior_answer)
                assert grade(row, reverted).value == 0.0
                assert reverted_to_prior(row, reverted)
                assert not reverted_to_prior(row, task.answer)


def test_sequence_answers_must_be_whole_and_in_order():
    context = make_context(1, "route", split="eval", size=8, contradict=0.0)
    task = next(task for task in context.tasks if task.long)
    row = to_row(context, task, "c", 0)
    hops = task.answer.split(". ")
    swapped = ". ".join([hops[1], hops[0], *hops[2:]])
    assert grade(row, swapped).status[1] == "no"
    assert grade(row, task.answer + " And home.").status == ["yes", "yes", "no"]


def test_short_answers_stand_in_the_context_unless_closed():
    for family in FAMILIES:
        for seed in range(10):
            context = make_context(seed, family, split="train", size=8, contradict=0.3)
            for task in context.tasks:
                if task.prior != "closed" and not task.long:
                    assert task.checks[0]["value"] in context.text


def test_names_of_the_splits_never_meet():
    names: dict[str, set[str]] = {"train": set(), "eval": set()}
    for split, found in names.items():
        for seed in range(30):
            name = Namer(random.Random(seed), split)
            context = [name() for _ in range(40)]
            assert len({word[:2] for word in context}) == len({word[-2:] for word in context}) == 40
            found.update(context)
    assert names["train"].isdisjoint(names["eval"])
    share = sum(is_held_out((i, j)) for i in range(64) for j in range(64)) / 64**2
    assert 0.1 < share < 0.3


@pytest.mark.parametrize("split", ["train", "eval"])
def test_namer_stops_once_syllables_run_out(split):
    for seed in range(3):
        name = Namer(random.Random(seed), split)
        assert len({name() for _ in SYLLABLES}) == len(SYLLABLES) == 64
        with pytest.raises(InputError, match=r"^size: expected a context of at most 64 names"):
            name()


@pytest.mark.parametrize("family", sorted(ALL_FAMILIES))
def test_largest_and_smallest_sizes(family):
    """The table says what a family can write; one fact more ends in an error, and never in a loop."""
    smallest, largest = SMALLEST_SIZES.get(family, 1), LARGEST_SIZES.get(family, 70)
    for seed in range(3):
        for split in ("train", "eval"):
            assert make_context(seed, family, split=split, size=smallest, contradict=0.5).tasks
            assert make_context(seed, family, split=split, size=largest, contradict=0.5).tasks
    if family in LARGEST_SIZES:
        assert EVAL_SIZES.get(family, (1, 1))[1] <= largest
        with pytest.raises(InputError, match=r"^size: .*rows.LARGEST_SIZES"):
            make_context(0, family, split="eval", size=largest + 1, contradict=0.5)


def test_evaluation_contexts_use_held_out_names_only():
    seen = set()
    for row in eval_rows(3, families=list(ALL_FAMILIES)):
        for word in re.findall(r"\b[A-Z][a-z]+\b", row["messages"][1]["content"].rsplit("\n\n", 1)[0]):
            pieces = [word[i : i + 2].lower() for i in range(0, len(word), 2)]
            if len(word) in (4, 6) and set(pieces) <= set(SYLLABLES):
                seen.add(tuple(SYLLABLES.index(piece) for piece in pieces))
    assert len(seen) > 100
    assert all(is_held_out(name) for name in seen)


def test_evaluation_set_covers_the_four_categories_and_both_lengths(tokenizer):
    rows = eval_rows(4)
    assert len({row["metadata"]["context_category"] for row in rows}) == 4
    assert len({row["metadata"]["sub_category"] for row in rows}) == len(FAMILIES)
    assert len({row["metadata"]["task_id"] for row in rows}) == len(rows)
    lab = [row["metadata"]["lab"] for row in rows]
    assert {entry["prior"] for entry in lab} >= {"agree", "contradict", "novel"}
    long = [len(tokenizer(entry["answer"]).input_ids) for entry in lab if entry["long"]]
    assert sum(length >= 64 for length in long) >= 0.7 * len(long)
    assert max(len(tokenizer(entry["answer"]).input_ids) for entry in lab if not entry["long"]) < 20


def test_more_contexts_extend_the_set():
    assert [row["metadata"]["task_id"] for row in eval_rows(2, families=["route"])] == [
        row["metadata"]["task_id"] for row in eval_rows(4, families=["route"])
    ][: len(eval_rows(2, families=["route"]))]


def test_shifted_domain_is_outside_the_default(tokenizer):
    sub_categories = {task.row["metadata"]["sub_category"] for task in LabContexts().tasks}
    assert sub_categories.isdisjoint({"Star Charts", "Ledgers"})
    shifted = {task.row["metadata"]["sub_category"] for task in LabContexts(families=list(SHIFTED)).tasks}
    assert shifted == {"Star Charts", "Ledgers"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"families": ["geography"], "sizes": (24, 24)}, r"data\.sizes: .* ≤ 21 for the family geography"),
        ({"families": ["route", "star_chart"], "sizes": (33, 33)}, r"data\.sizes: .* ≤ 31 for the family star_chart"),
        ({"families": ["experiment"], "sizes": (32, 34)}, r"data\.sizes: .* ≤ 29 for the family experiment"),
        ({"families": ["cipher"], "sizes": (34, 34)}, r"data\.sizes: .* ≤ 32 for the family cipher"),
        ({"sizes": (20, 24)}, r"data\.sizes: .* ≤ 21 for the family geography"),
        ({"sizes": (9, 5)}, r"data\.sizes: expected 3 ≤ smallest ≤ largest"),
        ({"families": ["route", "route"]}, r"data\.families: .*received route more than once"),
        ({"families": []}, r"data\.families: .*received none"),
        ({"families": ["rote", "route"]}, r"data\.families: .*received rote"),
    ],
)
def test_contexts_that_cannot_be_written(settings, message):
    with pytest.raises(InputError, match=f"^{message}"):
        LabContexts(**settings)


def test_contexts_check_their_ids(monkeypatch):
    rows = eval_rows(1, families=["route"])
    monkeypatch.setattr("dgd_lightning.lab.contexts.eval_rows", lambda *_, **__: [rows[0], rows[0]])
    with pytest.raises(InputError, match=r"^lab row 2: .*already at lab row 1"):
        LabContexts().read()


@pytest.mark.parametrize(
    "text", ["Hello wörld! 漢字 \t def f(x):\n\treturn x**2  # ok\n\n\n", "", "Zomita\n\nkelora  9 "]
)
def test_any_text_encodes_and_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_syllables_and_words_are_single_tokens(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer(" Nomita haunts").input_ids) == ["ĠNo", "mi", "ta", "Ġhaunts"]
    assert len(tokenizer) < MASK_TOKEN_ID < VOCAB_SIZE
    context = make_context(0, "geography", split="eval", size=8, contradict=0.0)
    assert len(tokenizer(context.text).input_ids) < 200


def test_encoder_writes_what_the_chat_template_writes(tokenizer):
    encoder = Encoder(tokenizer, 0.1)
    context = make_context(0, "cipher", split="train", size=8, contradict=0.0)
    task = context.tasks[-1]
    chat = [*messages(context, task), {"role": "assistant", "content": task.answer}]
    ids, weights = encoder.conversation([Turn(message["role"], [Part(message["content"])]) for message in chat])
    expected = tokenizer.apply_chat_template(chat, tokenize=False)
    assert ids == tokenizer.encode(expected, add_special_tokens=False)
    answer = [token for token, weight in zip(ids, weights, strict=True) if weight > 0.1]
    assert tokenizer.decode(answer) == task.answer + "<|im_end|>"


def test_stream_resumes_where_it_stopped(tokenizer):
    stages = [Stage(2, 64, 2, (3, 4), 0.5, 0.3, 0.1, ["route"]), Stage(2, 96, 1, (3, 4), 0.5, 0.3, 0.1, ["tariff"])]
    encoder = Encoder(tokenizer, 0.1)
    whole = iter(LabStream(encoder, stages, seed=3))
    batches = [next(whole) for _ in range(4)]
    assert [tuple(batch.input_ids.shape) for batch in batches] == [(2, 64), (2, 64), (1, 96), (1, 96)]
    resumed = next(iter(LabStream(encoder, stages, seed=3, first_step=3)))
    assert torch.equal(resumed.input_ids, batches[3].input_ids)
    assert not torch.equal(batches[0].input_ids, batches[1].input_ids)


def test_probes_mark_answers(tokenizer):
    batch = probe_batches(Encoder(tokenizer, 0.1), 1, (4, 5))[0]
    answer = tokenizer.decode(batch.input_ids[0][batch.answer_mask[0]])
    assert answer.endswith("<|im_end|>")
    assert batch.answer_mask.any(-1).all()


def test_staged_order_is_resumable_and_keeps_to_its_stage():
    counts, steps = [10, 7, 12], [3, 2, 4]
    whole = StagedOrder(counts, steps, batch_size=4, seed=5)
    batches = [whole.batch(number) for number in range(12)]
    bounds = [(0, 10)] * 3 + [(10, 17)] * 2 + [(17, 29)] * 7  # the last stage goes on
    for batch, (low, high) in zip(batches, bounds, strict=True):
        assert len(set(batch)) == 4
        assert all(low <= index < high for index in batch)
    first_epoch = sorted(index for batch in batches[5:8] for index in batch)
    assert first_epoch == list(range(17, 29))  # every conversation once before any twice
    resumed = iter(StagedOrder(counts, steps, batch_size=4, seed=5, first=6))
    assert [next(resumed) for _ in range(3)] == batches[6:9]
    assert StagedOrder(counts, steps, batch_size=4, seed=6).batch(0) != batches[0]


def test_draft_stages_need_a_batch_of_prompts():
    with pytest.raises(InputError, match=r"data\.stages"):
        LabDraftData("lab", [DraftStage(steps=5, prompts=3)], batch_size=4)


def test_which_families_ask_for_long_answers():
    short_only = {family for family in ALL_FAMILIES if not has_long_task(family)}
    assert short_only == {"natural_history", "geography", "tariff", "experiment"}
    for family in ALL_FAMILIES:  # one context tells for all
        for seed in range(5):
            context = make_context(seed, family, split="eval", size=2 + 3 * seed, contradict=0.3)
            assert any(task.long for task in context.tasks) is has_long_task(family)
            assert any(not task.long for task in context.tasks)


GOOD_STAGE = DraftStage(steps=5, prompts=4, sizes=(2, 3), families=["route", "route", "tariff"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": (5, 24), "families": ["geography", "route"]}, r"sizes: .* ≤ 21 for the family geography"),
        ({"sizes": (1, 4), "families": ["procedure"]}, r"sizes: expected 2 ≤ .*procedure"),
        ({"sizes": (0, 4)}, r"sizes: expected 1 ≤"),
        ({"sizes": (5, 4)}, r"sizes: expected 1 ≤"),
        ({"families": []}, r"families: .*received none"),
        ({"families": ["rote"]}, r"families: .*received rote"),
        ({"families": ["tariff", "geography"]}, r"long_share: expected 0 .*\(tariff, geography\), received 0\.6"),
    ],
)
def test_draft_stages_that_cannot_be_drawn(change, message):
    with pytest.raises(InputError, match=rf"^data\.stages\[1\]\.{message}"):
        LabDraftData("lab", [GOOD_STAGE, replace(GOOD_STAGE, **change)], batch_size=4)


def test_prompts_never_wait_for_long_tasks_that_do_not_exist():
    def drawn(families, long_share):
        return DraftStage(1, 3, (5, 6), long_share, families).draw(3, 0, "eval").long

    with pytest.raises(InputError, match=r"^long_share: expected 0"):
        drawn(["tariff"], 1.0)
    with pytest.raises(InputError, match=r"^families: "):
        drawn([], 0.0)
    assert drawn(["tariff"], 0.0) == [False] * 3
    assert drawn(["tariff", "route"], 1.0) == [True] * 3


@pytest.mark.parametrize(
    ("families", "long"), [(["tariff", "geography"], False), (["tariff", "route"], True), (None, True)]
)
def test_validation_takes_long_prompts_where_there_are_any(families, long):
    stage = replace(GOOD_STAGE, long_share=0.0, families=families)
    data = LabDraftData("lab", [stage], batch_size=4, val_prompts=3, seed=7)
    batches = list(data.val_dataloader())
    wanted = replace(stage, long_share=float(long)).draw(3, 7, "eval")
    assert wanted.long == [long] * 3
    assert [ids.tolist() for ids in batches[0]] == [ids.tolist() for ids in wanted.ids]


def test_fingerprints_tell_settings_apart():
    drafts = [
        LabDraftData("lab", [GOOD_STAGE], batch_size=4),
        LabDraftData("lab", [GOOD_STAGE, GOOD_STAGE], batch_size=4),
        LabDraftData("lab", [replace(GOOD_STAGE, long_share=0.5)], batch_size=4),
        LabDraftData("lab", [GOOD_STAGE], batch_size=4, max_new_tokens=20),
        LabDraftData("lab", [GOOD_STAGE], batch_size=4, seed=1),
        LabDraftData("other", [GOOD_STAGE], batch_size=4),
    ]
    stage = Stage(2, 64, 2, (3, 4), 0.5, 0.3, 0.1, ["route"])
    targets = [
        LabTargetData([stage]),
        LabTargetData([replace(stage, contradict=0.2)]),
        LabTargetData([stage], context_weight=0.1),
        LabTargetData([stage], seed=1),
    ]
    found = [data.fingerprint() for data in (*drafts, *targets)]
    assert len(set(found)) == len(found)
    assert all(re.fullmatch("[0-9a-f]{16}", fingerprint) for fingerprint in found)
    assert LabDraftData("lab", [replace(GOOD_STAGE)], batch_size=4).fingerprint() == found[0]
    # how many processes write the text does not change it
    assert LabTargetData([replace(stage)], num_workers=0).fingerprint() == found[len(drafts)]


def test_provenance_of_a_fit_names_its_data(tmp_path):
    data = LabDraftData("lab", [GOOD_STAGE], batch_size=4)
    trainer = SimpleNamespace(
        log_dir=str(tmp_path), is_global_zero=True, datamodule=data, world_size=1, strategy=object()
    )
    Provenance().setup(trainer, SimpleNamespace(), "fit")
    assert json.loads((tmp_path / PROVENANCE).read_text())["data_hash"] == data.fingerprint()
