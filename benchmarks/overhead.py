"""Where a speculative cycle's time goes: the draft's forward, the verifying one, and what the loop adds to them.

The share is (cycle - forwards) / forwards, where ``cycle`` is the wall time of the whole decode, prefill excluded,
divided by its cycles. What counts as a forward's time is named in ``spans``:

- ``calls`` (CPU): wall seconds inside the calls, from the very run whose wall time is taken.
- ``kernels`` (CUDA, the share that is reported): time on the device with the forward's launches all queued beforehand,
  so that the device never waits for the host inside a forward. All that the device idles, inside a forward or
  between, then counts as the loop's. ``gapless`` is the share of forwards whose launches were queued in time; below 1,
  the kernels' time is an upper bound and the share a lower one.
- ``events`` (CUDA): between events around each call; launch gaps inside a forward count as the forward's.
- ``launches`` (CUDA): seconds the host spends in each call, which returns before its kernels have run; the share then
  holds the wait for the device too. Near the cycle itself, the host, not the device, sets the pace.

On CUDA the wall time is that of runs without any clock, and every kind of span has a run of its own.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dgd_lightning.decode.batch import Batch
from dgd_lightning.decode.drafter import Drafter
from dgd_lightning.types import DecodeOutput

Decode = Callable[[], Sequence[Sequence[DecodeOutput]]]  # decodes all groups, and gives each group's outputs
Seam = tuple[Any, str, str]  # a class, the method of it that is timed, and under what name
SEAMS: tuple[Seam, ...] = (
    (Drafter, "logits", "draft"),
    (Drafter, "extend", "draft"),
    (Batch, "step", "verify"),
)
FIRST_SLEEP = 2_000_000  # device clock ticks, about a millisecond; doubled until a forward's launches fit in
DOUBLINGS = 6  # a forward with more launches than the device's queue holds never fits


class Clock:
    """Times of the calls of the two forwards while it is on: plain wall seconds, which on CUDA are the launches'."""

    def __init__(self) -> None:
        self.on = False
        self.spans: dict[str, list[Any]] = defaultdict(list)

    def timed(self, function: Callable[[], Any]) -> tuple[Any, Any]:
        """The function's result and the span of its call."""
        began = time.perf_counter()
        result = function()
        return result, time.perf_counter() - began

    def seconds(self, name: str) -> float:
        """Total of a span."""
        return sum(self.spans[name])


class DeviceClock(Clock):
    """Times on the device, by events, which do not hold the loop up.

    Args:
        sleep: device clock ticks that the device is held up before each call, so that its launches pile up; 0: none.
    """

    def __init__(self, sleep: int = 0) -> None:
        super().__init__()
        self.sleep, self.calls, self.late = sleep, 0, 0

    def timed(self, function: Callable[[], Any]) -> tuple[Any, Any]:
        if self.sleep:
            torch.cuda._sleep(self.sleep)
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        result = function()
        self.calls += 1
        self.late += began.query()  # the device woke before the last launch was queued
        ended.record()
        return result, (began, ended)

    def seconds(self, name: str) -> float:
        torch.cuda.synchronize()
        return sum(began.elapsed_time(ended) for began, ended in self.spans[name]) / 1000

    @property
    def gapless(self) -> float:
        """Share of the calls whose launches were all queued before the device began with them."""
        return 1 - self.late / max(self.calls, 1)


