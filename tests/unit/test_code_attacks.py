"""Programs that try to pass without being right, or to do harm: all but `LIARS` score 0, and nothing is left of any."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from attack_programs import FORGERS, LIARS, WRONG
from harmful_programs import FINDERS, HARMFUL

from dgd_lightning.scoring import sandbox
from dgd_lightning.scoring.code_grader import CodeGrader
from dgd_lightning.scoring.sandbox import Limits, Sandbox
from dgd_lightning.types import Score

# Small enough that no attack can endanger the machine; every bomb below is bounded as well.
SMALL = Limits(cpu_seconds=1, wall_seconds=6.0, memory_mb=200, processes=8, disk_mb=8)
ROW = {
    "task_id": "add",
    "prompt": 'def add(a: int, b: int) -> int:\n    """The sum of two numbers."""\n',
    "entry_point": "add",
    "test": "def check(candidate):\n    for a, b in [(1, 2), (5, 7), (-3, 3), (10**20, 1)]:\n"
    "        assert candidate(a, b) == a + b, 'no sum'\n    assert not candidate(1, -1)\n",
}


NAPS = str(10**6 + os.getpid())  # seconds that a daemon sleeps: tells ours from those of tests in other processes


@pytest.fixture(scope="module", autouse=True)
def jail(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the programs inside the sandbox, so that this module's processes can be told from all others."""
    folder = tmp_path_factory.mktemp("own") / "jail"
    shutil.copytree(sandbox.JAIL, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "JAIL", folder)
        yield folder


