"""Equality of results, the processes that compare them, and real data sets where there are such."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from dgd_lightning.scoring import math_grader
from dgd_lightning.scoring.math_grader import MathGrader, MathPool

GSM = {"question": "How many?", "answer": "She has 9 * 8 = <<9*8=72>>72.\n#### 72"}


@pytest.fixture(scope="module")
def grader() -> Iterator[MathGrader]:
    grader = MathGrader(workers=1, seconds=30.0)  # one process: each imports sympy for itself
    yield grader
    grader.close()


def value(grader: MathGrader, gold: str, answer: str) -> float | None:
    return grader.grade({"problem": "?", "answer": gold}, answer).value


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
        ("The answer is 72.0, or 6 dozen.", 1.0),
        (r"The answer is $\frac{144}{2}$ dollars in 3 days.", 1.0),
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
    ("864 \\mbox{ inches}^2", r"864 \text{ in}^2"),  # text and units
    ("12", r"12 \frac{\text{m}}{\text{s}}"),
    ("12", r"\text{The answer is } 12"),
    ("12", r"\text{Yes, 12.}"),
    ("12", r"\begin{aligned} x &= 3 \cdot 4 \\ &= 12 \end{aligned}"),
    (r"\text{(C)}", r"\textbf{(C)} 5"),
    (r"\text{(C)}", r"\text{(C) Vitamin D}"),
    (r"\text{ellipse}", r"\text{An ellipse.}"),
    (r"90^\circ", "90°"),  # degrees
    ("90", r"90\degree"),
    (r"30^\circ, 150^\circ", r"150^\circ \text{ and } 30^\circ"),
    (r"2\sqrt{3}", "2√3"),  # roots
    (r"\sqrt{51}", r"\sqrt 51"),
    (r"\sqrt[3]{2}", "∛2"),
    (r"1 \pm \sqrt{19}", r"1-\sqrt{19}, 1+\sqrt{19}"),
    (r"\emptyset", r"\varnothing"),  # the empty set
    (r"\varnothing", r"\{ \}"),
    (r"\emptyset", r"\text{the empty set}"),
    ("e^2", r"\mathrm{e}^2"),  # upright letters
    ("2e", r"2\text{e}"),
    ("3+4i", r"3+4\mathrm{i}"),
    (r"\sin x", r"\mathrm{sin}\, x"),
    (r"2\pi", "2π"),
    ("x^2", "x²"),
    ("0.0000001", "10^{-7}"),  # exact numbers
    (".0000672", r"6.72 \times 10^{-5}"),
    ("10^{-7}", "1e-7"),
    (r"\frac{1}{6}", r"0.1\overline{6}"),
    ("2^{100}", "1267650600228229401496703205376"),
    ("4210_{5}", "4210_5"),  # bases
    ("4210_{5}", r"(4210)_{\text{five}}"),
    ("4210_{5}", r"4210 \text{ (base 5)}"),
    ("2A_{16}", r"\text{2A}_{16}"),
    ("101_2, 110_2", "110₂, 101₂"),
    ("5", "5_{10}"),
    ("137 \\frac{1}{2}", "137½"),  # numbers
    ("10080", "10 080"),
    ("(3,4]", r"3 < x \leq 4"),  # sets
    (r"(-\infty, 2) \cup (3, \infty)", r"x<2 \text{ or } x>3"),
    (r"x \in [-2,7]", r"-2 \le x \le 7"),
    (r"(-\infty, 2) \cup (3, 5)", r"x<2 \text{ or } 3<x<5"),
    ("(3,500)", "(3, 500)"),
    ("(15,-29)", "x=15, y=-29"),
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
    ("0.0000001", "10^{-8}"),  # these pass for equal in math-verify
    (".0000672", r"6.73 \times 10^{-5}"),
    (r"10^{-20}\sqrt{2}", r"10^{-20}\sqrt{3}"),
    ("(0.0000001, 1)", "(0.0000002, 1)"),
    (r"\{0.0000001\}", r"\{10^{-8}\}"),
    (r"\begin{pmatrix} 0.0000001 \\ 1 \end{pmatrix}", r"\begin{pmatrix} 0.0000002 \\ 1 \end{pmatrix}"),
    ("1/3", "0.333333333"),
    (r"\pi", "3.141592653589793"),
    ("e", "2.718281828"),
    ("4210_{5}", "4210_6"),
    ("4210_{5}", "4210_{10}"),
    ("101_2, 110_2", "110_3, 101_3"),
    ("-101_2", "101_2"),
    ("5", "101_2"),
    ("5", "5_8"),
    ("0.101_2", "0.101_3"),
    ("R - r", "r - R"),
    ("3R^2", "3r^2"),
    ("-2,1", "(-2,1)"),
    ("(2,4)", r"\{2,4\}"),
    ("0", r"\emptyset"),
    (r"\emptyset", r"\{\emptyset\}"),
    (r"\text{(C)}", r"\text{Cat}"),
    (r"\text{(C)}", r"\text{(C), (D)}"),
    (r"\text{(C)}", r"\text{C and D}"),
    (r"\text{(C)}", r"\text{(C)} (D)"),
    ("12", r"\text{12 or 13}"),
    ("1,-2", "-2"),
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
    assert grader.takes({"prompt": {"messages": [{"role": "user", "content": "?"}]}, "answer": "1", "source": "math"})
    assert grader.takes({"problem": "?", "answer": 1})  # a number in JSON
    assert grader.grade({"problem": "?", "answer": 0.5}, "It is \\boxed{1/2}.").value == 1.0
    assert grader.grade({"problem": "?", "answer": 7}, "It is \\boxed{8}.").value == 0.0
    assert not grader.takes({"problem": "?", "answer": True})
    assert not grader.takes({"problem": "?", "answer": float("nan")})  # as tables write what is missing
    assert not grader.takes({"prompt": "?", "answer": "1", "source": "trivia"})
    assert not grader.takes({"question": "?", "answer": "no mark"})
    assert not grader.takes({"messages": [], "rubrics": []})
    assert not grader.takes({"question": 1, "answer": None})
    for gold in ("twelve", ""):  # no answer could be right, and zeros would not say so
        assert grader.grade({"question": "?", "answer": f"#### {gold}"}, "#### 12").value is None


# Processes that hang or are killed; not math-verify's, which take two seconds of processor time to start.

STAND_IN = """
import json, signal, sys
print("{}", flush=True)
for line in sys.stdin:
    signal.setitimer(signal.ITIMER_PROF, float(sys.argv[2]))
    question = json.loads(line)
    while question["answer"] == "hang":
        pass
    signal.setitimer(signal.ITIMER_PROF, 0)
    print(json.dumps({"equal": question["gold"] == question["answer"]}), flush=True)
