"""Programs found in answers, values on the wire, and graded problems in the shape of HumanEval and MBPP."""

from __future__ import annotations

import gzip
import json
import math
import textwrap
import threading
import time
from collections import Counter, OrderedDict, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dgd_lightning.errors import InputError
from dgd_lightning.scoring.code_grader import OPT_IN, CodeGrader, task_of
from dgd_lightning.scoring.jail.completion import find_program
from dgd_lightning.scoring.jail.wire import decode, encode
from dgd_lightning.scoring.sandbox import Limits

PROMPT = '''from typing import List
import math


def twice(x: int) -> int:
    return 2 * x


def total(values: List[int]) -> int:
    """Twice the sum.
    >>> total([1, 2])
    6
    """
'''
BODY = "    result = 0\n    for value in values:\n        result += twice(value)\n    return result\n"
HUMAN_EVAL = {
    "task_id": "Example/0",
    "prompt": PROMPT,
    "entry_point": "total",
    "canonical_solution": BODY,
    "test": "\nMETADATA = {'author': 'me'}\n\n\ndef check(candidate):\n    assert candidate([]) == 0\n"
    "    assert candidate([1, 2]) == twice(3)\n    for n in range(20):\n        assert candidate([n]) == 2 * n\n",
}
MBPP = {
    "task_id": 1,
    "text": "Write a function to find the longest chain of pairs.",
    "code": "import sys\r\nclass Pair(object):\r\n    def __init__(self, a, b):\r\n"
    "        self.a = a\r\n        self.b = b\r\n"
    "def longest(pairs, kind):\r\n    return kind(max(pair.b - pair.a for pair in pairs))",
    "test_list": [
        "assert longest([Pair(5, 24), Pair(1, 2)], int) == 19",
        "assert longest([Pair(1, 2)], kind=str) == '1'",
        "assert longest([root], int) == sys.getsizeof(()) - sys.getsizeof(())",
    ],
    "test_setup_code": "root = Pair(1, 5)\nroot.a = root.b\n",
    "challenge_test_list": ["assert longest([Pair(1, 3)], int) == 3"],
}
SANITIZED = {
    "task_id": 2,
    "prompt": "Write a function to sum two numbers.",
    "code": "def sum(a, b):\n    return a + b",
    "test_imports": ["import math"],
    "test_list": ["assert math.isclose(sum(0.1, 0.2), 0.3, rel_tol=0.001)", "assert set([sum(1, 2)]) == {3}"],
}


# What counts as the program of an answer.

FULL = f"{PROMPT}{BODY}"
OTHER = "def total(values):\n    return -1\n"


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (BODY, "continuation"),
        (BODY.lstrip(), "continuation"),  # a tokenizer took the first spaces
        (BODY.replace("\n    ", "\n").strip(), "continuation"),  # or all of them
        (BODY + "\n\nprint(total([1]) + input())\nassert False\n", "continuation"),
        (BODY + "\n\ndef total(values):\n    raise ValueError\n", "continuation"),
        (BODY + "\n# Explanation: the sum's twice as 'large\n", "continuation"),
        (BODY + "\n\nThis is how it's done: twice.", "continuation"),
        (f"Here:\n```python\n{FULL}```\nDone.", "fenced block"),
        (f"```\n{FULL}```", "fenced block"),
        (f"```py\r\n{FULL}```".replace("\n", "\r\n"), "fenced block"),
        (f"~~~python\n{FULL}~~~", "fenced block"),
        (f"1. So:\n   ```python\n{textwrap.indent(FULL, '   ')}   ```", "fenced block"),
        (f"```python\n{FULL}", "fenced block"),  # cut off behind it
        (f"```python\n{OTHER}```\nNo, better:\n```python\n{FULL}```", "fenced block"),  # the last one counts
        (f"```python\n{FULL}```\nUse it so:\n```python\nprint(total([1]))\n```", "fenced block"),
        (f"```bash\npip install x\n```\n```python\n{FULL}```", "fenced block"),
        (f"<think>```python\n{OTHER}```</think>```python\n{FULL}```", "fenced block"),
        # imports and helpers of the prompt are there
        (f"```python\ndef total(values: List[int]) -> int:\n{BODY}```", "fenced block"),
        (f"```python\nfrom __future__ import annotations\ndef total(values: List[int]):\n{BODY}```", "fenced block"),
        (f"```python\n{BODY}```", "fenced continuation"),
        (f"```python\n{BODY.replace(chr(10) + '    ', chr(10)).strip()}\n```", "fenced continuation"),
        (f"Sure, here you are.\n\n{FULL}\nThis sums, and then it's doubled.", "code in text"),
    ],
)
def test_programs_in_answers(answer: str, found: str) -> None:
    program = find_program(answer, PROMPT, ["total"])
    space: dict[str, Any] = {"__name__": "program"}
    for source in program.sources:
        exec(compile(source, "program", "exec", dont_inherit=True), space)
    assert space["total"]([1, 2]) == 6
    assert program.found == found


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("```python\ndef sum(a, b):\n    return a + b\n```", "fenced block"),
        ("Here it is:\ndef sum(a, b):\n    return a + b\nIt's simple.", "code in text"),
        ("sum = lambda a, b: a + b", "code in text"),
    ],
)
def test_programs_in_answers_without_a_prompt(answer: str, found: str) -> None:
    program = find_program(answer, "", ["sum"])
    space: dict[str, Any] = {}
    exec(program.sources[-1], space)
    assert space["sum"](1, 2) == 3
    assert program.found == found


