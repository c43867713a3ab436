"""At most so many requests and tokens per minute, over all threads of a process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class RateLimit:
    """Spaces requests evenly, so that no minute has more than the limits allow (but for the last request's tokens).

    Args:
        requests_per_minute: None: no limit.
        tokens_per_minute: None: no limit.
        clock: seconds.
    """

    def __init__(
        self,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._request_gap = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._token_gap = 60.0 / tokens_per_minute if tokens_per_minute else 0.0
        self._clock = clock
        self._lock = threading.Lock()
        self._next_request = self._next_token = self._paused_until = clock()

    def wait(self, tokens: int, sleep: Callable[[float], object]) -> None:
        """Wait until a request may be sent.

        Args:
            tokens: an estimate of what it will take; `correct` fixes it.
            sleep: waits so many seconds; what it raises ends the wait.
        """
        while True:
            with self._lock:
                now = self._clock()
                start = max(self._next_request, self._next_token, self._paused_until)
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
            self._paused_until = max(self._paused_until, self._clock() + seconds)
