"""`OpenAIEndpoint`: asks a judge behind an OpenAI-compatible URL: limited in rate, retried, and stopped as a whole."""

import json
import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from typing import Any

from dgd_lightning.errors import InputError
from dgd_lightning.scoring.judge_config import JudgeModel
from dgd_lightning.scoring.judge_failures import Failure, hide, mistake, read_failure
from dgd_lightning.scoring.one_judge import Effort, Endpoint, NoAnswer, Reply

FIRST_ATTEMPTS = 3  # to reach an endpoint that has never answered
CONNECT_SECONDS = 10.0
REPLY_TOKENS = 512  # a guess, for the rate limit, until the endpoint reports them
GRACE_SECONDS = 3.0  # for replies on their way when all is stopped: they are paid for
LOOK_EVERY = 0.1  # seconds


class RateLimit:
    """Spaces requests evenly, so that no minute has more than the limits allow (but for the last request's tokens).

    Args:
        requests, tokens: per minute; None: no limit.
        clock: seconds.
    """

    def __init__(
        self, requests: float | None = None, tokens: float | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._request_gap = 60.0 / requests if requests else 0.0
        self._token_gap = 60.0 / tokens if tokens else 0.0
        self._clock = clock
        self._lock = threading.Lock()
        self._next_request = self._next_token = clock()

    def wait(self, tokens: int, sleep: Callable[[float], object]) -> None:
        """Wait until a request may be sent; the tokens are a guess, and what ``sleep`` raises ends the wait."""
        while True:
            with self._lock:
                now, start = self._clock(), max(self._next_request, self._next_token)
                if start <= now:
                    self._next_request = now + self._request_gap
                    self._next_token = now + tokens * self._token_gap
                    return
            sleep(start - now)

    def correct(self, tokens: int) -> None:
        """Count so many tokens more (or fewer) than were given to `wait`."""
        with self._lock:
            self._next_token += tokens * self._token_gap

    def pause(self, seconds: float) -> None:
        """Let nobody send anything for a while, as an endpoint asks for."""
        with self._lock:
            self._next_request = max(self._next_request, self._clock() + seconds)


class OpenAIEndpoint(Endpoint):
    """An OpenAI-compatible endpoint, through the ``openai`` client, whose own retries are off.

    Settings are checked; the argument (``judge`` or ``judge.second``) is for errors.
    """

    def __init__(self, settings: JudgeModel, argument: str) -> None:
        self._settings, self._argument, self._url, self._key = settings, argument, settings.url, ""
        self.identity = {"model": settings.model, "base_url": self._url, "sampling": settings.fields}
        self._limit = RateLimit(settings.requests_per_minute, settings.tokens_per_minute)
        self._random = random.Random()  # of waits only: processes must not wait in step
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._client: Any = None
        self._given_up: float | None = None  # when `stop` was called
        self._mistake: InputError | None = None
        self._answered = False  # ever
        self._silent = 0  # questions without an answer since the last one with

    def ask(self, prompt: str, effort: Effort) -> Reply:
        attempts, reason = self._settings.attempts, ""
        for attempt in range(1, attempts + 1):
            self._go_on()
            client = self._connect()
            guess = len(prompt) // 4 + REPLY_TOKENS
            self._limit.wait(guess, self._sleep)
            effort.requests += 1
            outcome = self._unless_given_up(partial(self._request, client, prompt, effort, guess))
            if isinstance(outcome, Reply):
                return outcome
            reason = outcome.reason
            effort.faults[reason] += 1
            self._judge_failure(outcome, attempt)
            if not outcome.again:
                raise NoAnswer(reason)
            if attempt < attempts:
                self._back_off(attempt, outcome.wait)
        self._count_silence(reason)
        raise NoAnswer(f"no answer after {attempts} attempts, the last: {reason}")

    def stop(self) -> None:
        self._given_up = time.monotonic()
        self._ended.set()

    def close(self) -> None:
        self._ended.set()
        with self._lock:
            if self._client is not None:
                self._client.close()

    def _connect(self) -> Any:
        """The client, made when first asked for: a run whose verdicts are all stored needs no key."""
        with self._lock:
            if self._client is None:
                self._key = _read_key(self._settings.key_variable)
                try:
                    import openai
                except ImportError as error:
                    way_out = "pip install 'dgd-lightning[judge]'"
                    raise mistake(self._argument, "the package openai", "none installed", way_out) from error
                seconds = self._settings.timeout
                timeout = openai.Timeout(seconds, connect=min(seconds, CONNECT_SECONDS))
                try:
                    self._client = openai.OpenAI(api_key=self._key, base_url=self._url, timeout=timeout, max_retries=0)
                except (ImportError, ValueError, OSError) as error:  # httpx reads the environment
                    wanted, way_out = "an HTTP client that this environment allows", "see to HTTPS_PROXY, ALL_PROXY"
                    said = hide(str(error), self._key)
                    raise mistake(self._argument, wanted, said, f"{way_out} and SSL_CERT_FILE") from error
            return self._client

    def _unless_given_up(self, request: Callable[[], Reply | Failure]) -> Reply | Failure:
        """What the request comes to. It runs apart, for a read of a socket can't be ended."""
        coming: Future[Reply | Failure] = Future()

        def run() -> None:
            try:
                coming.set_result(request())
            except BaseException as error:
                coming.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        while not wait([coming], LOOK_EVERY).done:
            if self._given_up is not None and time.monotonic() - self._given_up > GRACE_SECONDS:
                self._go_on()
        return coming.result()

    def _request(self, client: Any, prompt: str, effort: Effort, guess: int) -> Reply | Failure:
        import openai

        try:
            raw = client.chat.completions.with_raw_response.create(
                model=self._settings.model,
                messages=[{"role": "user", "content": prompt}],
                extra_body=self._settings.fields,
            )
            body = json.loads(raw.http_response.text)
            reply = read_completion(body)
        except (openai.OpenAIError, ValueError, RecursionError) as error:
            return read_failure(error, self._settings, self._argument, self._key)
        tokens_in, tokens_out = read_usage(body)
        effort.count_tokens(tokens_in, tokens_out)
        if tokens_in is not None and tokens_out is not None:
            self._limit.correct(tokens_in + tokens_out - guess)
        with self._lock:
            self._answered, self._silent = True, 0
        return Reply(hide(reply.text, self._key), reply.flaw)

    def _judge_failure(self, failure: Failure, attempt: int) -> None:
        """Raises InputError where the failure would meet every row."""
        settings, answered = self._settings, self._answered
        if failure.stop is not None and not (failure.unknown_to_blame and answered):
            raise self._stop(failure.stop)
        if failure.unreachable and not answered and attempt >= min(FIRST_ATTEMPTS, settings.attempts):
            where, way_out = f"{settings.url}: {failure.reason}", "start it, or correct the URL"
            raise self._stop(mistake(f"{self._argument}.base_url", "an endpoint that answers", where, way_out))
        if failure.unknown_to_blame:
            self._count_silence(failure.reason)
        if failure.wait is not None and failure.wait > settings.longest_wait:
            wanted = f"an endpoint that can be asked again within {settings.longest_wait:g} s"
            asked = f"{failure.reason} with Retry-After {failure.wait:.0f} s"
            way_out = f"go on later with the same command, or raise {self._argument}.longest_wait"
            raise self._stop(mistake(self._argument, wanted, asked, way_out))

    def _count_silence(self, reason: str) -> None:
        with self._lock:
            self._silent += 1
            too_long = self._silent >= self._settings.stop_after
        if too_long:
            silence = f"none for {self._settings.stop_after} rows in a row, the last: {reason}"
            way_out = "see to the endpoint, then go on with the same command: stored verdicts are kept"
            raise self._stop(mistake(self._argument, "an endpoint that answers", silence, way_out))

    def _back_off(self, attempt: int, wanted: float | None) -> None:
        settings = self._settings
        wait = min(settings.longest_wait, settings.first_wait * 2 ** min(attempt - 1, 60))
        wait *= self._random.uniform(0.5, 1.0)
        if wanted is not None:
            self._limit.pause(wanted)  # the limit is the account's, so it holds for all threads
            wait = wanted + min(wait, settings.first_wait)
        self._sleep(wait)

    def _sleep(self, seconds: float) -> None:
        self._ended.wait(seconds)
        self._go_on()

    def _stop(self, error: InputError) -> InputError:
        """Ends all questions with the first mistake, which every thread raises anew."""
        with self._lock:
            self._mistake = self._mistake or error
        self.stop()
        return self._mistake.named(self._mistake.argument)

    def _go_on(self) -> None:
        if self._ended.is_set():
            if self._mistake is None:
                raise RuntimeError("the judge was closed while a row waited for its verdict")
            raise self._mistake.named(self._mistake.argument)


def read_completion(body: Any) -> Reply:
    """The reply in a chat completion; ValueError where the body is none."""
    try:
        choice = body["choices"][0]
        message = choice["message"]
        text, refusal, ending = message.get("content"), message.get("refusal"), choice.get("finish_reason")
    except (LookupError, TypeError, AttributeError) as error:
        said = body.get("error") if isinstance(body, dict) else None
        raise ValueError(f"no chat completion: {json.dumps(said or body)}") from error
    flaws = {"length": "a reply that was cut off", "content_filter": "a refusal (content filter)"}
    flaw = "a refusal" if refusal else flaws.get(ending)
    return Reply(text if isinstance(text, str) else "", flaw)


def read_usage(body: dict[str, Any]) -> list[int | None]:
    """Tokens of prompt and reply as an endpoint reports them; None where it does not."""
    usage = body.get("usage")
    counts = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
    return [n if isinstance(n, int) and not isinstance(n, bool) and n >= 0 else None for n in counts]


def _read_key(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not key:
        way_out = f"export {variable}=…; for a server that asks for none, any text"
        raise mistake(variable, "the endpoint's key in this environment variable", "nothing", way_out)
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise mistake(variable, "a key of printable ASCII without spaces", "other characters", "copy the key again")
    return key
