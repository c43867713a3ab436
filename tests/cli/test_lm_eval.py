"""The model of lm-evaluation-harness: its numbers are transformers' own, its answers those of `dgd predict`."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli_tools import Config, Dgd, TinyPair, byte_tokenizer, predictions, write_jsonl
from torch import Tensor

from dgd_lightning.errors import InputError

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install -e '.[lm-eval]'")

from lm_eval import simple_evaluate  # type: ignore[import-not-found, unused-ignore]
from lm_eval.api.instance import Instance  # type: ignore[import-not-found, unused-ignore]
from lm_eval.api.model import CachingLM  # type: ignore[import-not-found, unused-ignore]
from lm_eval.api.registry import get_model  # type: ignore[import-not-found, unused-ignore]
from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found, unused-ignore]
from lm_eval.tasks import TaskManager  # type: ignore[import-not-found, unused-ignore]

from dgd_lightning import lm_eval as adapter
from dgd_lightning.lm_eval import DGD
from dgd_lightning.methods.guided import Guided

SAME = 1e-9  # fp64, forwards of other shapes
LENGTH = 24  # of contexts, where a test cuts them
STOPS = [chr(code) for code in range(33, 127, 2)]  # answers of a random model are random bytes


@pytest.fixture
def load(tiny_pair: TinyPair) -> Any:
    def make(**arguments: Any) -> DGD:
        return DGD(**{"target": str(tiny_pair.target), "draft": str(tiny_pair.draft), "dtype": "float64", **arguments})

    return make


def asked(kind: str, *arguments: Any) -> list[Instance]:
    return [Instance(kind, {}, one if isinstance(one, tuple) else (one,), i) for i, one in enumerate(arguments)]


# Likelihoods.


@torch.no_grad()
def plain(lm: DGD, ids: Sequence[int]) -> Tensor:
    """[S, V] transformers' logits, from one forward over the whole text."""
    return lm.pair.target.model(torch.tensor([list(ids)])).logits[0]


@torch.no_grad()
def blended(lm: DGD, ids: Sequence[int]) -> Tensor:
    """[S, V] 0.7 times the target's logits and 0.3 times slot 1 of the draft's block at each position."""
    draft, model = lm.pair.draft, lm.pair.target.model
    assert draft is not None
    output = model(torch.tensor([list(ids)]), output_hidden_states=True)
    features = torch.cat([output.hidden_states[i + 1] for i in draft.config.target_layer_ids], dim=-1)  # [1, S, F·H]
    rows = []
    for at, token in enumerate(ids):
        block = torch.tensor([[token, *[draft.config.mask_token_id] * (draft.config.block_size - 1)]])
        embedded = model.get_input_embeddings()(block)
        hidden = draft.multi_anchor(features[:, :at], embedded, torch.tensor([[at]]))  # [1, K, H]
        rows.append(model.get_output_embeddings()(hidden[0, 1]))
    return 0.7 * output.logits[0] + 0.3 * torch.stack(rows)


def score(logits: Tensor, answer: Sequence[int]) -> tuple[float, bool]:
    """Of the last tokens of a text, from logits [S, V] at the tokens before each."""
    log_p, ids = logits[-len(answer) :].log_softmax(-1), torch.tensor(answer)
    return float(log_p.gather(1, ids[:, None]).sum()), bool((log_p.argmax(-1) == ids).all())


