"""Mistakes end the run with one line that names the argument; the key is in no text and no file."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from judge_tools import KEY, expected, judge_server, make_judge, make_row

from dgd_lightning.commands.score import main as score
from dgd_lightning.errors import InputError
from dgd_lightning.scoring.judge_config import JudgeModel
from dgd_lightning.scoring.judge_failures import retry_after
from dgd_lightning.scoring.score_run import score_rows, source


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def mistake(judge: Any, number: int = 1) -> str:
    with pytest.raises(InputError) as caught:
        judge.grade(make_row(number), f"answer {number}")
    assert "\n" not in str(caught.value)
    return str(caught.value)


PERMANENT = {
    "error:401,invalid_api_key,Incorrect API key": "OPENAI_API_KEY: ",
    "error:403,,country": "OPENAI_API_KEY: ",
    "error:402,,pay": "OPENAI_API_KEY: ",
    "error:429,insufficient_quota,You exceeded your current quota": "OPENAI_API_KEY: ",
    "error:404,model_not_found,The model `fair` does not exist": "judge.model: ",
    "error:404,,Not Found": "judge.base_url: ",
    "error:400,unsupported_value,temperature is not supported": "judge: ",
    "status:429,9999": "judge: ",
}


@pytest.mark.parametrize("fault", PERMANENT)
def test_a_permanent_failure_stops_every_thread_after_few_requests(fault: str, tmp_path: Path) -> None:
    def grade(number: int) -> str:
        try:
            return judge.grade(make_row(number), "an answer").rationale
        except InputError as error:
            return str(error)

    with judge_server([fault] * 99) as server:
        judge = make_judge(server.url, tmp_path / "v.jsonl")
        with ThreadPoolExecutor(8) as pool:
            told = list(pool.map(grade, range(200)))
        judge.close()
    assert all(line.startswith(PERMANENT[fault]) for line in told)  # nothing was recorded as a judge_error
    assert len(server.prompts) <= 8


def test_a_thread_that_waits_for_its_next_attempt_wakes_at_a_mistake(tmp_path: Path) -> None:
    with judge_server(["status:500"]) as server:
        judge = make_judge(server.url, tmp_path / "v.jsonl", first_wait=60.0, longest_wait=60.0)
        told: list[str] = []
        waiting = threading.Thread(target=lambda: told.append(mistake(judge, 1)))
        waiting.start()
        while len(server.prompts) < 1:
            time.sleep(0.01)
        server.faults = ["error:401,,no"]
        mistake(judge, 2)
        waiting.join(10)
        assert not waiting.is_alive()
        judge.close()
    assert told[0].startswith("OPENAI_API_KEY")


def test_closing_ends_the_waits(tmp_path: Path) -> None:
    with judge_server(["status:500"]) as server:
        judge = make_judge(server.url, tmp_path / "v.jsonl", first_wait=60.0, longest_wait=60.0)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(judge.grade, make_row(1), "an answer")
            while len(server.prompts) < 1:
                time.sleep(0.01)
            judge.close()
            with pytest.raises(RuntimeError, match="closed"):
                waiting.result(10)


def test_an_endpoint_that_falls_silent_stops_the_run(tmp_path: Path) -> None:
    with judge_server() as server:
        judge = make_judge(server.url, tmp_path / "v.jsonl", attempts=2, stop_after=3)
        row = make_row(1)
        assert judge.grade(row, row["model_output"])[:3] == expected(row)
        server.faults = ["status:500"] * 9
        told = [judge.grade(make_row(number), "an answer").rationale for number in (2, 3)]
        assert all(line.startswith("judge_error: no answer after 2 attempts") for line in told)
        assert mistake(judge, 4).startswith(
            "judge: expected an endpoint that answers, received none for 3 rows in a row"
        )
        judge.close()
    assert len(server.prompts) == 1 + 3 * 2


def test_an_answer_in_between_starts_the_count_again(tmp_path: Path) -> None:
    with judge_server() as server:
        judge = make_judge(server.url, tmp_path / "v.jsonl", attempts=1, stop_after=2)
        for number in range(6):
            server.faults = ["status:500"] if number % 2 else []
            judge.grade(make_row(number), "an answer")
        judge.close()
    assert len(server.prompts) == 6


@pytest.mark.parametrize(
    "fault",
    [
        "error:400,context_length_exceeded,too many tokens",
        "error:400,400,This model's maximum context length is 8 tokens",
        "error:400,content_filter,policy",
        "error:413,,entity",
    ],
)
def test_a_row_that_an_endpoint_cannot_take_is_that_row_s_error_even_as_the_first(fault: str, tmp_path: Path) -> None:
    with judge_server([fault] * 9) as server:
        judge = make_judge(server.url, tmp_path / "v.jsonl", stop_after=1)
        score = judge.grade(make_row(1), "an answer")
        judge.close()
    assert score.value is None
    assert score.rationale.startswith("judge_error: HTTP 4")
    assert len(server.prompts) == 1


def test_a_refused_request_after_an_answered_one_is_the_row_s(tmp_path: Path) -> None:
    with judge_server() as server:
        judge = make_judge(server.url, tmp_path / "v.jsonl")
        judge.grade(make_row(1), "an answer")
        server.faults = ["error:400,,something about this text"]
        assert judge.grade(make_row(2), "an answer").rationale == "judge_error: HTTP 400 (something about this text)"
        judge.close()


def test_nothing_listens(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    judge = make_judge(url, tmp_path / "v.jsonl")
    stored = time.monotonic()
    assert mistake(judge).startswith(f"judge.base_url: expected an endpoint that answers, received {url}: connection")
    assert time.monotonic() - stored < 5
    judge.close()


def test_a_path_that_the_server_does_not_have(tmp_path: Path) -> None:
    with judge_server() as server:
        judge = make_judge(server.url.removesuffix("/v1"), tmp_path / "v.jsonl")
        assert mistake(judge).startswith("judge.base_url: ")
        judge.close()


def test_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with judge_server() as server:
        for value in ("", "  ", "né"):
            monkeypatch.setenv("OPENAI_API_KEY", value)
            judge = make_judge(server.url, tmp_path / "v.jsonl")
            assert mistake(judge).startswith("OPENAI_API_KEY: ")
            judge.close()
        monkeypatch.delenv("OPENAI_API_KEY")
        judge = make_judge(server.url, tmp_path / "v.jsonl", key_variable="OTHER_KEY")
        assert mistake(judge).startswith("OTHER_KEY: ")
        judge.close()
    assert server.prompts == []


def test_the_url_comes_from_the_environment_where_none_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with judge_server() as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        judge = make_judge(None, tmp_path / "v.jsonl")  # type: ignore[arg-type]
        judge.grade(make_row(1), "an answer")
        assert judge.fingerprint()["judge"]["base_url"] == server.url
        judge.close()
    assert len(server.prompts) == 1
    monkeypatch.setenv("OPENAI_BASE_URL", "localhost:8000")
    with pytest.raises(InputError, match="OPENAI_BASE_URL: "):
        make_judge(None, tmp_path / "v.jsonl")  # type: ignore[arg-type]


SETTINGS: dict[str, dict[str, Any]] = {
    "judge.model": {"model": ""},
    "judge.base_url": {"base_url": "http://user:secret@127.0.0.1/v1"},
    "judge.timeout": {"timeout": 0},
    "judge.asks": {"asks": 0},
    "judge.workers": {"workers": 0},
    "judge.attempts": {"attempts": 0},
    "judge.first_wait": {"first_wait": float("nan")},
    "judge.requests_per_minute": {"requests_per_minute": -1},
    "judge.price_out": {"price_in": 1.0},
    "judge.sampling": {"sampling": {"model": "other"}},
    "judge.reasoning_effort": {"reasoning_effort": "low", "sampling": {"reasoning_effort": "high"}},
    "judge.second.reasoning_effort": {"second": JudgeModel("lab", local=True, reasoning_effort="low")},
    "judge.second.model": {"second": JudgeModel("")},
    "judge.second": {"second": JudgeModel("fair", base_url="http://127.0.0.1:9/v1")},
}


@pytest.mark.parametrize("argument", SETTINGS)
def test_settings_that_cannot_work(argument: str, tmp_path: Path) -> None:
    url = SETTINGS[argument].get("base_url", "http://127.0.0.1:9/v1")
    rest = {name: value for name, value in SETTINGS[argument].items() if name != "base_url"}
    with pytest.raises(InputError) as caught:
        make_judge(url, tmp_path / "v.jsonl", **rest)
    assert str(caught.value).startswith(f"{argument}: ")
    assert "secret" not in str(caught.value)


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"judge\.cache: "):
        make_judge("http://127.0.0.1:9/v1", tmp_path)  # a folder


PROMPTS = {
    "no places": ("Grade this.", "without {rubrics_text}, {model_output}"),
    "one place": ("{rubrics_text}", "without {model_output}"),
    "an unknown one": ("{rubrics_text} {model_output} {question}", "with {question}"),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_file_with_other_places(name: str, tmp_path: Path) -> None:
    text, told = PROMPTS[name]
    (tmp_path / "p.txt").write_text(text)
    with pytest.raises(InputError) as caught:
        make_judge("http://127.0.0.1:9/v1", tmp_path / "v.jsonl", prompt=str(tmp_path / "p.txt"))
    assert str(caught.value).startswith("judge.prompt: ")
    assert told in str(caught.value)


def test_a_prompt_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"judge\.prompt: "):
        make_judge("http://127.0.0.1:9/v1", tmp_path / "v.jsonl", prompt=str(tmp_path / "none.txt"))


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 429, 500])
def test_the_key_is_nowhere_even_if_the_server_repeats_it(
    status: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with judge_server([f"echo:{status}"] * 2) as server:
        judge = make_judge(server.url, tmp_path / "v.jsonl", attempts=2)
        try:
            told = judge.grade(make_row(1), "an answer")
        except InputError as error:
            told = f"{error!r} {error}"  # type: ignore[assignment]
        texts = [repr(told), repr(judge.fingerprint()), repr(judge.totals()), repr(vars(judge)), caplog.text]
        judge.close()
    texts.append((tmp_path / "v.jsonl").read_text())
    for text in texts:
        assert KEY not in text
        assert KEY[:12] not in text  # nor its beginning, where a text was cut


def test_retry_after_in_all_its_forms() -> None:
    from email.utils import formatdate

    assert retry_after({"retry-after": "3"}) == 3.0
    assert retry_after({"retry-after": "0.5"}) == 0.5
    assert retry_after({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    assert retry_after({"retry-after": "-4"}) == 0.0
    assert retry_after({"retry-after": "soon"}) is None
    assert retry_after({"retry-after": "nan"}) is None
    assert retry_after({}) is None
    ahead = retry_after({"retry-after": formatdate(time.time() + 60, usegmt=True)})
    assert ahead is not None
    assert 55 < ahead <= 60
    assert retry_after({"retry-after": formatdate(0, usegmt=True)}) == 0.0


@pytest.mark.parametrize("after", ["0.4", "date"])
def test_retry_after_holds_for_all_threads(after: str, tmp_path: Path) -> None:
    with judge_server([f"status:429,{after}"]) as server:
        judge = make_judge(server.url, tmp_path / "v.jsonl")
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(judge.grade, make_row(1), "an answer")
            while len(server.prompts) < 1:
                time.sleep(0.005)
            refused = time.monotonic()
            time.sleep(0.1)
            server.faults = ()
            second = pool.submit(judge.grade, make_row(2), "an answer")
            assert None not in (first.result(10).value, second.result(10).value)
        judge.close()
    wait = 0.38 if after == "0.4" else 0.0  # a date has whole seconds
    assert len(server.times) == 3
    assert all(at - refused >= wait for at in server.times[1:])


def test_a_mistake_is_told_while_another_request_is_silent(tmp_path: Path) -> None:
    """A row for nobody beside rows for a judge that takes a minute."""
    rows = [make_row(1), {"idx": "odd", "model_output": "an answer"}]
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with judge_server() as server:
        server.delay_from = 1
        judge = make_judge(server.url, tmp_path / "v.jsonl", timeout=60.0)
        stored = time.monotonic()
        with pytest.raises(InputError, match="row 2: expected what one of the graders needs"):
            score_rows(source(path), [judge])
        judge.close()
        assert time.monotonic() - stored < 20


def test_a_wrong_list_is_told_before_anybody_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps(make_row(1)) + "\n")
    (tmp_path / "excluded.txt").write_text("nobody\n")
    with judge_server() as server:
        command = ["score", str(path), "--judge.model=fair", f"--judge.base_url={server.url}"]
        command += [f"--judge.cache={tmp_path / 'v.jsonl'}", f"--exclude={tmp_path / 'excluded.txt'}"]
        with pytest.raises(InputError, match="exclude: expected ids of tasks that are there"):
            score(command)
        assert server.prompts == []


def test_each_run_is_charged_what_it_took(tmp_path: Path) -> None:
    paths = []
    for number in (1, 2):
        paths.append(tmp_path / f"run{number}.jsonl")
        paths[-1].write_text("".join(json.dumps(make_row(10 * number + n)) + "\n" for n in range(number)))
    with judge_server() as server:
        settings = ["--judge.model=fair", f"--judge.base_url={server.url}", f"--judge.cache={tmp_path / 'v.jsonl'}"]
        assert score(["score", *map(str, paths), *settings]) == 0
    spent = [json.loads(path.with_suffix(".scores.json").read_text())["judge"] for path in paths]
    assert [(one["requests"], one["tokens_in"], one["judged"]) for one in spent] == [(1, 1000, 1), (2, 2000, 2)]


@pytest.mark.parametrize("name", ["ALL_PROXY", "HTTPS_PROXY"])
def test_a_proxy_that_no_client_takes_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "foo://127.0.0.1:9")
    with judge_server() as server:
        judge = make_judge(server.url, tmp_path / "v.jsonl")
        assert mistake(judge).startswith("judge: expected an HTTP client")
        judge.close()
