"""A judge killed amid its work: stored verdicts are not asked for again, and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from fork_server import Launched, launch, launched
from judge_tools import KEY, JudgeServer, expected, judge_server, make_row

CHILD = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from fork_server import Launched, launch, launched
from judge_tools import make_judge, make_row
judge = make_judge(sys.argv[1], sys.argv[2], timeout=5.0)
rows = [make_row(number) for number in range(int(sys.argv[3]))]
with ThreadPoolExecutor(4) as pool:
    scores = list(pool.map(lambda row: judge.grade(row, row["model_output"]), rows))
json.dump({"scores": [score[:3] for score in scores], "totals": judge.totals()}, sys.stdout)
judge.close()
"""
ROWS, THREADS = 40, 4


ENVIRONMENT = {**os.environ, "OPENAI_API_KEY": KEY, "NO_PROXY": "127.0.0.1"}


def start(server: JudgeServer, cache: Path) -> Launched:
    return launch(server.url, cache, str(ROWS), code=CHILD, env=ENVIRONMENT)


def result(child: Launched) -> dict[str, Any]:
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    return json.loads(out)


def verdicts(cache: Path) -> int:
    """Whole lines; the file may end in a torn one."""
    return cache.read_bytes().count(b"\n") if cache.exists() else 0


def test_killed_and_run_again(tmp_path: Path) -> None:
    cache = tmp_path / "v.jsonl"
    with judge_server(delay=0.05) as server:
        child = start(server, cache)
        stored = time.monotonic()
        while verdicts(cache) < 10:
            assert child.poll() is None
            assert time.monotonic() - stored < 100
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
        child.wait()
        time.sleep(0.2)  # requests under way reach the server
        cache.write_bytes(cache.read_bytes()[:-30])  # as a kill between the bytes of a write, which no test can time
        stored, asked = verdicts(cache), len(server.prompts)
        assert 9 <= stored < ROWS  # the kill came amid the work
        found = result(start(server, cache))
    rows = [make_row(number) for number in range(ROWS)]
    assert [tuple(score) for score in found["scores"]] == [expected(row) for row in rows]
    assert found["totals"]["cached"] == stored
    assert len(server.prompts) - asked == found["totals"]["requests"] == ROWS - stored
    assert len(server.prompts) <= ROWS + THREADS + 1  # what was under way or torn was asked for twice, nothing else
    assert len(set(server.prompts)) == ROWS


def test_two_processes_at_once_share_their_verdicts(tmp_path: Path) -> None:
    cache = tmp_path / "v.jsonl"
    with judge_server(delay=0.02) as server:
        children = [start(server, cache) for _ in range(2)]
        found = [result(child) for child in children]
        asked = len(server.prompts)
        third = result(start(server, cache))
    assert found[0]["scores"] == found[1]["scores"] == third["scores"]
    assert third["totals"]["requests"] == 0
    assert len(server.prompts) == asked
    assert {json.loads(line)["score"] for line in cache.read_bytes().splitlines()} == {0, 1}


def test_ctrl_c_does_not_wait_for_the_judge(tmp_path: Path) -> None:
    rows = tmp_path / "answers.jsonl"
    rows.write_text("".join(json.dumps(make_row(number)) + "\n" for number in range(ROWS)))
    with judge_server() as server:
        command = ["score", str(rows), "--judge.model=fair"]
        command += [f"--judge.base_url={server.url}", f"--judge.cache={tmp_path / 'v.jsonl'}", "--judge.workers=4"]
        server.delay_from = 10  # the first nine get an answer
        child = launch(*command, env=ENVIRONMENT)
        stored = time.monotonic()
        while len(server.prompts) < 13:
            assert child.poll() is None
            assert time.monotonic() - stored < 100
            time.sleep(0.01)
        interrupted = time.monotonic()
        child.send_signal(signal.SIGINT)
        _, told = child.communicate(timeout=60)
        assert time.monotonic() - interrupted < 20  # of a judge that takes a minute
        assert child.returncode == 130
        assert "Traceback" not in told
        assert told.strip().splitlines()[-1].startswith("dgd: interrupted; the same command continues")
        server.delay_from = None
        again = launched(*command, env=ENVIRONMENT)
        again.check_returncode()
    assert "Traceback" not in again.stderr
    scores = [json.loads(line)["score"] for line in (tmp_path / "answers_graded.jsonl").read_text().splitlines()]
    assert scores == [expected(make_row(number))[0] for number in range(ROWS)]
    assert verdicts(tmp_path / "v.jsonl") == ROWS
