"""`CodeGrader`: HumanEval and MBPP, pass@1: does the program in the answer pass the data set's own tests?

Program and tests run in one interpreter, as in the data sets' own harnesses, so numpy's numbers, fractions, changed
arguments and the program's own classes are what they are there. The interpreter is confined (`sandbox.py`); what runs
in it is `jail/runner.py`; what counts as the program of an answer, `jail/completion.py`. The tests are sent only when
the program has run, and a secret behind them, read when the last test has passed, is the only success. What the program
ends, breaks or uses up is its own failure. Which attacks that holds off, and which not: docs/scoring.md.
"""

import ast
import contextlib
import json
import os
import re
import secrets
import socket
import symtable
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

from dgd_lightning.errors import InputError
from dgd_lightning.grader import Grader
from dgd_lightning.jsonl import content_key
from dgd_lightning.scoring.jail.examine import SECRET
from dgd_lightning.scoring.sandbox import END_SECONDS, JAIL, START_SECONDS, Limits, Sandbox, SandboxError
from dgd_lightning.types import Score

OPT_IN = "HF_ALLOW_CODE_EVAL"  # as the Hub's own code metric calls it
LONGEST = 1 << 16  # bytes of a line from the sandbox
SILENT = "the program ended, or broke the tests' channel, before they were through"


class Outcome(NamedTuple):
    """What came of a program and its tests."""

    found: str | None  # how the program was found
    passed: int  # tests, what prepares them included
    failure: str | None  # None where all passed


