"""What a user says about the rubric judge: which model, where it is reached, how it is asked."""

import json
import os
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from dgd_lightning.checks import check_integer, check_number
from dgd_lightning.errors import InputError

OPENAI = "https://api.openai.com/v1"
OURS = ("model", "messages", "stream", "n")  # fields of a request that `sampling` may not set


@dataclass(frozen=True)
class JudgeModel:
    """A model that judges, behind an OpenAI-compatible endpoint or in this process.

    Args:
        model: its name at the endpoint; with ``local`` a folder, a Hub id or ``lab``.
        base_url: the endpoint; None takes OPENAI_BASE_URL, and OpenAI's own where that is not set either.
        key_variable: environment variable with the key. A server that asks for none takes any text.
        reasoning_effort: of a judge that reasons, as its endpoint names it: minimal, low, medium, high; None: its own.
        sampling: further fields of every request, sent as they are: temperature, max_completion_tokens, seed,
            response_format … Empty, as in CL-bench's own script: the endpoint's defaults.
        timeout: seconds without a byte from the endpoint.
        attempts: how often a request is sent until it is answered (rate limits, server errors, time-outs, resets).
        first_wait: seconds before the second attempt; each further wait is twice as long, less up to half of it.
        longest_wait: no wait is longer, but for a ``Retry-After``; one that asks for more stops the run.
        stop_after: rows in a row without any answer, each after all its attempts, that stop the run.
        requests_per_minute: of all threads together; None: no limit.
        tokens_per_minute: prompt and reply, of all threads together; None: no limit.
        price_in: per million prompt tokens, in a currency of your choice; None: no cost is reported.
        price_out: per million tokens of replies.
        local: load the model with transformers here (safetensors only, greedy); of the settings above only ``model`` is
            used, and those below.
        revision: Hub revision of a local judge.
        dtype: of a local judge.
        device: of a local judge.
        max_new_tokens: of a local judge's reply.
    """

    model: str
    base_url: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    sampling: dict[str, Any] = field(default_factory=dict)
    reasoning_effort: str | None = None
    timeout: float = 300.0
    attempts: int = 6
    first_wait: float = 1.0
    longest_wait: float = 120.0
    stop_after: int = 10
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    price_in: float | None = None
    price_out: float | None = None
    local: bool = False
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    max_new_tokens: int = 2048

    @property
    def url(self) -> str:
        """Where requests go."""
        return (self.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI).rstrip("/")

    @property
    def fields(self) -> dict[str, Any]:
        """All further fields of a request."""
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return {**self.sampling, **effort}

    def check(self, argument: str) -> None:
        """Check what can be checked without a request; errors name the argument, ``judge`` or ``judge.second``."""
        if not self.model:
            raise InputError(f"{argument}.model", expected="a model's name", received="nothing", hint="name the judge")
        for name in ("attempts", "stop_after", "max_new_tokens"):
            check_integer(f"{argument}.{name}", getattr(self, name))
        for name in ("timeout", "requests_per_minute", "tokens_per_minute"):
            check_number(f"{argument}.{name}", getattr(self, name), above=0, optional=name != "timeout")
        for name in ("first_wait", "longest_wait", "price_in", "price_out"):
            check_number(f"{argument}.{name}", getattr(self, name), least=0, optional=name.startswith("price"))
        if (self.price_in is None) != (self.price_out is None):
            one, other = ("price_in", "price_out") if self.price_in is None else ("price_out", "price_in")
            expected = f"a price, as {other} has one"
            raise InputError(f"{argument}.{one}", expected=expected, received="null", hint="give both or none")
        sampling = f"{argument}.sampling"
        if taken := ", ".join(name for name in OURS if name in self.sampling):
            expected = f"fields of a request other than {', '.join(OURS)}"
            raise InputError(sampling, expected=expected, received=taken, hint="remove them")
        if self.reasoning_effort is not None and (self.local or "reasoning_effort" in self.sampling):
            expected = "null for a local judge" if self.local else f"null, as {sampling} has one"
            hint = "leave one of the two out (on a command line: null)"
            raise InputError(
                f"{argument}.reasoning_effort", expected=expected, received=self.reasoning_effort, hint=hint
            )
        try:
            json.dumps(self.sampling)
        except (TypeError, ValueError) as error:
            expected = "what JSON can carry"
            raise InputError(sampling, expected=expected, received=error, hint="correct the value") from error
        if not self.local and (wrong := self._wrong_url()):
            raise InputError(
                f"{argument}.base_url" if self.base_url else "OPENAI_BASE_URL",
                expected="a plain http(s) URL such as http://localhost:8000/v1",
                received=wrong,
                hint=f"correct it; a key goes into {self.key_variable}",
            )

    def _wrong_url(self) -> str:
        """What is there instead of a usable URL, without what may hold a key; empty where it is one."""
        try:
            parts = urlsplit(self.url)
            fine = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:  # a port that is no number, brackets that do not close
            return "another text"
        if parts.username or parts.password or parts.query or parts.fragment:
            return "one with a user name, a password, a query or a fragment"
        return "" if fine else repr(self.url)


@dataclass(frozen=True, kw_only=True)
class JudgeConfig(JudgeModel):
    """The judge of a run.

    Args:
        prompt: file with the judge's prompt, with ``{rubrics_text}`` and ``{model_output}`` where these go; None takes
            the package's.
        cache: file of verdicts; several runs and processes may share it.
        workers: answers judged at once.
        asks: replies asked for until one can be read as a verdict.
        second: another judge that is asked the same, for agreement; the first one's verdict counts.
    """

    prompt: str | None = None
    cache: str = "logs/verdicts.jsonl"
    workers: int = 8
    asks: int = 3
    second: JudgeModel | None = None

    def check(self, argument: str) -> None:
        super().check(argument)
        for name in ("workers", "asks"):
            check_integer(f"{argument}.{name}", getattr(self, name))
        if self.second is not None:
            self.second.check(f"{argument}.second")
