"""Graded problems in the shape of HumanEval and MBPP."""

from __future__ import annotations

import gzip
import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dgd_lightning.commands.score import parse_options
from dgd_lightning.errors import InputError
from dgd_lightning.scoring.code_grader import OPT_IN, CodeGrader, task_of
from dgd_lightning.scoring.sandbox import Limits, Sandbox

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
    assert score.rationale == "AssertionError; in assert candidate([1, 2]) == twice(3)"


def test_helpers_of_the_tests_are_the_prompts(grader: CodeGrader) -> None:
    """A program may change its own helper; the tests' stays. So do built-in functions."""
    program = "def twice(x): return 0\ndef total(values): return 0"
    assert grader.grade(HUMAN_EVAL, fenced(program)).value == 0.0
    program = "len = range = lambda *_: ()\ndef twice(x): return 0\ndef total(values): return 2 * sum(values)"
    assert grader.grade(HUMAN_EVAL, fenced(program)).value == 1.0


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
        SANITIZED | {"test_imports": ["import no_such_module_anywhere"]},
        SANITIZED | {"test_imports": [5]},
        SANITIZED | {"test_setup_code": {"a": "b = 1"}},
    ],
)
def test_the_tests_own_fault_is_no_zero(grader: CodeGrader, row: dict[str, Any]) -> None:
    score = grader.grade(row, fenced(SANITIZED["code"]))
    assert score.value is None
    assert score.rationale.startswith("tests_error: ")


def test_one_text_stands_for_a_list_of_one(grader: CodeGrader) -> None:
    row = SANITIZED | {"test_imports": "import math", "test_setup_code": ["half = math.pi", "whole = 2 * half"]}
    row["test_list"] = [*row["test_list"], "assert whole > half"]
    assert grader.grade(row, fenced(SANITIZED["code"])).value == 1.0


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


def without_isolation(**options: Any) -> CodeGrader:
    grader = CodeGrader(allow_code_execution=True, **options)
    grader.sandbox = Sandbox(Limits(wall_seconds=5.0), namespaces=False)
    return grader


def test_another_permission_is_needed_without_isolation() -> None:
    with pytest.raises(InputError, match="--allow_no_isolation true") as raised:
        without_isolation().grade(HUMAN_EVAL, BODY)
    assert "switched off" in str(raised.value)
    for words in (
        "run --allow_code_execution true --allow_no_isolation=true",
        "--allow_code_execution run --allow_no_isolation",
    ):
        options = parse_options(words.split())
        grader = CodeGrader.from_options(vars(options))
        assert grader is not None
        assert (options.runs, grader.allowed, grader.allow_no_isolation) == (["run"], True, True)
    assert not parse_options(["run", "--allow_code_execution", "false"]).allow_code_execution
    assert without_isolation(allow_no_isolation=True).grade(HUMAN_EVAL, BODY).value == 1.0


def test_a_sandbox_that_fails_is_no_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgd_lightning.scoring.sandbox.JAIL", Path("/nowhere"))
    score = without_isolation(allow_no_isolation=True).grade(HUMAN_EVAL, BODY)
    assert score.value is None
    assert score.rationale.startswith("sandbox_error")


# What a plain interpreter does: a program, and tests of it that pass; their failing is tested by turning them round.

VALUES = """
import dataclasses, datetime, decimal, enum, fractions, sys
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
import numpy as np

@dataclasses.dataclass
class Point:
    x: int
Pair = namedtuple("Pair", "a b")
class Colour(enum.IntEnum):
    RED = 3
class Odd(Exception): pass

def same(x): return x
def numbers(): return [np.int64(3), np.float64(0.5)]
def truth(x): return np.all(np.array(x) > 0)
def half(): return fractions.Fraction(1, 2)
def tenth(): return decimal.Decimal("0.1")
def day(): return datetime.date(2024, 2, 29)
def counted(text): return Counter(text)
def queue(values): return deque(values)
def huge(n): return 10**n
def append(values): values.append(1)
def odd(): raise Odd("no")
def count(n): yield from range(n)
def module(): return sys.modules[__name__].same
"""
PASSING = [
    "assert numbers() == [3, 0.5] and isinstance(numbers()[1], float) and not isinstance(numbers()[0], int)",
    "assert truth([1, 2])",
    "assert half() == 0.5 and half() > 0.25 and type(half() + 1).__name__ == 'Fraction'",
    "assert tenth() * 3 == tenth() + tenth() + tenth() and tenth() != 0.1",
    "assert day() < day().replace(month=3) and day().isoformat() == '2024-02-29'",
    "assert counted('aab') == {'a': 2, 'b': 1} and counted('a')['z'] == 0",
    "assert queue([1, 2]) != [1, 2] and list(queue([1, 2])) == [1, 2]",
    "assert huge(4000) == 10**4000 and huge(4000) % 7 == pow(10, 4000, 7)",
    "values = [0]\nappend(values)\nassert values == [0, 1]",
    "try:\n    odd()\nexcept Odd as error:\n    assert str(error) == 'no'\nelse:\n    assert False",
    "assert list(count(3)) == [0, 1, 2] and count(3) != [0, 1, 2]",
    "assert Point(1) == Point(1) and {same(Pair(1, 2))} == {(1, 2)} and Colour.RED == 3",
    "assert module() is same",
]
TURNED = "try:\n    {}\nexcept AssertionError: pass\nelse: raise ValueError"
FAILING = ["assert truth([1, -1])", "assert half() == 0.3", "assert numbers()[0] != 3", "assert 3 not in numbers()"]