METHODS: dict[str, Any] = {"Autoregressive": ({}, plain), "Guided": ({"beta": 0.3}, blended)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_log_likelihoods_are_those_of_a_plain_forward(load: Any, method: str, batch_size: int) -> None:
    settings, forward = METHODS[method]
    lm = load(method=method, batch_size=batch_size, max_length=LENGTH, **settings)
    encode = byte_tokenizer().encode
    greedy = byte_tokenizer().decode([int(forward(lm, encode("The sky is"))[-1].argmax())])
    texts = [("The sky is", " blue"), ("The sky is", " a colour"), ("The sky is", "x"), ("", "begin"), ("A", "bé")]
    texts += [("a far longer context than fits" * 2, " so it is cut"), ("b", "c" * LENGTH), ("The sky is", greedy)]
    results = lm.loglikelihood(asked("loglikelihood", *texts))
    for (context, continuation), (total, is_greedy) in zip(texts, results, strict=True):
        before, after = encode(context) or [lm.eot_token_id], encode(continuation)
        read = [*before, *after][-(LENGTH + 1) :][:-1]  # as the harness' own model cuts
        expected, best = score(forward(lm, read), after)
        assert total == pytest.approx(expected, abs=SAME)
        assert is_greedy is best
    if "\ufffd" not in greedy:
        assert results[-1][1] is True
    assert results[0][1] is False


@pytest.mark.parametrize("method", METHODS)
def test_rolling_log_likelihoods_read_window_by_window(load: Any, method: str) -> None:
    settings, forward = METHODS[method]
    lm = load(method=method, batch_size=4, max_length=LENGTH, **settings)
    texts = ["short", "x" * LENGTH, "a text of more than two windows, in which each token has others before it", "é"]
    for text, total in zip(texts, lm.loglikelihood_rolling(asked("loglikelihood_rolling", *texts)), strict=True):
        ids = byte_tokenizer().encode(text)
        everything, expected = [lm.eot_token_id, *ids], 0.0
        for start in range(0, len(ids), LENGTH):
            end = min(start + LENGTH, len(ids))
            expected += score(forward(lm, everything[max(0, end - LENGTH) : end]), ids[start:end])[0]
        assert total == pytest.approx(expected, abs=SAME)


def test_numbers_and_answers_are_those_of_the_harness_own_model(load: Any) -> None:
    lm = load(batch_size=3)
    theirs = HFLM(pretrained=lm.pair.target.model, tokenizer=byte_tokenizer(), batch_size=3, max_length=512)
    pairs = asked("loglikelihood", ("one", " two"), ("one", " three"), ("", "x"), ("a longer context", "é"))
    for (ours, best), (total, greedy) in zip(lm.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True):
        assert ours == pytest.approx(total, abs=1e-5)  # they sum in float32
        assert best == greedy
    texts = asked("loglikelihood_rolling", "a text", "y" * 600)
    assert lm.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), abs=1e-3)
    prompts = asked("generate_until", *((text, {"until": ["\n"], "max_gen_toks": 12}) for text in ("one", "another")))
    assert lm.generate_until(prompts) == theirs.generate_until(prompts)


