"""`ErrorJudge`: a second, short question to the judge about every failed answer: why it failed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dgd_lightning.grader import INCOMPLETE, Grader, remarked
from dgd_lightning.scoring.judge_text import fill, packaged, read_error_class, rubric_texts
from dgd_lightning.scoring.one_judge import OneJudge, Question
from dgd_lightning.scoring.verdicts import content_key
from dgd_lightning.types import Score


class ErrorJudge:
    """Names the error class of failed answers; safe to call from several threads.

    It sees rubrics, their verdicts, the rationale and the answer, not the context, which may be far longer.

    Args:
        judge: who is asked.
        workers: answers it may be asked about at once.
    """

    def __init__(self, judge: OneJudge, workers: int) -> None:
        self._judge, self.workers = judge, workers
        self._template = packaged("error_class.txt")

    def classify(self, row: dict[str, Any], answer: str, score: Score) -> dict[str, Any]:
        """Why an answer failed: ``error_class`` (None where the judge failed), ``error_reason``, ``error_asked``.

        Args:
            row: with rubrics.
            answer: that failed.
            score: its score, below 1.

        Raises:
            InputError: a user's mistake, which ends all grading.
        """
        if not answer.strip():
            return {"error_class": INCOMPLETE, "error_reason": "no answer"}
        rubrics = rubric_texts(row["rubrics"])
        if len(score.status) == len(rubrics):
            met = {"yes": "met", "no": "not met"}
            rubrics = [f"[{met.get(one, one)}] {text}" for one, text in zip(score.status, rubrics, strict=True)]
        prompt = fill(self._template, rubrics, answer, grading_rationale=score.rationale)
        content = content_key(self._template, rubrics, score.rationale, answer)
        found = self._judge.answer(Question(prompt, content, read_error_class))
        record = found.record or {"error_class": None, "rationale": found.failure}
        names = {"error_class": record["error_class"], "error_reason": record["rationale"]}
        return {**names, "error_asked": found.details}

    def fingerprint(self) -> dict[str, Any]:
        """All that can change a class."""
        return {"prompt": content_key(self._template)[:16], "judge": self._judge.identity}

    def totals(self) -> dict[str, Any]:
        """What this process asked so far."""
        return self._judge.totals()


class Classified(Grader):
    """Grades as another grader does, and says of rows with rubrics that failed why.

    Args:
        grader: which gives the score.
        errors: who gives the class.
        others: graders whose remarks on a row may give one too; then nobody is asked.
    """

    def __init__(self, grader: Grader, errors: ErrorJudge, others: Sequence[Grader] = ()) -> None:
        self._grader, self._errors, self._others = grader, errors, others
        self.name, self.cost = grader.name, grader.cost
        self.workers = max(grader.workers, errors.workers)

    def takes(self, row: dict[str, Any]) -> bool:
        return self._grader.takes(row)

    def grade(self, row: dict[str, Any], answer: str) -> Score:
        """See `Grader.grade`; ``details`` get the class, unless the grader has named one."""
        score = remarked(row, answer, self._grader.grade(row, answer), self._others)
        details = score.details or {}
        solved = score.value is None or score.value == 1.0
        if solved or details.get("error_class") is not None or not rubric_texts(row.get("rubrics")):
            return score
        return score._replace(details={**details, **self._errors.classify(row, answer, score)})

    def fingerprint(self) -> dict[str, Any]:
        return {**self._grader.fingerprint(), "error_classes": self._errors.fingerprint()}

    def totals(self) -> dict[str, Any] | None:
        return self._grader.totals()

    def stop(self) -> None:
        self._grader.stop()

    def close(self) -> None:
        self._grader.close()
