"""From nothing to a draft: prompts by the target, its answers, a fit, its evaluation, a model card."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from cli_tools import Dgd, predictions, write_jsonl

from dgd_lightning import load_pair
from dgd_lightning.commands.card import main as card
from dgd_lightning.data.own_prompts import FIRST_WORDS, OwnPrompts, WrittenPrompts
from dgd_lightning.errors import InputError

LAB = ["--model.target", "lab", "--model.cpu_threads", "1"]


@pytest.mark.parametrize("started", [0.0, 0.3, 1.0])
def test_a_share_of_the_turns_is_started(started: float) -> None:
    tasks = OwnPrompts("lab", count=20, started=started).tasks
    words = [task.row["first_words"] for task in tasks]
    assert [word for word in words if word] == [FIRST_WORDS[n % len(FIRST_WORDS)] for n in range(round(20 * started))]
    assert {task.prompt for task in tasks if not task.row["first_words"]} <= {"<|im_start|>user\n"}
    assert all(task.prompt == f"<|im_start|>user\n{task.row['first_words']}" for task in tasks)


def written(path: Path, *texts: str, reason: str = "stop") -> Path:
    rows = [
        {"idx": f"p{n}", "first_words": "", "model_output": text, "dgd": {"stop_reason": reason}}
        for n, text in enumerate(texts)
    ]
    return write_jsonl(path, rows)


def test_prompts_that_are_worth_an_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = ["What does the word Tavi mean?", "Write 1,000,000 as a power of ten.", "Say: ha ha ha, then stop."]
    bad = [
        "what does the word 'Tavi' mean",  # written before
        "Why?",
        "1.1.1: 1.1.1: 1.1.1: 1.1.1: 1.1.1:",
        "He had been a monster who had been a monster who had been a monster who had been a monster who had been a",
    ]
    path = written(tmp_path / "prompts.jsonl", *good, *bad)
    tasks = WrittenPrompts(str(path)).tasks
    assert [task.messages for task in tasks] == [[{"role": "user", "content": text}] for text in good]
    assert "3 kept, 2 in a loop, 1 written before, 1 shorter than three words" in capsys.readouterr().out
    with pytest.raises(
        InputError, match=r"data\.path: expected prompts that are worth an answer, received 7 not ended"
    ):
        _ = WrittenPrompts(str(written(tmp_path / "cut.jsonl", *good, *bad, reason="length"))).tasks


def test_held_out_prompts_are_no_others(tmp_path: Path) -> None:
    path = written(tmp_path / "prompts.jsonl", *(f"What is the number {n}?" for n in range(400)))
    apart, others = ([task.idx for task in WrittenPrompts(str(path), held_out=held).tasks] for held in (True, False))
    assert len(apart) + len(others) == len({*apart, *others}) == 400
    assert 8 <= len(apart) <= 34  # one in twenty


def test_from_nothing_to_a_draft(dgd: Dgd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = dgd("predict", "--config", "train/cpu/prompts", *LAB, "--data.target", "lab", "--data.count", "48",
              "--data.started", "0", "--data.batch_size", "48")  # fmt: skip
    assert run.code == 0, run.err
    run = dgd("predict", "--config", "train/cpu/answers", *LAB, "--model.max_new_tokens", "24")
    assert run.code == 0, run.err
    answered = predictions(tmp_path / "logs/train-answers/version_0")
    assert {row["dgd"]["arm"] for row in answered} == {"greedy", "drawn"}
    run = dgd("fit", "--config", "train/cpu/draft", *LAB, "--data.target", "lab", "--trainer.max_epochs", "1",
              "--model.num_layers", "1", "--data.batch_size", "8", "--model.val_max_new_tokens", "8")  # fmt: skip
    assert run.code == 0, run.err
    assert re.search(r"^estimate:   \d\.\d GiB, \S+ (s|min) without validation \(\d+ steps of \S+ s\)", run.out, re.M)
    assert load_pair("lab", tmp_path / "drafts/mine", device="cpu").draft is not None
    held = tmp_path / "logs/train-prompts/version_0/predictions.jsonl"
    with held.open("a") as file:  # so few prompts may hold out none
        for number in range(60):
            row = {**answered[0], "idx": f"more-{number}", "model_output": f"What is the word {number}?"}
            file.write(json.dumps(row) + "\n")
    run = dgd("predict", "--config", "train/cpu/evaluate", *LAB, "--data.limit", "2", "--model.max_new_tokens", "12")
    assert run.code == 0, run.err
    assert card(["card", "drafts/mine", "logs/train-evaluate/version_0"]) == 0
    text = Path("drafts/mine/README.md").read_text()
    assert "base_model: lab" in text
    assert "| speculative | 0 | 2 | " in text
    assert "| speculative_t1 | 1 | 2 | " in text
    assert "## Training\n\n    dgd" in text
    with pytest.raises(InputError, match=r"draft: expected no README\.md yet"):
        card(["card", "drafts/mine", "logs/train-evaluate/version_0"])
    Path("drafts/mine/README.md").unlink()
    with pytest.raises(InputError, match="run: expected a run that decoded with drafts/mine, received one with None"):
        card(["card", "drafts/mine", "logs/train-answers/version_0"])
    run = dgd("fit", "--config", "train/cpu/draft", *LAB, "--data.target", "lab", "--data.arms", "[greedy, plain]")
    assert run.code == 2
    assert "data.arms: expected arms of the rows, drawn, greedy, received plain" in run.err
