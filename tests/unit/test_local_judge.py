"""A local model as judge: greedy, the same prompt and the same reading of replies."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from judge_tools import expected, good_reply, make_row

from dgd_lightning.errors import InputError
from dgd_lightning.scoring.judge_config import JudgeConfig, JudgeModel
from dgd_lightning.scoring.local_judge import LocalEndpoint
from dgd_lightning.scoring.one_judge import Effort, NoAnswer, Reply
from dgd_lightning.scoring.rubric_grader import RubricJudge


def test_greedy_replies_equal_a_loop_of_forwards() -> None:
    endpoint = LocalEndpoint(JudgeModel("lab", local=True, dtype="float32", device="cpu", max_new_tokens=12), "judge")
    effort = Effort()
    reply = endpoint.ask("the north gate opens .", effort)
    pair = endpoint._load()
    target, tokenizer = pair.target, pair.tokenizer
    turn = [{"role": "user", "content": "the north gate opens ."}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(text, add_special_tokens=False)
    new: list[int] = []
    with torch.inference_mode():
        while len(new) < 12 and not (new and new[-1] in target.stop_token_ids):
            new.append(int(target.model(torch.tensor([ids + new])).logits[0, -1].argmax()))
    ended = new[-1] in target.stop_token_ids
    assert reply == Reply(
        tokenizer.decode(new, skip_special_tokens=True), None if ended else "a reply that was cut off"
    )
    assert (effort.requests, effort.tokens_in, effort.tokens_out) == (1, len(ids), len(new))


def test_a_model_that_writes_no_verdict_is_a_judge_error_and_is_asked_once(tmp_path: Path) -> None:
    config = JudgeConfig("lab", local=True, device="cpu", max_new_tokens=4, cache=str(tmp_path / "v.jsonl"))
    judge = RubricJudge(config)
    score = judge.grade(make_row(1), "an answer")
    totals, identity = judge.totals(), judge.fingerprint()["judge"]
    judge.close()
    assert score.value is None
    assert score.rationale.startswith("judge_error: ")
    assert totals["failed"] == 1
    assert identity["local"]
    assert len(identity["weights"]) == 64  # another model in the same folder is another judge


def test_a_local_verdict_is_read_and_stored_as_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row, prompts = make_row(3), []

    def generate(self: LocalEndpoint, pair: Any, prompt: str, effort: Effort) -> Reply:
        prompts.append(prompt)
        return Reply("```json\n" + json.dumps(good_reply(prompt)) + "\n```", None)

    monkeypatch.setattr(LocalEndpoint, "_generate", generate)
    config = JudgeConfig("lab", local=True, device="cpu", cache=str(tmp_path / "v.jsonl"))
    judge = RubricJudge(config)
    assert judge.grade(row, row["model_output"])[:3] == judge.grade(row, row["model_output"])[:3] == expected(row)
    judge.close()
    assert len(prompts) == 1


def test_a_prompt_longer_than_the_model_reads() -> None:
    endpoint = LocalEndpoint(JudgeModel("lab", local=True, device="cpu"), "judge")
    tokenizer = endpoint._load().tokenizer
    endpoint._pair = SimpleNamespace(target=SimpleNamespace(max_positions=8), tokenizer=tokenizer)  # type: ignore[assignment]
    with pytest.raises(NoAnswer, match="the judge reads 8"):
        endpoint.ask("the gate " * 8, Effort())


@pytest.mark.parametrize("argument", ["judge", "judge.second"])
def test_a_folder_that_is_not_there(argument: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        LocalEndpoint(JudgeModel(str(tmp_path / "none"), local=True), argument)
    assert str(caught.value).startswith(f"{argument}.model: ")


def test_an_unknown_dtype() -> None:
    endpoint = LocalEndpoint(JudgeModel("lab", local=True, dtype="int3", device="cpu"), "judge")
    with pytest.raises(InputError, match=r"judge\.dtype: "):
        endpoint.ask("a", Effort())


def test_a_stopped_judge_breaks_off_and_keeps_nothing(tmp_path: Path) -> None:
    config = JudgeConfig("lab", local=True, device="cpu", max_new_tokens=400, cache=str(tmp_path / "v.jsonl"))
    judge = RubricJudge(config)
    told: list[str] = []

    def ask(number: int) -> None:
        try:
            judge.grade(make_row(number), f"answer {number}")
        except RuntimeError as error:
            told.append(str(error))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    stored = time.monotonic()
    for thread in threads:
        thread.start()
    judge.stop()
    for thread in threads:
        thread.join()
    judge.close()
    assert told == ["the judge was stopped while a row waited for its verdict"] * 4
    assert time.monotonic() - stored < 60
    assert not (tmp_path / "v.jsonl").read_bytes()
