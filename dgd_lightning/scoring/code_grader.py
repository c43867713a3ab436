"""`CodeGrader`: HumanEval and MBPP, pass@1: does the program in the answer pass the data set's own tests?

A program that runs in one interpreter with its tests can always forge their verdict: it can patch ``assert``'s helpers,
walk the frames, read the sentinel from memory or simply exit with success. So tests and program never share one:

    grader ─► examiner: prompt's helpers, tests, verdict        (sandbox 1)
                 ▲ │ plain values, as JSON lines
                 │ ▼
              candidate: finds the program in the answer,
                         runs it, answers single calls          (sandbox 2)

The program sees single calls of its functions, never a test, an expected value or the verdict's channel, and what it
answers reaches the tests as objects of built-in types. All that it can send is answers: to pass, they must be right.
What it ends, breaks or uses up is its own failure. The sandboxes are described in `sandbox.py`, what counts as the
program of an answer in `jail/completion.py`.

Two things differ from one shared interpreter: a function that changes its arguments in place changes copies (no test
of HumanEval or MBPP looks at them afterwards), and an object of the program's own class is equal to itself alone.
"""

import ast
import contextlib
import os
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any, Self

from dgd_lightning.errors import InputError
from dgd_lightning.grader import Grader
from dgd_lightning.scoring.jail.wire import Channel
from dgd_lightning.scoring.sandbox import START_SECONDS, Cell, Limits, Sandbox, SandboxError
from dgd_lightning.types import Score

OPT_IN = "HF_ALLOW_CODE_EVAL"  # as the Hub's own code metric calls it


class CodeGrader(Grader):
    """Runs the answer's program against the row's tests.

    Rows: HumanEval (``prompt, entry_point, test``); MBPP full (``text, code, test_list, test_setup_code``) and
    sanitized (``prompt, code, test_list, test_imports``).

    Args:
        allow_code_execution: you agree to run programs that a model wrote; None reads ``HF_ALLOW_CODE_EVAL=1``.
        limits: of a program; and of its tests.
        challenge: MBPP's ``challenge_test_list`` must pass too; the field's numbers are without.
        workers: rows graded at once.
        namespaces: False does without them; None uses them where the kernel allows.
    """

    name = "code"

    def __init__(
        self,
        *,
        allow_code_execution: bool | None = None,
        limits: Limits | None = None,
        challenge: bool = False,
        workers: int = 1,
        namespaces: bool | None = None,
    ) -> None:
        self.allowed = os.environ.get(OPT_IN) == "1" if allow_code_execution is None else allow_code_execution
        self.limits, self.challenge, self.workers = limits or Limits(), challenge, workers
        self.sandbox = Sandbox(self.limits, namespaces=namespaces)
        self._stopped = False
        self._waiting: set[socket.socket] = set()  # for verdicts

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self | None:
        found = cls(allow_code_execution=options["allow_code_execution"] or None, workers=options["code_workers"])
        return found if found.allowed or not options.get("leave") else None

    def takes(self, row: dict[str, Any]) -> bool:
        tests = row.get("test_list")
        mbpp = isinstance(tests, list) and bool(tests) and all(isinstance(test, str) for test in tests)
        return mbpp or _is_human_eval(row)

    def grade(self, row: dict[str, Any], answer: str) -> Score:
        """See `Grader.grade`; ``details`` says what was isolated, how the program was found, and how it ended."""
        if not self.allowed:
            raise InputError(
                "code execution",
                expected="your permission: grading runs programs that a model wrote",
                received=f"neither {OPT_IN}=1 nor allow_code_execution=True",
                hint=f"use a machine you can spare, read docs/scoring.md, then set {OPT_IN}=1",
            )
        begin = time.monotonic()
        try:
            task = task_of(row, challenge=self.challenge)
            verdict, ends = self._examine({**task, "answer": answer})
        except (SandboxError, OSError, ValueError, SyntaxError, RecursionError, MemoryError) as error:
            return Score(None, [], f"sandbox_error: {type(error).__name__}: {error}")
        failure = verdict["failure"] if verdict else "no verdict in time"
        if verdict and failure is not None and verdict["fault"] == "tests":
            return Score(None, [], f"tests_error: {failure}")
        details = {
            "passed": verdict["passed"] if verdict else 0,
            "tests": len(task["tests"]) - task["setup"],
            "found": verdict["found"] if verdict else None,
            "ended": ends,
            "seconds": round(time.monotonic() - begin, 3),
            "isolation": self.sandbox.isolation,
        }
        if failure is None:
            return Score(1.0, [], "every test passes", details)
        if verdict is None and ends["tests"] == "unknown":  # its warden was killed, as where the machine lacks memory
            return Score(None, [], "sandbox_error: the tests were ended from outside", details)
        limits = sorted({end for end in ends.values() if end not in ("exit", "released")})
        return Score(0.0, [], "; ".join([failure, *(f"ended: {end}" for end in limits)]), details)

    def fingerprint(self) -> dict[str, Any]:
        return {
            "grader": self.name,
            "python": ".".join(map(str, sys.version_info[:3])),
            "limits": self.limits._asdict(),
            "challenge": self.challenge,
            "isolation": self.sandbox.isolation if self.allowed else None,
        }

    def stop(self) -> None:
        """See `Grader.stop`: programs that run are killed, and have no score."""
        self._stopped = True
        for control in tuple(self._waiting):
            with contextlib.suppress(OSError):
                control.shutdown(socket.SHUT_RDWR)

    def _examine(self, task: dict[str, Any]) -> tuple[dict[str, Any] | None, dict[str, str]]:
        """The examiner's verdict (None: none came in time), and how both cells ended."""
        control, examiner_control = socket.socketpair()
        examiner_side, candidate_side = socket.socketpair()
        cells: dict[str, Cell] = {}
        verdict = None
        self._waiting.add(control)
        try:
            with examiner_control, examiner_side, candidate_side:
                cells["tests"] = self.sandbox.start("examiner.py", [examiner_control, examiner_side])
                cells["program"] = self.sandbox.start("candidate.py", [candidate_side])
            for cell in cells.values():
                cell.started()
            channel = Channel(control)
            control.settimeout(START_SECONDS)
            try:
                channel.send(task)
                channel.receive()
            except (OSError, EOFError) as error:
                raise SandboxError(f"the tests did not start: {error}") from error
            control.settimeout(self.limits.wall_seconds)
            with contextlib.suppress(OSError, EOFError):  # killed at a limit, which the program made it reach
                verdict = channel.receive()
        finally:
            self._waiting.discard(control)
            ends = {name: cell.end() for name, cell in cells.items()}
            control.close()
        if self._stopped:
            raise RuntimeError("stopped while a program ran")
        return verdict, ends


