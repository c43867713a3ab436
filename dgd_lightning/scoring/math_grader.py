"""`MathGrader`: GSM8K and MATH-500: is the final result of an answer equal to the gold one, as mathematics?"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from typing import Any

from dgd_lightning.errors import InputError
from dgd_lightning.grader import Grader
from dgd_lightning.scoring.final_answer import final_answer, plain_number, words_alone
from dgd_lightning.scoring.math_pool import MathPool, WorkerError
from dgd_lightning.types import Score

RULES = 2  # of what is no score and what is 0: other rules, another number, and answers are graded anew


class MathGrader(Grader):
    """Numbers are compared exactly, words as words, everything else by math-verify in a process of its own.

    Rows: GSM8K (``question``, ``answer`` with ``#### x``); MATH-500 (``problem, answer``, or ``prompt, answer`` with a
    ``source`` that begins with "math").

    Args:
        seconds: of processor time for one comparison; an answer that takes longer is not the gold one.
        memory_mb: address space of a comparing process.
        workers: rows graded at once, and comparing processes.
    """

    name = "math"

    def __init__(self, *, seconds: float = 10.0, memory_mb: int = 2048, workers: int = 2) -> None:
        self.workers = workers
        self.pool = MathPool(workers, seconds, memory_mb)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> MathGrader:
        return cls(workers=options["math_workers"])

    def takes(self, row: dict[str, Any]) -> bool:
        return isinstance(row.get("answer"), str) and (_is_gsm8k(row) or _is_math(row))

    def grade(self, row: dict[str, Any], answer: str) -> Score:
        """See `Grader.grade`; ``details`` says what was found where, and how both were read."""
        number = _is_gsm8k(row)
        gold = row["answer"].rsplit("####", 1)[-1].strip() if number else row["answer"].strip()
        found = final_answer(answer, number=number)
        details: dict[str, Any] = {"gold": gold}
        if found is None:
            return Score(0.0, [], "no result in the answer", details)
        details |= {"found": found.text, "place": found.place}
        equal = _same(gold, found.text)
        if equal is None:
            try:
                reply = self.pool.compare(gold, found.text)
            except WorkerError as error:
                if _version() is None:
                    raise InputError(
                        "grader math",
                        expected="the package math-verify",
                        received="no such package",
                        hint="pip install 'dgd-lightning[math]'",
                    ) from error
                return Score(None, [], f"math_error: {error}", details)
            equal = bool(reply["equal"])
            details["compared"] = {key: value for key, value in reply.items() if key != "equal"}
            if reply.get("gold") == "":
                return Score(None, [], f"math_error: math-verify can't read the gold result {gold}", details)
            if "error" in reply:
                return Score(0.0, [], f"not comparable with {gold}: {reply['error']}", details)
        return Score(float(equal), [], f"{found.text} is {'' if equal else 'not '}{gold}", details)

    def fingerprint(self) -> dict[str, Any]:
        return {"grader": self.name, "rules": RULES, "math_verify": _version(), "seconds": self.pool.seconds}

    def close(self) -> None:
        self.pool.close()


def _version() -> str | None:
    try:
        return importlib.metadata.version("math-verify")
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_gsm8k(row: dict[str, Any]) -> bool:
    return isinstance(row.get("question"), str) and "####" in row["answer"]


def _is_math(row: dict[str, Any]) -> bool:
    source = str(row.get("source") or "").lower()
    return isinstance(row.get("problem"), str) or (isinstance(row.get("prompt"), str) and source.startswith("math"))


def _same(gold: str, found: str) -> bool | None:
    """The verdict where it takes no mathematics; None where it does."""
    if re.sub(r"\s", "", gold) == re.sub(r"\s", "", found):
        return True
    number, other = plain_number(gold), plain_number(found)
    if number is not None and other is not None:
        return number == other
    word = words_alone(gold)
    if word is not None:
        return word == words_alone(found if "\\" in found else f"\\text{{{found}}}")
    return None