def test_rolling_texts_begin_with_one_first_token(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = load()
    (alone,) = lm.loglikelihood_rolling(asked("loglikelihood_rolling", "a text"))
    encode = type(lm).tok_encode
    monkeypatch.setattr(type(lm), "tok_encode", lambda self, text: [self.prefix_token_id, *encode(self, text)])
    assert lm.loglikelihood_rolling(asked("loglikelihood_rolling", "a text")) == [alone]


def test_several_processes_are_refused(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="WORLD_SIZE: expected one process"):
        load()


def test_contexts_may_fill_all_positions(load: Any) -> None:
    lm = load(batch_size=2)
    most = lm.pair.target.max_positions
    texts = [("a" * most, "b"), ("c", "d" * most), ("e" * (most + 9), "fg")]
    encode = byte_tokenizer().encode
    for (context, continuation), (total, _) in zip(texts, lm.loglikelihood(asked("", *texts)), strict=True):
        read = encode(context + continuation)[-(most + 1) :][:-1]
        assert total == pytest.approx(score(plain(lm, read), encode(continuation))[0], abs=SAME)


# Answers.


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """The folder of a task over fifty rows in GSM8K's format."""
    dice, rows = random.Random(0), []
    for name in (f"{first}{last}" for first in "ABCDEFGHIJ" for last in ("nn", "da", "lva", "ri", "stra")):
        a, b = dice.randint(2, 90), dice.randint(2, 90)
        question = f"{name} has {a} figs and picks {b} more. How many figs are there now?"
        rows.append({"question": question, "answer": f"{a} and {b} are <<{a}+{b}={a + b}>>{a + b}.\n#### {a + b}"})
    path = write_jsonl(tmp_path / "figs_test.jsonl", rows)
    (tmp_path / "tasks").mkdir()
    settings = {
        "task": "figs",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": STOPS, "do_sample": False, "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "tasks" / "figs.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "tasks"


def test_answers_are_those_of_predict(
    load: Any, task: Path, config: Config, dgd: Dgd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, generate = {}, Guided.generate

    def noted(method: Guided, pair: Any, prompts: list[Tensor], call: Any) -> Any:
        outputs = generate(method, pair, prompts, call)
        decoded.update({tuple(p.tolist()): o.tokens.tolist() for p, o in zip(prompts, outputs, strict=True)})
        return outputs

    with monkeypatch.context() as patches:
        patches.setattr(Guided, "generate", noted)
        manager = TaskManager(include_path=str(task), include_defaults=False)
        lm = load(method="Guided", beta=0.3, batch_size=8)
        results = simple_evaluate(lm, tasks=["figs"], task_manager=manager, log_samples=True, bootstrap_iters=0)
    samples = {sample["doc"]["question"]: sample["resps"][0][0] for sample in results["samples"]["figs"]}

    arm = {"name": "guided", "method": {"class_path": "Guided", "init_args": {"beta": 0.3}}}
    model = {"arms": [arm], "stop_strings": STOPS, "max_new_tokens": 12, "dtype": "float64"}
    data = {"path": str(tmp_path / "figs_test.jsonl"), "field": "question", "chat": False, "batch_size": 10}
    run = dgd("predict", "--config", config(model, data, data_class="PromptsData"))
    assert run.code == 0, run.err
    rows = predictions(tmp_path / "logs" / "run" / "version_0")
    assert len(rows) == len(samples) == len(decoded) == 50
    for row in rows:
        assert decoded[tuple(row["dgd"]["prompt_ids"])] == row["dgd"]["output_ids"]
        assert samples[row["question"]] == row["model_output"]
    reasons = [row["dgd"]["stop_reason"] for row in rows]
    assert {"stop", "length"} == set(reasons)
    assert results["config"]["method"] == "Guided"


def test_drawn_answers_depend_on_prompt_and_seed_alone(load: Any) -> None:
    drawn = {"do_sample": True, "temperature": 1.0, "top_p": 0.9, "max_gen_toks": 8, "until": ["zz"]}
    greedy = {"until": "zz", "max_gen_toks": 8}
    prompts = [("one", drawn), ("two", greedy), ("one", drawn), ("another prompt", drawn), ("two", greedy)]
    first = load(method="Speculative", batch_size=1).generate_until(asked("", *prompts))
    lm = load(method="Speculative", batch_size=4)
    assert lm.generate_until(asked("", *prompts)) == first
    assert first[0] != first[2]  # asked twice, answered twice
    assert first[1] == first[4]
    assert lm.generate_until(asked("", ("one", {**drawn, "seed": 1})))[0] != first[0]
    assert load().generate_until(asked("", ("two", greedy)))[0] == first[1]


def test_prompts_are_cut_on_the_left_and_chats_get_their_template(load: Any) -> None:
    lm = load(max_length=LENGTH)
    options = {"until": [], "max_gen_toks": 4}
    long, short = "the end of a long prompt is kept", "the end of a long prompt is kept"[-(LENGTH - 4) :]
    assert len(set(lm.generate_until(asked("", (long, options), (short, options))))) == 1
    with pytest.raises(InputError, match="max_gen_toks: expected less than"):
        lm.generate_until(asked("", ("a", {"max_gen_toks": LENGTH})))
    turns = [{"role": "user", "content": "Hm?"}]
    text = lm.apply_chat_template(turns)
    assert text == byte_tokenizer().apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert lm.chat_template(True) == byte_tokenizer().chat_template
    assert "/" not in lm.tokenizer_name


def test_what_is_cached_is_not_asked_again(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = load(batch_size=2)
    answers = asked("generate_until", *[(text, {"until": ["e"], "max_gen_toks": 4}) for text in ("a", "b")])
    pairs, texts = asked("loglikelihood", ("a", "b"), ("a", "c")), asked("loglikelihood_rolling", "a text")

    def results(model: Any) -> list[Any]:
        return [model.generate_until(answers), model.loglikelihood(pairs), model.loglikelihood_rolling(texts)]

    path, cached = str(tmp_path / "cache.db"), results(lm)
    assert results(CachingLM(lm, path)) == cached
    monkeypatch.setattr(adapter, "replay_rows", None)
    monkeypatch.setattr(type(lm.method), "generate", None)
    assert results(CachingLM(lm, path)) == cached


# Mistakes.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tarrget": "x"}, "tarrget: .*did you mean 'target'"),
        ({"method": "Guidd"}, "method: .*did you mean 'Guided'"),
        ({"method": "Guided", "betta": 0.3, "beta": 0.3}, "betta: .*did you mean 'beta'"),
        ({"method": "Guided"}, "beta: expected a value.*add beta=… to --model_args"),
        ({"method": "guided", "beta": 0.3}, "method: .*did you mean 'Guided'"),
        ({"method": "LogitLens"}, "method: expected another kind of class.*one of Autoregressive, Guided, "),
        ({"method": ""}, "method: .*one of Autoregressive, Guided, "),
        ({"method": "Guided", "beta": "much"}, "beta: expected float, a list of float, received much"),
        ({"method": "Guided", "beta": 0.3, "schedule": "Nope"}, "schedule.class_path: (?!.*_rope)"),
        ({"pretrained": "x"}, "pretrained: .*did you mean 'target'"),
        ({"peft": "x"}, "peft: expected an argument of the model or of .*the model takes target, draft, "),
        ({"method": "Guided", "beta": 0.3, "readout": "LogitLens", "readout.layr": 1}, "readout.layr: .*'layer'"),
        ({"method": "Guided", "beta": 0.3, "readout": "WithoutContext"}, "readout: expected one that needs nothing"),
        ({"method": "Speculative", "draft": None}, "draft: expected a draft, for Speculative"),
        ({"method": "Speculative", "block_size": 99}, "block_size: expected"),
        ({"batch_size": "auto"}, "batch_size: expected an integer"),
        ({"max_length": 10_000}, "max_length: expected at most 512"),
        ({"target": None}, "target: expected a folder"),
    ],
)
def test_a_mistake_is_named(load: Any, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        load(**arguments)


def test_methods_readouts_and_requests_of_other_kinds(load: Any) -> None:
    lm = load(**{"method": "Guided", "beta": 0.3, "readout": "LogitLens", "readout.layer": 1, "speculative": False})
    assert lm.method.readout.layer == 1
    with pytest.raises(InputError, match=r"generation_kwargs.repetition_penalty: expected one of"):
        lm.generate_until(asked("", ("a", {"repetition_penalty": 1.2})))
    with pytest.raises(InputError, match="continuation: expected at most"):
        lm.loglikelihood(asked("", ("a", "b" * 600)))
    ranked = load(method="Rerank", num_answers=2)
    with pytest.raises(InputError, match="temperature: expected above 0"):
        ranked.generate_until(asked("", ("a", {"until": []})))
    blends = load(method="Rerank", betas=[0.0, 0.3])
    with pytest.raises(InputError, match="method: expected Guided"):
        blends.loglikelihood(asked("", ("a", "b")))


def test_the_command_says_a_mistake_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(adapter, "cli_evaluate", lambda: get_model("dgd").create_from_arg_obj({"betta": 1}))
    assert adapter.main() == 2
    assert capfd.readouterr().err.startswith("dgd: error: betta: expected")


@pytest.mark.slow
def test_the_harness_own_command(
    tiny_pair: TinyPair, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model = f"target={tiny_pair.target},draft={tiny_pair.draft},method=Guided,beta=0.3"
    command = f"lm_eval --model dgd --model_args {model} --tasks figs --include_path {task} --limit 6 --batch_size 4"
    command += (
        f" --use_cache {tmp_path / 'answers'} --output_path {tmp_path / 'out'} --log_samples --apply_chat_template"
    )
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", command.split())
        assert adapter.main() == 0
        assert "figs" in capfd.readouterr().out
    files = sorted((tmp_path / "out").rglob("samples_figs_*.jsonl"))
    answers = [[json.loads(line)["resps"] for line in file.read_text().splitlines()] for file in files]
    assert len(answers) == 2
    assert answers[0] == answers[1]
    assert len(answers[0]) == 6


def test_arguments_of_the_model_count_before_the_harness_own(tiny_pair: TinyPair) -> None:
    given = f"target={tiny_pair.target},draft={tiny_pair.draft},dtype=float64,batch_size=3,device=cpu"
    lm = DGD.create_from_arg_string(given, {"batch_size": 1, "max_batch_size": None, "device": "cuda:0"})
    assert lm.batch_size == 3
    assert str(lm.device) == "cpu"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"seed": "abc"}, "seed: expected an integer"),
        ({"max_length": 0}, "max_length: expected an integer of at least 1"),
        ({"enable_thinking": "no"}, "enable_thinking: expected"),
        ({"device": "cuda:7"}, "device"),
    ],
)
def test_mistakes_that_need_no_weights(load: Any, arguments: dict[str, Any], words: str) -> None:
    if "device" in arguments and torch.cuda.is_available():
        pytest.skip("there is a device")
    with pytest.raises(InputError, match=words):
        load(**arguments)