def test_no_program() -> None:
    assert find_program("I can't.", "", ["sum"]) == ([], "nothing")


# Values.


def refuse(value: Any) -> str:
    raise TypeError(f"{value!r} can't be sent")


def there_and_back(value: Any) -> Any:
    return decode(json.loads(json.dumps(encode(value, refuse))), refuse)


@pytest.mark.parametrize(
    "value",
    [
        None, True, 0, -(10**30), 1.5, -0.0, 1e400, 2 - 3j, "", "ä\ud800\n\"", b"\x00\xff", bytearray(b"x"),
        [], [1, [2, (3,)]], (), (1,), {1: "a", (2, 3): [4], None: {}}, {1, "b", (2,)}, frozenset({1}),
        range(3, 9, 2), int,
    ],
)  # fmt: skip
def test_values(value: Any) -> None:
    found = there_and_back(value)
    assert found == value
    assert type(found) is type(value)


def test_other_values() -> None:
    assert there_and_back(-(1 << 100_000)) == -(1 << 100_000)
    assert math.isnan(there_and_back(float("nan")))
    assert math.copysign(1, there_and_back(-0.0)) == -1
    assert [type(value) for value in there_and_back([True, 1, 1.0])] == [bool, int, float]
    assert there_and_back([defaultdict(int, a=1), Counter("aab"), OrderedDict(b=2)]) == [
        {"a": 1}, {"a": 2, "b": 1}, {"b": 2},
    ]  # fmt: skip
    assert list(there_and_back(map(str, range(3)))) == ["0", "1", "2"]
    views = there_and_back([{1: 2}.keys(), {1: 2}.values(), {1: 2}.items()])
    assert views[0] == {1}
    assert [*views[1]] == [2]
    assert views[2] == {(1, 2)}
    assert type(there_and_back(type("Liar", (int,), {"__eq__": lambda *_: True})(3))) is int


@pytest.mark.parametrize(
    "data",
    [{}, {"a": 1, "b": 2}, {"code": "x"}, {"set": [[1]]}, {"range": ["a"]}, {"builtin": ["eval"]}],
)
def test_what_is_no_value(data: Any) -> None:
    with pytest.raises((ValueError, TypeError, KeyError)):
        decode(data, refuse)


# Grading.


@pytest.fixture(scope="module")
def grader() -> CodeGrader:
    return CodeGrader(allow_code_execution=True)


def fenced(code: str) -> str:
    return f"```python\n{code}\n```"


def test_human_eval(grader: CodeGrader) -> None:
    score = grader.grade(HUMAN_EVAL, BODY)
    assert score[:3] == (1.0, [], "every test passes")
    assert score.details is not None
    assert score.details["found"] == "continuation"
    assert (score.details["passed"], score.details["tests"]) == (1, 1)
    assert set(score.details["isolation"]) >= {"network", "processes", "files"}
    json.dumps(score.details)


def test_a_wrong_program_is_told_why(grader: CodeGrader) -> None:
    score = grader.grade(HUMAN_EVAL, BODY.replace("return result", "return result + (len(values) > 1)"))
    assert score.value == 0.0
    assert score.rationale == "AssertionError; in assert candidate([1, 2]) == twice(3); total([1, 2]) gave 7"


