"""`Classified`: a second, short question to the judge about every failed answer: why it failed."""

from typing import Any

from dgd_lightning.grader import INCOMPLETE, Grader
from dgd_lightning.jsonl import content_key
from dgd_lightning.scoring.judge_text import fill, packaged, read_error_class, rubric_texts
from dgd_lightning.scoring.one_judge import OneJudge, Question
from dgd_lightning.types import Score


class Classified(Grader):
    """Grades as another grader does, and says of rows with rubrics that failed why.

    The judge sees rubrics, their verdicts, the rationale and the answer, not the context, which may be far longer.

    Args:
        grader: which gives the score.
        judge: who gives the class.
        workers: answers that the judge may be asked about at once.
    """

    def __init__(self, grader: Grader, judge: OneJudge, workers: int = 1) -> None:
        self._grader, self._judge = grader, judge
        self.name, self.cost, self.workers = grader.name, grader.cost, max(grader.workers, workers)
        self._template = packaged("error_class.txt")

    def takes(self, row: dict[str, Any]) -> bool:
        return self._grader.takes(row)

    def grade(self, row: dict[str, Any], answer: str) -> Score:
        """See `Grader.grade`; ``details`` get ``error_class`` (None: the judge failed), unless the grader named one."""
        score = self._grader.grade(row, answer)
        details, rubrics = score.details or {}, rubric_texts(row.get("rubrics"))
        if score.value in (None, 1.0) or details.get("error_class") is not None or not rubrics:
            return score
        if not answer.strip():
            return score._replace(details={**details, "error_class": INCOMPLETE, "error_reason": "no answer"})
        if len(score.status) == len(rubrics):
            met = {"yes": "met", "no": "not met"}
            rubrics = [f"[{met.get(one, one)}] {text}" for one, text in zip(score.status, rubrics, strict=True)]
        prompt = fill(self._template, rubrics, answer, grading_rationale=score.rationale)
        content = content_key(self._template, rubrics, score.rationale, answer)
        found = self._judge.answer(Question(prompt, content, read_error_class))
        record = found.record or {"error_class": None, "rationale": found.failure}
        names = {"error_class": record["error_class"], "error_reason": record["rationale"]}
        return score._replace(details={**details, **names, "error_asked": found.details})

    def fingerprint(self) -> dict[str, Any]:
        errors = {"prompt": content_key(self._template)[:16], "judge": self._judge.endpoint.identity}
        return {**self._grader.fingerprint(), "error_classes": errors}

    def totals(self) -> dict[str, Any] | None:
        """Of a grader that asks: with what was asked about error classes."""
        totals = self._grader.totals()
        return None if totals is None else {**totals, "error_classes": self._judge.totals()}

    def stop(self) -> None:
        self._grader.stop()

    def close(self) -> None:
        self._grader.close()