def _wrapped(clock: Clock, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        if not clock.on:
            return function(*args, **kwargs)
        result, span = clock.timed(lambda: function(*args, **kwargs))
        clock.spans[name].append(span)
        return result

    return timed


@contextmanager
def timed_cycles(clock: Clock, seams: Sequence[Seam] = SEAMS) -> Iterator[None]:
    """Have the clock time the forwards of every cycle, the prefill excluded."""
    originals = [getattr(owner, method) for owner, method, _ in seams]
    begin, outputs = Batch.begin, Batch.outputs

    def started(self: Batch, logits: Tensor) -> None:
        begin(self, logits)
        clock.on = True  # the loop begins once the first tokens are there

    def ended(self: Batch, **drafts: Any) -> list[DecodeOutput]:
        clock.on = False
        return outputs(self, **drafts)

    for (owner, method, name), original in zip(seams, originals, strict=True):
        setattr(owner, method, _wrapped(clock, name, original))
    Batch.begin, Batch.outputs = started, ended  # type: ignore[method-assign]
    try:
        yield
    finally:
        Batch.begin, Batch.outputs = begin, outputs  # type: ignore[method-assign]
        for (owner, method, _), original in zip(seams, originals, strict=True):
            setattr(owner, method, original)


def _cycle_ms(groups: Sequence[Sequence[DecodeOutput]]) -> tuple[float, int]:
    """Milliseconds of a cycle, and how many there were: a group runs until its slowest row is done."""
    cycles = sum(max(output.trace.target_forwards for output in outputs) for outputs in groups)
    return 1e3 * sum(outputs[0].trace.decode_seconds for outputs in groups) / cycles, cycles


def _forwards(decode: Decode, clock: Clock) -> tuple[float, float, float]:
    """Milliseconds per cycle of one decode, of its drafting and of its verifying."""
    with timed_cycles(clock):
        cycle, cycles = _cycle_ms(decode())
    draft, verify = (1e3 * clock.seconds(name) / cycles for name in ("draft", "verify"))
    return cycle, draft, verify


def _summary(rows: Sequence[tuple[float, float, float]]) -> dict[str, float]:
    """Medians over the repeats; the share is taken within each, so that a slow moment does not enter it."""
    draft, verify = (statistics.median(row[i] for row in rows) for i in (1, 2))
    share = statistics.median((cycle - draft - verify) / (draft + verify) for cycle, draft, verify in rows)
    return {"draft_ms": draft, "verify_ms": verify, "overhead": share}


def _sleep_enough(decode: Decode) -> int:
    """Ticks of sleep after which a forward's launches are queued in time, or the longest tried."""
    for doubling in range(DOUBLINGS + 1):
        clock = DeviceClock(FIRST_SLEEP << doubling)
        with timed_cycles(clock):
            decode()
        if clock.late == 0:
            break
    return clock.sleep


def overhead(decode: Decode, repeats: int, cuda: bool) -> dict[str, Any]:
    """Medians over the repeats of a cycle's milliseconds, and the loop's share; see the module for what it counts.

    Args:
        decode: decodes all groups speculatively, warmed up.

    Returns:
        ``cycle_ms``; ``draft_ms``, ``verify_ms`` and ``overhead`` by ``measured_by``; ``spans``: the same three by
        every kind of span there is; on CUDA ``gapless``.
    """
    if not cuda:
        rows = [_forwards(decode, Clock()) for _ in range(repeats)]
        calls = _summary(rows)
        cycle = statistics.median(row[0] for row in rows)
        return {"cycle_ms": cycle, "measured_by": "calls", **calls, "spans": {"calls": calls}}
    sleep, gapless = _sleep_enough(decode), []
    kinds: dict[str, list[tuple[float, float, float]]] = {"kernels": [], "events": [], "launches": []}
    for _ in range(repeats):
        cycle, _ = _cycle_ms(decode())
        asleep = DeviceClock(sleep)
        for name, clock in (("kernels", asleep), ("events", DeviceClock()), ("launches", Clock())):
            kinds[name].append((cycle, *_forwards(decode, clock)[1:]))
        gapless.append(asleep.gapless)
    spans = {name: _summary(rows) for name, rows in kinds.items()}
    cycle = statistics.median(row[0] for row in kinds["kernels"])
    return {
        "cycle_ms": cycle,
        "measured_by": "kernels",
        **spans["kernels"],
        "spans": spans,
        "gapless": min(gapless),
    }