def test_values_are_what_they_are_in_a_plain_interpreter(grader: CodeGrader, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = PASSING + [TURNED.format(test) for test in FAILING]
    plain = ModuleType("plain")
    monkeypatch.setitem(sys.modules, "plain", plain)
    for source in (VALUES, *tests):
        exec(source, plain.__dict__)
    row = {"code": VALUES, "test_list": tests}
    score = grader.grade(row, fenced(VALUES))
    assert score.value == 1.0, score
    for test in FAILING[:2]:
        assert grader.grade(row | {"test_list": [test]}, fenced(VALUES)).rationale == f"AssertionError; in {test}"


SURROUNDINGS = """
import __main__, concurrent.futures, os, sys, threading

def spin():
    while True: pass
threading.Thread(target=spin, daemon=True).start()
threading.Thread(target=threading.Event().wait).start()
for _ in range(20000): print("x" * 50, file=sys.stderr)
sys.setrecursionlimit(10**6)
open("scratch", "w").write("here")

def main(): return __name__ == "__main__"
def asked():
    try: return input()
    except EOFError: return "nothing"
def squares(n):
    with concurrent.futures.ThreadPoolExecutor() as pool: return [*pool.map(lambda x: x * x, range(n))]
def depth(n): return 0 if n == 0 else 1 + depth(n - 1)
def scratch(): return open("scratch").read(), os.listdir(), sys.stdin.read(), sys.argv, __main__.depth is depth
if main(): raise SystemExit
"""


def test_surroundings_are_those_of_a_plain_interpreter(grader: CodeGrader) -> None:
    tests = [
        "assert not main()",
        "assert asked() == 'nothing'",
        "assert squares(3) == [0, 1, 4]",
        "assert depth(20000) == 20000",
        "assert scratch() == ('here', ['scratch'], '', [''], True)",
    ]
    score = grader.grade({"code": SURROUNDINGS, "test_list": tests}, fenced(SURROUNDINGS))
    assert score.value == 1.0, score


def test_what_a_program_has_to_define(grader: CodeGrader) -> None:
    """What the tests use of the row's own code; a program that lacks it is wrong, also where Python knows the name."""
    code = (
        "from math import gcd, pi\ndef gcd(a, b): ...\ndef max(a, b): ...\nleft, right = 1, 2\nfor last in 1, 2: pass"
    )
    row = {
        "code": code,
        "test_list": ["assert gcd(4, 6) == 2", "assert max(1, 2) == 2", "assert pi > 3 == left + last"],
    }
    assert task_of(row, challenge=False)["names"] == ["gcd", "last", "left", "max"]
    program = "from math import gcd\ndef max(a, b): return (a + b + abs(a - b)) // 2\nleft, last = 1, 2"
    assert grader.grade(row, fenced(program)).value == 1.0
    for line in ("from math import gcd", "def max(a, b): return (a + b + abs(a - b)) // 2"):
        assert "NameError" in grader.grade(row, fenced(program.replace(line, "gcd_ = None"))).rationale


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows", "solution"), [("HumanEval", 164, "canonical_solution"), ("MBPP", 974, "code")]
)
def test_reference_solutions(bench_data: Path, grader: CodeGrader, name: str, rows: int, solution: str) -> None:
    with gzip.open(bench_data / f"{name}.jsonl.gz", "rt") as file:
        problems = [json.loads(line) for line in file]
    assert len(problems) == rows
    answers = [row[solution] if name == "HumanEval" else fenced(row[solution]) for row in problems]
    with ThreadPoolExecutor(2) as threads:
        scores = threads.map(grader.grade, problems, answers)
    assert [row["task_id"] for row, score in zip(problems, scores, strict=True) if score.value != 1.0] == []


def test_a_stopped_grader_kills_what_runs_and_scores_nothing() -> None:
    grader = CodeGrader(allow_code_execution=True)
    threading.Timer(0.5, grader.stop).start()
    stored = time.monotonic()
    with pytest.raises(RuntimeError, match="stopped while a program ran"):
        grader.grade(HUMAN_EVAL, fenced(PROMPT + "    import time\n    time.sleep(80)\n"))
    assert time.monotonic() - stored < 40  # of the 80 that the program sleeps