class CodeGrader(Grader):
    """Runs the answer's program against the row's tests.

    Rows: HumanEval (``prompt, entry_point, test``); MBPP full (``text, code, test_list, test_setup_code``) and
    sanitized (``prompt, code, test_list, test_imports``).

    Args:
        allow_code_execution: you agree to run programs that a model wrote; None reads ``HF_ALLOW_CODE_EVAL=1``.
        allow_no_isolation: you agree to run them also where the kernel isolates neither files, network nor processes.
        limits: of a program and its tests.
        challenge: MBPP's ``challenge_test_list`` must pass too; the field's numbers are without.
        workers: rows graded at once.
    """

    name = "code"

    def __init__(
        self,
        *,
        allow_code_execution: bool | None = None,
        allow_no_isolation: bool = False,
        limits: Limits | None = None,
        challenge: bool = False,
        workers: int = 1,
    ) -> None:
        self.allowed = os.environ.get(OPT_IN) == "1" if allow_code_execution is None else allow_code_execution
        self.allow_no_isolation = allow_no_isolation
        self.limits, self.challenge, self.workers = limits or Limits(), challenge, workers
        self.sandbox = Sandbox(self.limits)
        self._stopped = False
        self._waiting: set[socket.socket] = set()  # for verdicts

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self | None:
        found = cls(
            allow_code_execution=options["allow_code_execution"] or None,
            allow_no_isolation=options["allow_no_isolation"],
            workers=options["code_workers"],
        )
        return found if found.allowed or not options.get("leave") else None

    def takes(self, row: dict[str, Any]) -> bool:
        tests = row.get("test_list")
        texts = isinstance(tests, list) and bool(tests) and all(isinstance(test, str) for test in tests)
        return (texts and isinstance(row.get("code"), str)) or _is_human_eval(row)

    def grade(self, row: dict[str, Any], answer: str) -> Score:
        """See `Grader.grade`; ``details`` says what was isolated, how the program was found, and how it ended."""
        if not self.allowed:
            raise InputError(
                "code execution",
                expected="your permission: grading runs programs that a model wrote",
                received=f"neither {OPT_IN}=1 nor allow_code_execution=True",
                hint=f"use a machine you can spare, read docs/scoring.md, then set {OPT_IN}=1",
            )
        isolation = self.sandbox.isolation
        if not (isolation["files"] or self.allow_no_isolation):
            raise InputError(
                "code execution",
                expected="a kernel that isolates programs (Linux namespaces)",
                received=f"none ({isolation['reason']}): they could read, delete and send the files of this user",
                hint="use a machine or container that you can spare, and --allow_no_isolation true "
                "(CodeGrader(allow_no_isolation=True))",
            )
        begin = time.monotonic()
        try:
            task = task_of(row, challenge=self.challenge)
            outcome, end = self._run(task, answer)
        except (SandboxError, OSError) as error:
            return Score(None, [], f"sandbox_error: {error}")
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            return Score(None, [], f"tests_error: {type(error).__name__}: {error}")
        details = {
            "passed": max(0, outcome.passed - task["setup"]),
            "tests": len(task["tests"]) - task["setup"],
            "found": outcome.found,
            "ended": end,
            "seconds": round(time.monotonic() - begin, 3),
            "isolation": isolation,
        }
        if outcome.failure is None:
            return Score(1.0, [], "every test passes", details)
        if outcome.failure is SILENT and end == "unknown":  # its warden was killed, as where the machine lacks memory
            return Score(None, [], "sandbox_error: the program was ended from outside", details)
        reason = outcome.failure if end in ("exit", "released") else f"{outcome.failure}; ended: {end}"
        return Score(0.0, [], reason, details)

    def fingerprint(self) -> dict[str, Any]:
        return {
            "grader": self.name,
            "rules": content_key(*(path.read_text("utf-8") for path in sorted(JAIL.glob("*.py")))),
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

    def _run(self, task: dict[str, Any], answer: str) -> tuple[Outcome, str]:
        """What came of an answer, and how its process ended; raises ValueError for the tests' own fault."""
        cell = self.sandbox.start()
        self._waiting.add(cell.channel)
        try:
            if not self._stopped:
                outcome = self._outcome(cell.channel, task, answer)
        finally:
            self._waiting.discard(cell.channel)
            end = cell.end()
            if self._stopped:
                raise RuntimeError("stopped while a program ran")
        return outcome, end

    def _outcome(self, channel: socket.socket, task: dict[str, Any], answer: str) -> Outcome:
        """The conversation that `jail/runner.py` describes. What comes after "ready" may be of the program's making."""
        with channel.makefile("rb") as lines:
            channel.settimeout(START_SECONDS)
            order = {key: task[key] for key in ("prelude", "prompt", "names")}
            _send(channel, json.dumps({**order, "answer": answer}).encode())
            words = _words(lines.readline(LONGEST))
            if "failure" in words:
                raise ValueError(f"what the tests need can't be run: {words['failure']}")
            if "ready" not in words:
                raise SandboxError("the interpreter for the program has ended")
            channel.settimeout(self.limits.wall_seconds + END_SECONDS)  # the warden ends it before
            found, words = None, {}
            with contextlib.suppress(OSError):
                words = _words(lines.readline(LONGEST))
                if "found" in words:
                    found, secret = str(words.pop("found"))[:100], secrets.token_hex(SECRET // 2).encode()
                    _send(channel, "\0".join(task["tests"]).encode("utf-8", "surrogatepass"), secret)
                    line = lines.readline(LONGEST)
                    if line == secret + b"\n":
                        return Outcome(found, len(task["tests"]), None)
                    words = _words(line)
        passed, failure = words.get("passed", 0), words.get("failure")
        counted = isinstance(passed, int) and passed in range(len(task["tests"]))
        return Outcome(found, passed if counted else 0, str(failure)[:2000] if failure else SILENT)


def _send(channel: socket.socket, message: bytes, behind: bytes = b"") -> None:
    """A message as `jail/runner.py` reads it, and what is read on its own."""
    channel.sendall(len(message).to_bytes(8, "big") + message + behind)


def _words(line: bytes) -> dict[str, Any]:
    """What a line from the sandbox says; nothing where it is none."""
    try:
        words = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return words if isinstance(words, dict) else {}


def _is_human_eval(row: dict[str, Any]) -> bool:
    return all(isinstance(row.get(key), str) for key in ("prompt", "entry_point", "test"))


def _sources(row: dict[str, Any], name: str) -> list[str]:
    """The texts in a field that holds one or several, or nothing; raises ValueError for anything else."""
    value = row.get(name) or []
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} holds something else than texts")
    return texts


def task_of(row: dict[str, Any], *, challenge: bool) -> dict[str, Any]:
    """What the runner needs of a row.

    The tests have a namespace of their own: what the row itself gives them, and of the program the names that it has to
    define. So what else a program defines (its own version of a helper of the prompt, a variable ``len``) does not
    change the tests. HumanEval's prompts define such helpers before their function (``poly``, ``encode_shift``).
    MBPP's tests may use modules that the row's own ``code`` imports; the program has to define what ``code`` defines
    and the tests use.

    Returns:
        ``prelude``: trusted sources; ``names``: what tests ask of the program; ``tests``, of which the first
        ``setup`` only prepare; ``prompt``: the program's first part, or "".

    Raises:
        ValueError, SyntaxError: the row's tests or code can't be read.
    """
    if _is_human_eval(row):
        prompt, name = row["prompt"], row["entry_point"]
        function = re.search(rf"^(?:async\s+)?def\s+{re.escape(name)}\b", prompt, re.M)
        prelude = [prompt[: function.start()]] if function else []
        tests = [f"{row['test']}\n\ncheck({name})\n"]
        ast.parse(tests[0])  # a test that is no Python is no fault of the program's
        return {"prelude": prelude, "names": [name], "tests": tests, "setup": 0, "prompt": prompt}
    setup = [text for text in _sources(row, "test_setup_code") if text.strip()]
    tests = [*setup, *row["test_list"], *(_sources(row, "challenge_test_list") if challenge else ())]
    used = {node.id for test in tests for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Name)}
    statements: dict[bool, list[ast.stmt]] = {True: [], False: []}
    for statement in ast.parse(row["code"]).body:
        statements[isinstance(statement, ast.Import | ast.ImportFrom)].append(statement)
    defined = symtable.symtable(ast.unparse(ast.Module(statements[False], [])), "<code>", "exec").get_symbols()
    names = sorted(used & {symbol.get_name() for symbol in defined if symbol.is_assigned()})
    if not names:
        raise ValueError("the tests use nothing that the row's code defines")
    prelude = [*_sources(row, "test_imports"), *map(ast.unparse, statements[True])]
    return {"prelude": prelude, "names": names, "tests": tests, "setup": len(setup), "prompt": ""}