def survivors() -> list[str]:
    """Processes of the sandbox, or of a program that it ran."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if any(word.startswith(str(sandbox.JAIL)) for word in words) or words == ["sleep", NAPS]:
            found.append(" ".join(words))
    return found


@pytest.fixture(scope="module")
def grader() -> CodeGrader:
    return CodeGrader(allow_code_execution=True, limits=SMALL)


@pytest.fixture(scope="module")
def bare() -> CodeGrader:
    """A grader as it is where no namespaces can be had."""
    grader = CodeGrader(allow_code_execution=True, allow_no_isolation=True, limits=SMALL)
    grader.sandbox = Sandbox(SMALL, namespaces=False)
    return grader


@pytest.fixture
def isolated(grader: CodeGrader) -> CodeGrader:
    """The grader, where namespaces hold; attacks on files, network and other processes are not tried without."""
    if not grader.sandbox.isolation["files"]:
        pytest.skip(f"no namespaces here: {grader.sandbox.isolation['reason']}")
    return grader


def graded(grader: CodeGrader, program: str, row: dict[str, Any] = ROW) -> Score:
    return grader.grade(row, f"```python\n{program.replace('86399', NAPS)}\n```")


def test_the_problem_can_be_solved(grader: CodeGrader) -> None:
    """Or else no attack could succeed."""
    assert graded(grader, "def add(a, b): return a + b").value == 1.0
    assert graded(grader, WRONG).value == 0.0
    assert not survivors()


@pytest.mark.parametrize("attack", FORGERS)
def test_forging(grader: CodeGrader, attack: str) -> None:
    score = graded(grader, FORGERS[attack])
    assert score.value == 0.0, score
    assert not survivors()


@pytest.mark.parametrize("attack", LIARS)
def test_what_can_not_be_told_apart(grader: CodeGrader, attack: str) -> None:
    """Listed as such in docs/scoring.md; a test that fails here has found out how to tell them."""
    assert graded(grader, LIARS[attack]).value == 1.0


@pytest.mark.parametrize("attack", HARMFUL)
def test_harm(isolated: CodeGrader, attack: str, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    witness.mkdir(mode=0o777)
    witness.chmod(0o777)
    (witness / "file").write_text("here")
    score = graded(isolated, HARMFUL[attack].replace("{witness!r}", repr(str(witness))))
    assert score.value == 0.0, score
    assert not survivors()
    assert [path.name for path in witness.iterdir()] == ["file"]
    assert (witness / "file").read_text() == "here"


FORGERS_WITHOUT = sorted(FORGERS.keys() - {"signals to parents", "write others' memory", "ptrace"})


@pytest.mark.parametrize("attack", FORGERS_WITHOUT[::4])
def test_forging_without_namespaces(bare: CodeGrader, attack: str) -> None:
    score = graded(bare, FORGERS[attack])
    assert score.value == 0.0, score
    assert not survivors()


@pytest.mark.skipif(sys.platform != "linux", reason="descendants are found in /proc")
@pytest.mark.parametrize(
    "attack", ["daemon", "a name that is no text", "subprocess", "fork bomb", "memory of many processes", "many files"]
)
def test_harm_without_namespaces(bare: CodeGrader, attack: str) -> None:
    assert bare.sandbox.isolation == {"network": False, "processes": False, "files": False, "reason": "switched off"}
    score = graded(bare, HARMFUL[attack])
    assert score.value == 0.0, score
    assert not survivors()


@pytest.mark.skipif(sys.platform != "linux", reason="descendants are found in /proc")
@pytest.mark.parametrize("namespaces", ["None", "False"])
def test_nothing_outlives_a_killed_grader(namespaces: str, tmp_path: Path) -> None:
    program = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(50)\ndef add(a, b): time.sleep(50)"
    script = (
        "import json, pathlib, sys\nfrom dgd_lightning.scoring import sandbox\n"
        f"sandbox.JAIL = pathlib.Path({str(sandbox.JAIL)!r})\n"
        "from dgd_lightning.scoring.code_grader import CodeGrader\n"
        "grader = CodeGrader(allow_code_execution=True, allow_no_isolation=True)\n"
        f"grader.sandbox = sandbox.Sandbox(grader.limits, namespaces={namespaces})\n"
        "grader.grade(*json.loads(sys.argv[1]))"
    )
    argv = [sys.executable, "-c", script, json.dumps([ROW, f"```\n{program}\n```"])]
    grading = subprocess.Popen(argv, env={**os.environ, "TMPDIR": str(tmp_path)})
    wait_until(lambda: len(survivors()) >= 3)  # the warden, the program and its child
    grading.kill()
    grading.wait()
    wait_until(lambda: not survivors())
    wait_until(lambda: not [*tmp_path.iterdir()])


def wait_until(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# What a program can reach, told by problems whose answer lies outside.

SECRET = "7d1f0c"


@pytest.fixture
def port() -> Iterator[int]:
    """A server that tells the secret to everybody."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                connection.sendall(SECRET.encode())

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield server.getsockname()[1]
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join()


@pytest.mark.parametrize(
    ("kind", "finder"),
    [*(("isolated", finder) for finder in FINDERS), ("bare", "environment"), ("bare", "network")],
)
def test_reach(
    kind: str, finder: str, tmp_path: Path, port: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    grader: CodeGrader = request.getfixturevalue(kind)
    (tmp_path / "key").write_text(SECRET)
    monkeypatch.setenv("DGD_TEST_KEY", SECRET)
    monkeypatch.setenv("HOME", str(tmp_path))
    program = FINDERS[finder].replace("{path!r}", repr(str(tmp_path / "key")))
    program = program.replace("{home!r}", repr(str(tmp_path))).replace("{port}", str(port))
    row = {
        "prompt": 'def find() -> str:\n    """The secret."""\n',
        "entry_point": "find",
        "test": f"def check(candidate):\n    assert candidate() == {SECRET!r}\n",
    }
    score = graded(grader, program, row)
    # the network's program does succeed where nothing stops it, so the check can fail
    assert score.value == float((kind, finder) == ("bare", "network")), score


def test_the_graders_own_environment_stays(grader: CodeGrader) -> None:
    before = dict(os.environ)
    graded(grader, "import os\nos.environ.clear()\n" + WRONG)
    assert dict(os.environ) == before
