"""Final results and their equality: known pairs, hostile input, and real data sets where there are such."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import psutil
import pytest

from dgd_lightning.scoring.final_answer import final_answer, plain_number
from dgd_lightning.scoring.math_grader import WORKER, MathGrader, MathPool

GSM = {"question": "How many?", "answer": "She has 9 * 8 = <<9*8=72>>72.\n#### 72"}


@pytest.fixture(scope="module")
def grader() -> Iterator[MathGrader]:
    grader = MathGrader(workers=2, seconds=30.0)
    yield grader
    grader.close()


def value(grader: MathGrader, gold: str, answer: str) -> float | None:
    return grader.grade({"problem": "?", "answer": gold}, answer).value


@pytest.mark.parametrize(
    ("answer", "number", "found", "place"),
    [
        (r"\boxed{1} no, \boxed{\frac{1}{\sqrt{2}}}", False, r"\frac{1}{\sqrt{2}}", "boxed"),
        (r"\boxed{5} and then \boxed{}", False, "5", "boxed"),  # an empty one does not count
        (r"\boxed{5} and then \boxed{6", False, "5", "boxed"),  # nor one that is cut off
        (r"\boxed 7", False, "7", "boxed"),
        (r"\boxed{\{1, 2\}}", False, r"\{1, 2\}", "boxed"),
        ("<think>\\boxed{1}</think> The answer is 2.", False, "2", "said"),
        ("2 + 2\n#### 4\nSo 5.", True, "4", "####"),
        ("The answer is 9 * 2 = $18.50, as asked. It took 3 days.", True, "18.50", "said"),
        ("**Final Answer:** **$1,234**", True, "1234", "said"),
        ("Answer: 18 dollars", True, "18", "said"),
        ("First 5 apples, then 1,200.50 pears, so 7 fruits.", True, "7", "number"),
        ("she makes $2,125.", True, "2125", "number"),
        ("from -5 to 3", True, "3", "number"),
        ("so $x = 3$ or $y = 4$ hold", False, "y = 4", "formula"),
        (r"so \[ 2x \] it is", False, "2x", "formula"),
        ("It is Evelyn", False, "It is Evelyn", "last line"),
    ],
)
def test_where_results_stand(answer: str, number: bool, found: str, place: str) -> None:
    assert final_answer(answer, number=number) == (found, place)


def test_no_result() -> None:
    assert final_answer("I do not know.", number=True) is None
    assert final_answer(" \n ", number=False) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$1,234.50", Fraction(2469, 2)),
        (r"\$18", Fraction(18)),
        (r"25\%", Fraction(25)),
        (r"5\text{ inches}", Fraction(5)),
        ("5 cm", Fraction(5)),
        ("1{,}000", Fraction(1000)),
        (r"32,\!348", Fraction(32348)),
        ("-$5", Fraction(-5)),
        ("0.50", Fraction(1, 2)),
        ("x+1", None),
        ("7x", None),
        ("7 x", None),
        ("2 sqrt", None),
        ("1/2", None),
        ("5 and 6", None),
        ("3,4", None),
        ("9" * 10_000, None),
    ],
)
def test_plain_numbers(text: str, expected: Fraction | None) -> None:
    assert plain_number(text) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("#### 72", 1.0),
        (r"\boxed{72}", 1.0),
        (r"So it is \boxed{\$72.00}.", 1.0),
        ("The answer is 72 apples.", 1.0),
        ("She has 72.", 1.0),
        (r"\boxed{\frac{144}{2}}", 1.0),
        ("She has 72 and not 73", 0.0),
        ("#### 7", 0.0),
        ("#### -72", 0.0),
        ("72.5", 0.0),
        ("", 0.0),
    ],
)
def test_gsm8k(grader: MathGrader, answer: str, expected: float) -> None:
    assert grader.takes(GSM)
    assert grader.grade(GSM, answer).value == expected


EQUAL = [
    (r"\frac{1}{2}", r"\dfrac12"),
    (r"\frac{1}{2}", "0.5"),
    ("0.5", "1/2"),
    (r"1\frac{1}{2}", r"\frac32"),
    (r"-\frac{1}{3}", r"\frac{-1}{3}"),
    (r"(-\infty,2]\cup[3,\infty)", r"[3,\infty)\cup(-\infty,2]"),
    (r"x \in [-2,7]", "[-2,7]"),
    (r"\{1,2,3\}", r"\{3,1,2\}"),
    ("1,-2", r"-2 \text{ and } 1"),
    (r"5\text{ inches}", "5"),
    ("5", r"5\text{ inches}"),
    (r"90^\circ", "90"),
    ("90", r"90^\circ"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)"),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"),
    (r"2\sqrt{3}", r"\sqrt{12}"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt 3}"),
    ("x^2+2x+1", "(x+1)^2"),
    ("p - q", "-q + p"),
    ("x=5", "5"),
    ("5", "x=5"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"\text{(C)}", "C"),
    (r"\text{(C)}", r"\textbf{(C)}"),
    (r"\$32,\!348", "32348"),
    (r"50\%", "50"),
    ("2516_8", "2516"),
    ("3+4i", "4i+3"),
]
DIFFERENT = [
    ("x+1", "x-1"),
    (r"\text{east}", "seat"),
    ("0.5", "0.51"),
    ("1/3", "0.33"),
    ("(1,2)", "(2,1)"),
    ("[1,2)", "[1,2]"),
    ("2516_8", "2517_8"),
    (r"\{1,2\}", r"\{1,2,3\}"),
    ("1,2", "1"),
    ("1,2", "12"),
    ("5", "-5"),
    ("C", "B"),
    (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}2&1\end{pmatrix}"),
]


@pytest.mark.parametrize(("gold", "answer"), EQUAL)
def test_equal(grader: MathGrader, gold: str, answer: str) -> None:
    assert value(grader, gold, rf"So it is $\boxed{{{answer}}}$.") == 1.0


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_different(grader: MathGrader, gold: str, answer: str) -> None:
    assert value(grader, gold, rf"So it is $\boxed{{{answer}}}$.") == 0.0


def test_rows() -> None:
    grader = MathGrader()
    assert grader.takes({"problem": "?", "answer": "1", "solution": "", "subject": "", "level": 1, "unique_id": "a"})
    assert grader.takes({"prompt": "?", "answer": "1", "source": "math", "id": "a"})
    assert not grader.takes({"prompt": "?", "answer": "1", "source": "trivia"})
    assert not grader.takes({"question": "?", "answer": "no mark"})
    assert not grader.takes({"messages": [], "rubrics": []})
    assert not grader.takes({"question": 1, "answer": None})


# Hostile input. No test below waits longer for a worker than its pool's limit and the start of a new one.


def workers() -> list[psutil.Process]:
    """Those of `pool`, told from others by their memory."""
    return [child for child in psutil.Process().children() if child.cmdline()[-3:-1] == [str(WORKER), "1025"]]


@pytest.fixture
def pool() -> Iterator[MathPool]:
    pool = MathPool(size=2, seconds=2.0, memory_mb=1025)
    yield pool
    pool.close()
    assert not workers()


def test_a_hanging_worker_is_killed_and_replaced(pool: MathPool) -> None:
    assert pool.compare("2", "2")["equal"] is True
    (first,) = workers()
    reply = pool.compare("7x", "9^{9^{9^9}}")
    assert reply == {"equal": False, "error": "no result in 2 s"}
    assert not first.is_running()
    assert pool.compare("7x", "x \\cdot 7")["equal"] is True  # by a new one


def test_a_worker_killed_from_outside_is_no_fault_of_the_answer(pool: MathPool) -> None:
    assert pool.compare("2", "2")["equal"] is True
    (idle,) = workers()
    idle.kill()
    while idle.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert pool.compare("7x", r"x \cdot 7")["equal"] is True  # by a new one
    (idle,) = workers()
    idle.send_signal(signal.SIGUSR1)  # as a batch system does before a job's end
    assert pool.compare("7x", r"x \cdot 7")["equal"] is True  # by a new one

    killed: list[int] = []

    def kill_once() -> None:
        (busy,) = workers()
        time.sleep(0.5)  # it has the question by now
        killed.append(busy.pid)
        busy.kill()

    killer = threading.Thread(target=kill_once)
    killer.start()
    reply = pool.compare("7x", "9^{9^{9^9}}")  # would take the whole limit
    killer.join()
    assert killed
    assert reply == {"equal": False, "error": "no result in 2 s"}  # the next worker's word


def test_workers_killed_one_after_the_other_give_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    start = MathPool._start

    def doomed(self: MathPool) -> subprocess.Popen[bytes]:
        worker = start(self)
        worker.terminate()
        return worker

    monkeypatch.setattr(MathPool, "_start", doomed)
    grader = MathGrader(workers=1)
    score = grader.grade({"problem": "?", "answer": "7x"}, r"\boxed{x7}")
    grader.close()
    assert score.value is None
    assert score.rationale.startswith("math_error: 3 workers")


def test_a_gold_result_that_nobody_reads_gives_no_score(grader: MathGrader) -> None:
    assert value(grader, "\\", r"\boxed{x7}") is None


def test_nothing_is_evaluated(pool: MathPool, tmp_path: Path) -> None:
    for text in ("__import__('os').mkdir('{}')", "eval(\"__import__('os').mkdir('{}')\")"):
        assert pool.compare("7", text.replace("{}", str(tmp_path / "made")))["equal"] is False
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("answer", ["\x00", "\ud800", "}{", "{" * 200, r"\frac{" * 100, "$" * 500, "𝟙" * 50])
def test_broken_latex_is_no_answer(grader: MathGrader, answer: str) -> None:
    assert value(grader, "7x", rf"\boxed{{{answer}}}") == 0.0


@pytest.mark.parametrize(
    "piece", ["answer is ", "answer is \n", "$", "\\(", "\\boxed{", "1,", "-", "#### ", "1", "\\text{", " *", "-$"]
)
@pytest.mark.parametrize("number", [True, False])
def test_long_answers_take_no_time(piece: str, number: bool) -> None:
    begin = time.process_time()
    final_answer(piece * 50_000, number=number)
    assert time.process_time() - begin < 10  # a pattern that backtracks needs minutes


def test_threads_share_the_workers(pool: MathPool) -> None:
    pairs = [(f"{n}x", f"x \\cdot {n + n % 3}") for n in range(1, 31)]
    with ThreadPoolExecutor(6) as threads:
        replies = [*threads.map(lambda pair: pool.compare(*pair)["equal"], pairs)]
    assert replies == [n % 3 == 0 for n in range(1, 31)]
    assert 1 <= len(workers()) <= 2


def test_hanging_answers_in_threads_hinder_no_other(pool: MathPool) -> None:
    pairs = [("7x", "9^{9^{9^9}}"), ("7x", "x \\cdot 7")] * 2
    with ThreadPoolExecutor(4) as threads:
        assert [*threads.map(lambda pair: pool.compare(*pair)["equal"], pairs)] == [False, True] * 2


# Real data sets.


SHIFTS = (1, 7, 100)  # an answer against the gold one so many places before


@pytest.mark.parametrize("shifts", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_gsm8k_gold_answers(bench_data: Path, grader: MathGrader, shifts: int) -> None:
    """Every answer against its own gold one, and in turn against some other's; all of them take three times as long."""
    rows = [json.loads(line) for line in (bench_data / "gsm8k_test.jsonl").read_text().splitlines()]
    assert len(rows) == 1319
    golds = [int(row["answer"].split("####")[1].replace(",", "")) for row in rows]
    for place, row in enumerate(rows):
        assert grader.takes(row)
        assert grader.grade(row, row["answer"]).value == 1.0
        for shift in (SHIFTS[(place + turn) % 3] for turn in range(shifts)):
            other = (place + shift) % len(rows)
            assert grader.grade(row, rows[other]["answer"]).value == float(golds[place] == golds[other])


@pytest.mark.slow
def test_math_gold_answers(bench_data: Path, grader: MathGrader) -> None:
    rows = json.loads((bench_data / "MATH500.json").read_text())
    assert len(rows) == 500
    for place, row in enumerate(rows):
        assert grader.takes(row)
        assert value(grader, row["answer"], rf"\boxed{{{row['answer']}}}") == 1.0
        other = rows[(place + 17) % len(rows)]["answer"]
        same = row["answer"] == other or {row["answer"], other} == {"5", "x=5"}
        assert value(grader, row["answer"], rf"\boxed{{{other}}}") == float(same), (row["answer"], other)
