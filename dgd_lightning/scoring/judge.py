"""`RubricJudge`: CL-bench's protocol, a language model that grades an answer against rubrics, all or nothing."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any, NamedTuple

from dgd_lightning.errors import InputError
from dgd_lightning.scoring.grader import Grader
from dgd_lightning.scoring.judge_client import Effort, Endpoint, NoAnswer, OpenAIEndpoint
from dgd_lightning.scoring.judge_config import JudgeConfig, JudgeModel
from dgd_lightning.scoring.judge_prompt import fill, read_template, rubric_texts
from dgd_lightning.scoring.judge_reply import UnreadableReply, Verdict, read_verdict
from dgd_lightning.scoring.verdicts import VerdictFile, content_key
from dgd_lightning.types import Score

BEGINNING = 200  # characters of a reply that is no verdict, for people
UNANSWERED = Score(0.0, [], "no answer: it counts as not solved, and the judge is not asked")


class Question(NamedTuple):
    """One answer to judge."""

    prompt: str
    rubrics: int
    content: str  # hash of prompt file, rubrics and answer


class RubricJudge(Grader):
    """Grades rows with rubrics: 1 only if every rubric holds, as the judge sees it. A judge's failure is no score.

    Args:
        config: the judge and, where wanted, a second one.

    Raises:
        InputError: settings that can't work, an unusable prompt file, or a file of verdicts that can't be written.
    """

    name = "rubric_judge"

    def __init__(self, config: JudgeConfig) -> None:
        config.check("judge")
        self.workers = config.workers
        self._template = read_template(config.prompt)
        self._asks = config.asks
        self._verdicts = VerdictFile(config.cache, "judge.cache")
        self._first = OneJudge(config, "judge", config.asks, self._verdicts)
        self._second = None
        if config.second is not None:
            self._second = OneJudge(config.second, "judge.second", config.asks, self._verdicts)
            if self._second.identity == self._first.identity:
                raise InputError(
                    "judge.second",
                    expected="another judge",
                    received="the first one again, which would only repeat its stored verdicts",
                    mend="use another model or other sampling",
                )

    def takes(self, row: dict[str, Any]) -> bool:
        """See `Grader.takes`."""
        return bool(rubric_texts(row.get("rubrics")))

    def grade(self, row: dict[str, Any], answer: str) -> Score:
        """See `Grader.grade`; ``status`` has an entry per rubric, and none for an answer without text."""
        if not answer.strip():
            return UNANSWERED
        rubrics = rubric_texts(row["rubrics"])
        content = content_key(self._template, rubrics, answer)
        question = Question(fill(self._template, rubrics, answer), len(rubrics), content)
        score = self._first.grade(question)
        if self._second is None:
            return score
        other = self._second.grade(question)
        second = {
            "score": None if other.value is None else int(other.value),
            "requirement_status": other.status,
            "grading_rationale": other.rationale,
            **(other.details or {}),
        }
        return score._replace(details={**(score.details or {}), "second": second})

    def fingerprint(self) -> dict[str, Any]:
        """See `Grader.fingerprint`."""
        found = {
            "grader": self.name,
            "prompt": content_key(self._template)[:16],
            "asks": self._asks,
            "judge": self._first.identity,
        }
        return found if self._second is None else {**found, "second": self._second.identity}

    def totals(self) -> dict[str, Any]:
        """What this process asked so far, for scores.json: requests, tokens and cost; per judge where there are two."""
        found = self._first.totals()
        return found if self._second is None else {**found, "second": self._second.totals()}

    def close(self) -> None:
        """See `Grader.close`."""
        for judge in filter(None, (self._first, self._second)):
            judge.close()
        self._verdicts.close()


class OneJudge:
    """One judge, its stored verdicts and what it took.

    Args:
        settings: checked.
        argument: ``judge`` or ``judge.second``, for errors.
        asks: replies asked for until one can be read.
        verdicts: where verdicts are kept.
    """

    def __init__(self, settings: JudgeModel, argument: str, asks: int, verdicts: VerdictFile) -> None:
        self._settings, self._asks, self._verdicts = settings, asks, verdicts
        self._endpoint: Endpoint
        if settings.local:
            from dgd_lightning.scoring.local_judge import LocalEndpoint

            self._endpoint = LocalEndpoint(settings, argument)
            self._asks = 1  # greedy: another reply would be the same
        else:
            self._endpoint = OpenAIEndpoint(settings, argument)
        self.identity = self._endpoint.identity()
        self._lock = threading.Lock()
        self._turns: dict[str, threading.Lock] = {}  # by question: equal answers, as of lossless arms, are judged once
        self._counts: Counter[str] = Counter()
        self._spent = Effort()

    def grade(self, question: Question) -> Score:
        """The stored verdict, or a new one.

        Raises:
            InputError: a user's mistake, which ends all grading.
        """
        key = content_key(question.content, self.identity)
        with self._lock:
            turn = self._turns.setdefault(key, threading.Lock())
        with turn:
            record = self._verdicts.get(key)
            if record is not None:
                self._count("cached")
                return self._score(record, cached=True)
            effort, begun = Effort(), time.monotonic()
            try:
                verdict = self._ask(question, effort)
            except NoAnswer as error:
                self._count("failed")
                details = self._details(self._record(effort, begun), cached=False)
                return Score(None, [], f"judge_error: {error}", details)
            finally:
                self._spend(effort)
            record = {**verdict._asdict(), **self._record(effort, begun)}
            self._count("judged")
            return self._score(self._verdicts.put(key, record), cached=False)

    def totals(self) -> dict[str, Any]:
        """What this process asked so far."""
        with self._lock:
            spent = self._spent
            return {
                "model": self._settings.model,
                **{name: self._counts[name] for name in ("judged", "cached", "failed")},
                "requests": spent.requests,
                "faults": dict(sorted(spent.faults.items())),
                "tokens_in": spent.tokens_in,
                "tokens_out": spent.tokens_out,
                **self._cost(spent.tokens_in, spent.tokens_out),
            }

    def close(self) -> None:
        """End all waiting."""
        self._endpoint.close()

    def _ask(self, question: Question, effort: Effort) -> Verdict:
        flaw = beginning = ""
        for _ in range(self._asks):
            reply = self._endpoint.ask(question.prompt, effort)
            flaw = reply.flaw or ""
            if not flaw:
                try:
                    return read_verdict(reply.text, question.rubrics)
                except UnreadableReply as error:
                    flaw = str(error)
            effort.faults[flaw] += 1
            beginning = " ".join(reply.text.split())[:BEGINNING]
        shown = f" ({beginning!r} …)" if beginning else ""
        raise NoAnswer(f"{self._asks} replies without a verdict, the last: {flaw}{shown}")

    def _record(self, effort: Effort, begun: float) -> dict[str, Any]:
        return {
            "model": self._settings.model,
            "requests": effort.requests,
            "faults": dict(effort.faults),
            "tokens_in": effort.tokens_in,
            "tokens_out": effort.tokens_out,
            "seconds": round(time.monotonic() - begun, 3),
        }

    def _score(self, record: dict[str, Any], *, cached: bool) -> Score:
        details = self._details(record, cached=cached)
        return Score(float(record["score"]), list(record["status"]), record["rationale"], details)

    def _details(self, record: dict[str, Any], *, cached: bool) -> dict[str, Any]:
        """Of a row: what its verdict took when it was asked for."""
        names = ("model", "requests", "faults", "tokens_in", "tokens_out", "seconds")
        tokens = record.get("tokens_in"), record.get("tokens_out")
        return {**{name: record.get(name) for name in names}, **self._cost(*tokens), "cached": cached}

    def _cost(self, tokens_in: int | None, tokens_out: int | None) -> dict[str, float | None]:
        prices = self._settings.price_in, self._settings.price_out
        if prices[0] is None or prices[1] is None:
            return {}
        if tokens_in is None or tokens_out is None:
            return {"cost": None}  # unknown is not free
        return {"cost": (tokens_in * prices[0] + tokens_out * prices[1]) / 1e6}

    def _count(self, what: str) -> None:
        with self._lock:
            self._counts[what] += 1

    def _spend(self, effort: Effort) -> None:
        with self._lock:
            self._spent.requests += effort.requests
            self._spent.faults.update(effort.faults)
            self._spent.count_tokens(effort.tokens_in, effort.tokens_out)