"""


def workers() -> list[psutil.Process]:
    """Those of `pool`, told from others by their memory."""
    return [child for child in psutil.Process().children() if child.cmdline()[-2:-1] == ["1025"]]


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MathPool]:
    program = tmp_path / "worker.py"
    program.write_text(STAND_IN)
    monkeypatch.setattr(math_grader, "WORKER", program)
    pool = MathPool(size=2, seconds=0.5, memory_mb=1025)
    yield pool
    pool.close()
    assert not workers()


def test_a_hanging_worker_is_killed_and_replaced(pool: MathPool) -> None:
    assert pool.compare("2", "2")["equal"] is True
    (first,) = workers()
    reply = pool.compare("7x", "hang")
    assert reply == {"equal": False, "error": "no result in 0.5 s"}
    assert not first.is_running()
    assert pool.compare("7x", "7x")["equal"] is True  # by a new one


def test_a_worker_killed_from_outside_is_no_fault_of_the_answer(pool: MathPool) -> None:
    assert pool.compare("2", "2")["equal"] is True
    (idle,) = workers()
    idle.kill()
    while idle.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert pool.compare("7x", "7x")["equal"] is True  # by a new one
    (idle,) = workers()
    idle.send_signal(signal.SIGUSR1)  # as a batch system does before a job's end
    assert pool.compare("7x", "7x")["equal"] is True  # by a new one

    killed: list[int] = []

    def kill_once() -> None:
        (busy,) = workers()
        time.sleep(0.2)  # it has the question by now
        killed.append(busy.pid)
        busy.kill()

    killer = threading.Thread(target=kill_once)
    killer.start()
    reply = pool.compare("7x", "hang")  # would take the whole limit
    killer.join()
    assert killed
    assert reply == {"equal": False, "error": "no result in 0.5 s"}  # the next worker's word


def test_workers_killed_one_after_the_other_give_no_score(pool: MathPool, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_nothing_is_evaluated(grader: MathGrader, tmp_path: Path) -> None:
    for text in ("__import__('os').mkdir('{}')", "eval(\"__import__('os').mkdir('{}')\")"):
        assert grader.pool.compare("7", text.replace("{}", str(tmp_path / "made")))["equal"] is False
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("answer", ["\x00", "\ud800", "}{", "{" * 50, r"\frac{" * 30, "$" * 500, "𝟙" * 50])
def test_broken_latex_is_no_answer(grader: MathGrader, answer: str) -> None:
    assert value(grader, "7x", rf"\boxed{{{answer}}}") == 0.0


def test_threads_share_the_workers(pool: MathPool) -> None:
    pairs = [(f"{n}x", f"{n + n % 3}x") for n in range(1, 31)]
    with ThreadPoolExecutor(6) as threads:
        replies = [*threads.map(lambda pair: pool.compare(*pair)["equal"], pairs)]
    assert replies == [n % 3 == 0 for n in range(1, 31)]
    assert 1 <= len(workers()) <= 2


def test_hanging_answers_in_threads_hinder_no_other(pool: MathPool) -> None:
    pairs = [("7x", "hang"), ("7x", "7x")] * 2
    with ThreadPoolExecutor(4) as threads:
        assert [*threads.map(lambda pair: pool.compare(*pair)["equal"], pairs)] == [False, True] * 2


def test_math_verify_itself_is_stopped() -> None:
    pool = MathPool(size=1, seconds=0.5, memory_mb=1024)
    try:
        assert pool.compare("7x", "9^{9^{9^9}}") == {"equal": False, "error": "no result in 0.5 s"}
    finally:
        pool.close()


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
        for answer in (row["answer"], f"The answer is {golds[place]:,}. That took 3 steps."):
            assert grader.grade(row, answer).value == 1.0
        for shift in (SHIFTS[(place + turn) % 3] for turn in range(shifts)):
            other = (place + shift) % len(rows)
            assert grader.grade(row, rows[other]["answer"]).value == float(golds[place] == golds[other])


@pytest.mark.slow
def test_math_gold_answers(bench_data: Path, grader: MathGrader) -> None:
    rows = json.loads((bench_data / "MATH500.json").read_text())
    assert len(rows) == 500
    for place, row in enumerate(rows):
        assert grader.takes(row)
        for answer in (
            rf"\boxed{{{row['answer']}}}",
            f"The answer is ${row['answer']}$, as shown. It took $3$ steps.",
        ):
            assert value(grader, row["answer"], answer) == 1.0, answer
        other = rows[(place + 17) % len(rows)]["answer"]
        same = row["answer"] == other or {row["answer"], other} == {"5", "x=5"}
        assert value(grader, row["answer"], rf"\boxed{{{other}}}") == float(same), (row["answer"], other)