def test_helpers_of_the_tests_are_the_prompts(grader: CodeGrader) -> None:
    """A program may change its own helper; the tests' stays."""
    program = "def twice(x): return 0\ndef total(values): return 0"
    assert grader.grade(HUMAN_EVAL, fenced(program)).value == 0.0


@pytest.mark.parametrize("kind", ["MBPP", "SANITIZED"])
def test_mbpp(grader: CodeGrader, kind: str) -> None:
    row: dict[str, Any] = globals()[kind]
    assert grader.takes(row)
    score = grader.grade(row, fenced(row["code"]))
    assert score.value == 1.0, score
    assert score.details is not None
    assert score.details["passed"] == score.details["tests"] == len(row["test_list"])


def test_mbpp_counts_tests(grader: CodeGrader) -> None:
    score = grader.grade(SANITIZED, fenced("def sum(a, b): return 0.3"))
    assert score.value == 0.0
    assert score.details is not None
    assert (score.details["passed"], score.details["tests"]) == (1, 2)


def test_challenge_tests_only_on_request(grader: CodeGrader) -> None:
    assert task_of(MBPP, challenge=False)["tests"] == [MBPP["test_setup_code"], *MBPP["test_list"]]
    hard = CodeGrader(allow_code_execution=True, challenge=True)
    assert hard.grade(MBPP, fenced(MBPP["code"])).value == 0.0
    assert hard.fingerprint() != grader.fingerprint()


@pytest.mark.parametrize(
    "row",
    [
        SANITIZED | {"test_list": ["assert sum(1, 2) = 3"]},
        SANITIZED | {"test_list": ["assert len('abc') == 3"]},
        SANITIZED | {"test_list": ["assert sum(lambda: 1, 2) == 3"]},
        SANITIZED | {"test_imports": ["import no_such_module_anywhere"]},
    ],
)
def test_the_tests_own_fault_is_no_zero(grader: CodeGrader, row: dict[str, Any]) -> None:
    score = grader.grade(row, fenced(SANITIZED["code"]))
    assert score.value is None
    assert score.rationale.split(":")[0] in ("tests_error", "sandbox_error")


def test_answers_without_a_program_are_wrong(grader: CodeGrader) -> None:
    for answer in ("", "I can't.", "```python\n```", "def sum(", "\x00", "def sum(a, b):\n    return \ud800"):
        assert grader.grade(SANITIZED, answer).value == 0.0, answer


def test_threads(grader: CodeGrader) -> None:
    programs = [SANITIZED["code"], "def sum(a, b): return a"] * 3
    with ThreadPoolExecutor(3) as threads:
        scores = [*threads.map(lambda code: grader.grade(SANITIZED, fenced(code)).value, programs)]
    assert scores == [1.0, 0.0] * 3


def test_permission_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(OPT_IN, raising=False)
    with pytest.raises(InputError, match=f"set {OPT_IN}=1"):
        CodeGrader().grade(HUMAN_EVAL, BODY)
    monkeypatch.setenv(OPT_IN, "1")
    assert CodeGrader().allowed
    assert not CodeGrader(allow_code_execution=False).allowed


def test_a_sandbox_that_fails_is_no_zero(grader: CodeGrader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgd_lightning.scoring.sandbox.JAIL", Path("/nowhere"))
    broken = CodeGrader(allow_code_execution=True, limits=Limits(wall_seconds=5.0), namespaces=False)
    score = broken.grade(HUMAN_EVAL, BODY)
    assert score.value is None
    assert score.rationale.startswith("sandbox_error")


@pytest.mark.slow
def test_canonical_solutions(bench_data: Path, grader: CodeGrader) -> None:
    with gzip.open(bench_data / "HumanEval.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == 164
    failed = [row["task_id"] for row in rows if grader.grade(row, row["canonical_solution"]).value != 1.0]
    assert failed == []


def test_a_stopped_grader_kills_what_runs_and_scores_nothing() -> None:
    grader = CodeGrader(allow_code_execution=True)
    threading.Timer(4.0, grader.stop).start()
    stored = time.monotonic()
    with pytest.raises(RuntimeError, match="stopped while a program ran"):
        grader.grade(HUMAN_EVAL, fenced(PROMPT + "    import time\n    time.sleep(80)\n"))
    assert time.monotonic() - stored < 40  # of the 80 that the program sleeps
