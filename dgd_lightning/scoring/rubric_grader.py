"""`RubricJudge`: CL-bench's protocol, a language model that grades an answer against rubrics, all or nothing."""

from collections.abc import Mapping
from functools import partial
from typing import Any, Self

from dgd_lightning.errors import InputError
from dgd_lightning.grader import ASK, Grader
from dgd_lightning.jsonl import content_key
from dgd_lightning.scoring.judge_client import OpenAIEndpoint
from dgd_lightning.scoring.judge_config import JudgeConfig, JudgeModel
from dgd_lightning.scoring.judge_text import fill, read_template, read_verdict, rubric_texts
from dgd_lightning.scoring.one_judge import Answer, Endpoint, OneJudge, Question, VerdictFile
from dgd_lightning.types import Score


class RubricJudge(Grader):
    """Grades rows with rubrics: 1 only if every rubric holds, as the judge sees it. A judge's failure is no score.

    Args:
        config: the judge and, where wanted, a second one.

    Raises:
        InputError: settings that can't work, an unusable prompt file, or a file of verdicts that can't be written.
    """

    name, cost = "rubric_judge", ASK

    def __init__(self, config: JudgeConfig) -> None:
        config.check("judge")
        self.workers, self._asks = config.workers, config.asks
        self._template = read_template(config.prompt)
        self._verdicts = VerdictFile(config.cache)
        self._judges = {"judge": self._judge(config, "judge")}
        if config.second is not None:
            self._judges["second"] = self._judge(config.second, "judge.second")
            if self._judges["second"].endpoint.identity == self._judges["judge"].endpoint.identity:
                raise InputError(
                    "judge.second",
                    expected="another judge",
                    received="the first one again, which would only repeat its stored verdicts",
                    hint="use another model or other sampling",
                )

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self | None:
        return None if options["judge"] is None else cls(options["judge"])

    def takes(self, row: dict[str, Any]) -> bool:
        return bool(rubric_texts(row.get("rubrics")))

    def grade(self, row: dict[str, Any], answer: str) -> Score:
        """See `Grader.grade`; ``status`` has an entry per rubric, and none for an answer without text."""
        if not answer.strip():
            return Score(0.0, [], "no answer: it counts as not solved, and the judge is not asked")
        rubrics = rubric_texts(row["rubrics"])
        prompt = fill(self._template, rubrics, answer)
        content = content_key(self._template, rubrics, answer)
        question = Question(prompt, content, partial(read_verdict, rubrics=len(rubrics)))
        first, *others = (_score(judge.answer(question)) for judge in self._judges.values())
        for other in others:
            second = {
                "score": None if other.value is None else int(other.value),
                "requirement_status": other.status,
                "grading_rationale": other.rationale,
                **(other.details or {}),
            }
            first = first._replace(details={**(first.details or {}), "second": second})
        return first

    def fingerprint(self) -> dict[str, Any]:
        judges = {name: judge.endpoint.identity for name, judge in self._judges.items()}
        return {"grader": self.name, "prompt": content_key(self._template)[:16], "asks": self._asks, **judges}

    def totals(self) -> dict[str, Any]:
        """What this process asked so far, for scores.json: requests, tokens and cost; per judge where there are two."""
        found = {name: judge.totals() for name, judge in self._judges.items()}
        return {**found.pop("judge"), **found}

    def error_judge(self) -> OneJudge:
        """The first judge, to be asked why answers failed; it goes when this one is closed."""
        return self._judges["judge"].apart()

    def stop(self) -> None:
        for judge in self._judges.values():
            judge.endpoint.stop()

    def close(self) -> None:
        for judge in self._judges.values():
            judge.endpoint.close()
        self._verdicts.close()

    def _judge(self, settings: JudgeModel, argument: str) -> OneJudge:
        endpoint: Endpoint
        if settings.local:
            from dgd_lightning.scoring.local_judge import LocalEndpoint  # torch: only for those whose judge is local

            endpoint = LocalEndpoint(settings, argument)
        else:
            endpoint = OpenAIEndpoint(settings, argument)
        return OneJudge(settings, endpoint, self._asks, self._verdicts)


def _score(answer: Answer) -> Score:
    if (record := answer.record) is None:
        return Score(None, [], answer.failure, answer.details)
    return Score(float(record["score"]), record["status"], record["rationale"], answer.details)


class NoJudge(Grader):
    """Says that a judge is missing where rows need one."""

    name, cost = "judge", ASK

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self | None:
        return None if options["judge"] is not None or options.get("leave") else cls()

    def takes(self, row: dict[str, Any]) -> bool:
        return bool(rubric_texts(row.get("rubrics")))

    def grade(self, row: dict[str, Any], answer: str) -> Score:
        raise InputError(
            "judge",
            expected="a judge, for rows with rubrics that no program checks",
            received="none",
            hint="name one with --judge.model (and --judge.base_url, OPENAI_API_KEY), see docs/scoring.md",
        )

    def fingerprint(self) -> dict[str, Any]:
        return {}
