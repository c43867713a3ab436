"""What a failed request means: send it again, give this row up, or stop the run."""

import email.utils
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from dgd_lightning.errors import InputError
from dgd_lightning.scoring.judge_config import JudgeModel

# Refusals of one row's content rather than of the settings, as OpenAI's, Azure's and vLLM's servers word them
_ROW_CODES = ("context_length_exceeded", "string_above_max_length", "content_filter", "content_policy_violation")
_ROW_WORDS = ("maximum context length", "context length", "content management policy", "too long")
_NO_MONEY = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
_UNREACHABLE = ("ConnectError", "ConnectTimeout", "ProxyError", "UnsupportedProtocol")
WORDS = 200  # characters of a server's own
_AGAIN = (408, 409, 425, 429)


class Failure(NamedTuple):
    """What came of a request that was not answered."""

    reason: str  # short, without the key
    again: bool = True  # worth another attempt; otherwise the row has no answer
    wait: float | None = None  # seconds that the endpoint asks for
    unreachable: bool = False  # nothing listens there
    unknown_to_blame: bool = False  # the row or the settings: if others were answered before, it is the row
    stop: InputError | None = None  # a user's mistake: no row would be answered


def read_failure(error: Exception, settings: JudgeModel, argument: str, key: str) -> Failure:
    """What to do about an error of openai's client, or a ValueError for a body that is no completion.

    The argument is ``judge`` or ``judge.second``; the key is kept out of every text.
    """
    import openai

    if isinstance(error, openai.APIConnectionError):  # time-outs too
        cause = type(error.__cause__).__name__
        kind = "time-out" if isinstance(error, openai.APITimeoutError) else "connection"
        return Failure(f"{kind} ({cause})", unreachable=cause in _UNREACHABLE)
    if not isinstance(error, openai.APIStatusError):
        return Failure(f"unreadable body ({hide(str(error), key)[:WORDS]})")
    status, said = error.status_code, hide(_said(error), key)[:WORDS]
    reason = f"HTTP {status}" + (f" ({said})" if said else "")

    def key_refused(reason: str) -> InputError:
        hint = "check the key, and that it is this endpoint's"
        return mistake(settings.key_variable, f"a key that {settings.url} accepts", reason, hint)

    if status == 401:  # what the server says may repeat the key
        return Failure("HTTP 401", stop=key_refused("HTTP 401"))
    if status == 402 or str(error.code or error.type) in _NO_MONEY:
        account = "the key of an account that can pay"
        return Failure(reason, stop=mistake(settings.key_variable, account, reason, "add to its balance"))
    if status in _AGAIN or status >= 500:
        return Failure(f"HTTP {status}", wait=retry_after(error.response.headers))
    if status == 404 and ("model" in said.lower() or settings.model in said):
        model, received = f"a model that {settings.url} has", f"{settings.model!r}: {reason}"
        return Failure(reason, stop=mistake(f"{argument}.model", model, received, "check its name"))
    if status == 404:
        url, received = "an OpenAI-compatible endpoint with /chat/completions", f"{settings.url}: {reason}"
        hint = f"most URLs end in /v1; if it is right, check {argument}.model"
        return Failure(reason, stop=mistake(f"{argument}.base_url", url, received, hint))
    if status == 413 or str(error.code) in _ROW_CODES or any(words in said.lower() for words in _ROW_WORDS):
        return Failure(reason, again=False)
    hint = f"see {argument}.sampling and {argument}.model"
    refused = mistake(argument, "a request that the endpoint accepts", reason, hint)
    return Failure(reason, again=False, unknown_to_blame=True, stop=key_refused(reason) if status == 403 else refused)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that ``retry-after-ms`` or ``Retry-After`` (seconds or a date) asks for; None where there is none."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            seconds = float(headers[name]) * unit
        except (KeyError, ValueError):
            continue
        if seconds == seconds:  # no NaN
            return max(0.0, seconds)
    try:
        date = email.utils.parsedate_to_datetime(headers["retry-after"])
        return max(0.0, date.timestamp() - time.time())
    except (KeyError, ValueError, OverflowError):
        return None


def hide(text: str, key: str) -> str:
    """The text without the key, should a server repeat it; words such as "none" are no secret."""
    return text.replace(key, "[key]") if len(key) >= 8 else text


def mistake(argument: str, expected: str, received: str, hint: str) -> InputError:
    """A user's mistake in one line."""
    return InputError(argument, expected=expected, received=received, hint=hint)


def _said(error: Any) -> str:
    """The server's own words, on one line."""
    body = error.body
    words = body.get("message") or body.get("detail") or "" if isinstance(body, dict) else body or ""
    return " ".join(str(words).split())