def _is_human_eval(row: dict[str, Any]) -> bool:
    return all(isinstance(row.get(key), str) for key in ("prompt", "entry_point", "test"))


def task_of(row: dict[str, Any], *, challenge: bool) -> dict[str, Any]:
    """What the examiner needs of a row.

    HumanEval's prompt runs in the examiner too, with the function's empty body: some tests use the helpers that it
    defines (``poly``, ``encode_shift``), and a program must not be able to bring its own. The names that MBPP's tests
    ask of the program are those that the row's own ``code`` defines and the tests use; modules that this code imports
    may be used by the tests.

    Returns:
        ``prelude``: trusted sources; ``names``: what tests ask of the program; ``tests``, of which the first
        ``setup`` only prepare; ``prompt``: the program's first part, or "".

    Raises:
        ValueError, SyntaxError: the row's tests or code can't be read.
    """
    if _is_human_eval(row):
        prompt, name = row["prompt"], row["entry_point"]
        tests = [f"{row['test']}\n\ncheck({name})\n"]
        return {"prelude": [prompt], "names": [name], "tests": tests, "setup": 0, "prompt": prompt}
    setup = [row["test_setup_code"]] if str(row.get("test_setup_code") or "").strip() else []
    tests = [*setup, *row["test_list"], *((row.get("challenge_test_list") or []) if challenge else [])]
    used = {node.id for test in tests for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Name)}
    prelude, names = list(row.get("test_imports") or []), []
    for statement in ast.parse(row["code"].replace("\r\n", "\n")).body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            prelude.append(ast.unparse(statement))
        elif isinstance(statement, ast.FunctionDef | ast.ClassDef):
            names.append(statement.name)
        elif isinstance(statement, ast.Assign):
            names += [target.id for target in statement.targets if isinstance(target, ast.Name)]
    names = sorted(used & set(names))
    if not names:
        raise ValueError("the tests use nothing that the row's code defines")
    return {"prelude": prelude, "names": names, "tests": tests, "setup": len(setup), "prompt": ""}
