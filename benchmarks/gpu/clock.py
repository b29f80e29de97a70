"""Times of calls on a GPU: who measures them, whose turn it is, and what the numbers say.

A clock has two methods, ``times(call, count)``, microseconds of each of ``count`` calls one after
another, and ``seconds()``, which goes on by itself.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

Call = Callable[[], object]
TURN = 0.01  # seconds
LEAST, MOST = 5, 400  # calls


class Events:
    """CUDA events around each call, all of them queued at once: the device is never asked for."""

    def times(self, call: Call, count: int) -> list[float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        torch.cuda.synchronize()
        return [1e3 * before.elapsed_time(after) for before, after in itertools.pairwise(events)]

    def seconds(self) -> float:
        return time.perf_counter()


def take_turns(calls: dict[str, Call], clock, seconds: float) -> dict[str, list[float]]:
    """Microseconds of single calls, under the names of the calls.

    The calls take turns of about 10 ms, in an order that rotates, until each has had ``seconds``
    (of all together ``seconds * len(calls)``) or MOST calls, and LEAST calls in any case: a device
    whose clock changes changes it for all of them. The first call of each turn is not counted, as
    it waits for the host while the others are queued behind it.
    """
    names = list(calls)
    for name in names:
        clock.times(calls[name], 2)
    counts = {}
    for name in names:
        once = statistics.median(clock.times(calls[name], 3))
        counts[name] = max(1, min(50, int(TURN * 1e6 / max(once, 1.0))))
    times: dict[str, list[float]] = {name: [] for name in names}
    end = clock.seconds() + seconds * len(names)
    turn = 0
    while any(len(own) < LEAST for own in times.values()) or (
        clock.seconds() < end and any(len(own) < MOST for own in times.values())
    ):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name] += clock.times(calls[name], 1 + counts[name])[1:]
        turn += 1
    return times


class Wall:
    """A clock for calls on the CPU."""

    def times(self, call: Call, count: int) -> list[float]:
        ticks = [time.perf_counter()]
        for _ in range(count):
            call()
            ticks.append(time.perf_counter())
        return [1e6 * (after - before) for before, after in itertools.pairwise(ticks)]

    def seconds(self) -> float:
        return time.perf_counter()


class Spread(NamedTuple):
    """Microseconds: the median, and the values that a fifth of the calls lie below and above."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, times: Sequence[float]) -> "Spread":
        if len(times) == 1:
            return cls(times[0], times[0], times[0])
        fifths = statistics.quantiles(times, n=5, method="inclusive")
        return cls(statistics.median(times), fifths[0], fifths[3])


class Line(NamedTuple):
    """time = fixed + T * step, in microseconds."""

    step: float
    fixed: float


def line_through(points: Sequence[tuple[int, float]]) -> Line:
    """Least squares with weights 1 / time^2, for errors that grow in proportion to the time.

    points: (T, microseconds), for two different T at least.
    """
    if len({T for T, _ in points}) < 2:
        raise ValueError(f"line_through: points must have two different T, got {list(points)}")
    weights = [1 / time**2 for _, time in points]
    total = sum(weights)
    mean_T = sum(w * T for w, (T, _) in zip(weights, points, strict=True)) / total
    mean = sum(w * time for w, (_, time) in zip(weights, points, strict=True)) / total
    over = sum(w * (T - mean_T) * (t - mean) for w, (T, t) in zip(weights, points, strict=True))
    under = sum(w * (T - mean_T) ** 2 for w, (T, _) in zip(weights, points, strict=True))
    return Line(over / under, mean - over / under * mean_T)
