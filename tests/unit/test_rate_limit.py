"""Rate limits on a clock of the test's own: no window of a minute has more than it may."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from dgd_lightning.scoring.judge_client import RateLimit


class Clock:
    """Time that passes only while someone sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


def test_requests_per_minute() -> None:
    clock = Clock()
    limit = RateLimit(30, clock=clock)
    times = []
    for _ in range(200):
        limit.wait(5, clock.sleep)
        times.append(clock.now)
    assert all(b - a >= 60 - 1e-6 for a, b in zip(times, times[30:], strict=False))  # never 31 within a minute
    assert times[-1] - times[0] == pytest.approx(199 * 2.0)  # and no slower than that


def test_idle_time_is_not_saved_up() -> None:
    clock = Clock()
    limit = RateLimit(60, 600, clock=clock)
    limit.wait(10, clock.sleep)
    clock.now += 3600
    stored = clock.now
    for _ in range(10):
        limit.wait(10, clock.sleep)
    assert clock.now - stored == pytest.approx(9.0)


def test_tokens_per_minute_with_corrections() -> None:
    clock, rng = Clock(), random.Random(0)
    limit = RateLimit(None, 1000, clock=clock)
    sent: list[tuple[float, int]] = []
    for _ in range(300):
        guess, used = rng.randint(1, 200), rng.randint(1, 200)
        limit.wait(guess, clock.sleep)
        sent.append((clock.now, used))
        limit.correct(used - guess)
    for stored, _ in sent:
        window = [used for at, used in sent if stored <= at < stored + 60]
        assert sum(window[:-1]) <= 1000  # the last request may reach over
    total = sum(used for _, used in sent[:-1])
    assert sent[-1][0] - sent[0][0] == pytest.approx(total * 0.06)


def test_a_pause_holds_everyone_and_the_spacing_stays() -> None:
    clock = Clock()
    limit = RateLimit(60, clock=clock)
    limit.wait(1, clock.sleep)
    limit.pause(10)
    limit.pause(3)  # a shorter one does not end it
    times = []
    for _ in range(3):
        limit.wait(1, clock.sleep)
        times.append(clock.now - 1000)
    assert times == [10, 11, 12]


def test_no_limit_never_sleeps() -> None:
    limit = RateLimit()
    for _ in range(100):
        limit.wait(10**9, pytest.fail)


def test_eight_threads_share_one_limit() -> None:
    limit, lock, times = RateLimit(60 / 0.02), threading.Lock(), []

    def send(_: int) -> None:
        import time

        limit.wait(1, time.sleep)
        with lock:
            times.append(time.monotonic())

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(send, range(40)))
    assert max(times) - min(times) >= 39 * 0.02 - 0.02  # thread switches may delay the first one's note
