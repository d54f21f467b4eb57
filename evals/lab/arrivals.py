"""Open loop: requests arrive when a Poisson process says so, whether or not the engine is ready for them.

Every time counts from the intended arrival. A driver that falls behind would otherwise hide the very waiting that an
overloaded engine causes ("coordinated omission").
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from nmm_serve.engines.base import Engine, Output, Request

MAX_THREADS = 512


@dataclass(frozen=True)
class Driven:
    """`outputs` with times from the intended arrival, the `delays_s` that are in them, and the seconds from the start
    to the last answer."""

    outputs: list[Output]
    delays_s: list[float]
    wall_s: float


def poisson(rate: float, count: int, seed: int) -> list[float]:
    """Seconds from the start of each of `count` arrivals: independent exponential gaps of mean 1/rate, not rescaled."""
    return np.random.default_rng(seed).exponential(1 / rate, count).cumsum().tolist()


def shifted(output: Output, delay_s: float) -> Output:
    """The output with its times counted from `delay_s` before the engine got it. Durations of parts stay."""
    timing = output.timing
    moved = replace(
        timing,
        ttft_s=None if timing.ttft_s is None else timing.ttft_s + delay_s,
        e2e_s=None if timing.e2e_s is None else timing.e2e_s + delay_s,
        token_s=tuple(t + delay_s for t in timing.token_s),
    )
    return replace(output, timing=moved)


def drive_in_batches(
    engine: Engine,
    requests: Sequence[Request],
    arrivals_s: Sequence[float],
    at_once: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
    progress: Callable[[int], None] = lambda _: None,
) -> Driven:
    """For an engine in this process, which answers a list at a time: when it is free it gets all that have arrived, at
    most `at_once` of them; who comes meanwhile waits."""
    outputs: list[Output] = []
    delays: list[float] = []
    start = clock()
    while len(outputs) < len(requests):
        first = len(outputs)
        now = clock() - start
        if arrivals_s[first] > now:
            sleep(arrivals_s[first] - now)
            now = clock() - start
        last = first + 1
        while last < min(len(requests), first + at_once) and arrivals_s[last] <= now:
            last += 1
        answers = engine.generate(requests[first:last])
        for output, arrival in zip(answers, arrivals_s[first:last], strict=True):
            delays.append(max(0.0, now - arrival))
            outputs.append(shifted(output, delays[-1]))
        progress(last - first)
    return Driven(outputs, delays, clock() - start)


def drive_in_parallel(
    engine: Engine,
    requests: Sequence[Request],
    arrivals_s: Sequence[float],
    *,
    progress: Callable[[int], None] = lambda _: None,
) -> Driven:
    """For a server: each request is sent at its arrival, whatever the others do. The delay is all that passes between
    the intended arrival and the engine's clock: a late thread, and encoding the images."""
    start = time.perf_counter()

    def ask(request: Request, arrival: float) -> tuple[Output, float, float]:
        time.sleep(max(0.0, arrival - (time.perf_counter() - start)))
        sent = time.perf_counter() - start
        (output,) = engine.generate([request])
        done = time.perf_counter() - start
        begin = sent if output.timing.e2e_s is None else done - output.timing.e2e_s
        delay = max(0.0, begin - arrival)
        progress(1)
        return shifted(output, delay), delay, done

    with ThreadPoolExecutor(min(MAX_THREADS, len(requests)), thread_name_prefix="arrivals") as pool:
        found = list(pool.map(ask, requests, arrivals_s))
    outputs, delays, ends = (list(column) for column in zip(*found, strict=True))
    return Driven(outputs, delays, max(ends))
