"""How fast a model answers: where the time of a request goes, at several concurrencies, shapes and arrival rates.

Closed loop in waves: `concurrency` requests are handed over together, and the next wave starts when all of them are
done. Every engine can do that through `Engine.generate`, so their numbers can be set side by side. Open loop: requests
arrive when a Poisson process says so (`evals/lab/arrivals.py`).

- Every request asks for the same number of new tokens (end tokens are ignored), so a talkative model is not slower.
- Every request has an image of its own, so that no image or prefix cache answers for the model.
- A failed request is counted and named, and its time enters no average.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from nmm_serve.engines.base import Engine, Output, Request
from nmm_serve.errors import ConfigError
from nmm_serve.evals import stats
from nmm_serve.evals.lab import resources
from nmm_serve.evals.lab.arrivals import drive_in_batches, drive_in_parallel, poisson
from nmm_serve.evals.lab.workload import Pictures, Workload, set_resolution

QUANTILES = (0.5, 0.9, 0.99)
SLO_METRICS = ("ttft", "tpot", "e2e")
SWEEPS = {"resolution": "resolution", "images": "images", "prompt": "prompt_words", "output": "output_tokens"}
"""What `--sweep` can vary, and the field of `Workload` that it sets."""
PARTS = ("image_s", "host_s", "encoder_s", "prefill_s")

DEFINITIONS = {
    "arrival": "closed loop in waves: `concurrency` requests together, the next wave when all of them are done; open "
    "loop: independent exponential gaps (Poisson), every time counted from the intended arrival",
    "ttft_s": "time to first token: seconds from handing over the request (open loop: from its intended arrival) to "
    "its first new token",
    "tpot_s": "time per output token: (e2e - ttft) / (tokens - 1); requests with one token have none, are left out and "
    "counted under one_token",
    "itl_s": "inter-token latency: gaps between successive tokens (streamed chunks for a URL), pooled over requests; "
    "itl_unit says which of the two",
    "e2e_s": "end-to-end latency: seconds from handing over the request (open loop: from its intended arrival) to its "
    "last token",
    "image_s": "decoding the request's image files and scaling them to the model's size",
    "host_s": "the rest of the host's work: chat template, tokenizer, cutting patches, making the batch",
    "encoder_s": "pixels to decoder inputs: one linear projection (early fusion), or ViT and connector (late); of the "
    "whole batch where the engine runs it as one",
    "prefill_s": "the decoder over the prompt, the output layer and the choice of the first token; of the whole batch",
    "wait_s": "ttft - image - host - encoder - prefill: waiting for other requests, and in open loop for dispatch",
    "decode_s": "e2e - ttft",
    "dispatch_delay_s": "open loop: seconds from the intended arrival until the engine's clock started",
    "output_tokens_per_s": "new tokens of successful requests / wall-clock seconds of all measured waves (open loop: "
    "from the start to the last answer)",
    "requests_per_s": "successful requests / the same seconds",
    "goodput_requests_per_s": "successful requests that meet every limit of the SLO / the same seconds; a request of "
    "one token has no TPOT and meets any",
    "failed": "requests that came back with an error; they enter no average",
    "quantiles": "of single requests, linear between order statistics; intervals: percentile bootstrap over whole "
    "waves, whose requests wait for each other; in open loop over requests, as if they were independent, and so too "
    "narrow where they queue",
    "peak_rss_bytes": "largest resident memory of the engine's process since the model was loaded, where the system "
    "can start that count anew, else since the process began",
}

UNSEEN = {
    "vllm": "vLLM scales images, encodes and prefills inside its own steps, which do not tell these parts apart",
    "openai": "a server does not tell the parts of its time",
}
"""Why an engine gives no `PARTS`."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked of the engine.

    The workload is measured at every concurrency; each further cell changes one thing: a shape of the request (`sweep`,
    at the first concurrency) or the way of arrival (`rates`).
    """

    concurrencies: tuple[int, ...] = (1, 4)
    requests: int = 16
    """Measured requests per cell, rounded up to whole waves."""
    warmup: int = 2
    """Waves before measuring each cell; they compile and allocate, and are counted apart."""
    output_tokens: int = 32
    prompt: str = "Describe the image."
    sweep: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """A name of `SWEEPS` and its values."""
    rates: tuple[float, ...] = ()
    """Requests per second of open-loop cells."""
    slo: tuple[tuple[str, float], ...] = ()
    """A name of `SLO_METRICS` and its limit in seconds."""

    def __post_init__(self) -> None:
        for name in ("requests", "output_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"latency {name} is {getattr(self, name)}; expected at least 1")
        if not self.concurrencies or min(self.concurrencies) < 1:
            raise ConfigError(f"latency concurrencies are {self.concurrencies}; expected numbers of at least 1")
        for rate in self.rates:
            if not 0 < rate < math.inf:
                raise ConfigError(f"latency rate is {rate}; expected requests per second, over 0")
        for name, values in self.sweep:
            if name not in SWEEPS or not values:
                raise ConfigError(f"latency sweep {name!r} = {values}; expected values for one of {', '.join(SWEEPS)}")
            for value in values:
                self.workload.with_value(SWEEPS[name], value)
        for name, limit in self.slo:
            if name not in SLO_METRICS or not 0 < limit < math.inf:
                raise ConfigError(f"SLO {name!r} = {limit}; expected a limit over 0 for {', '.join(SLO_METRICS)}")

    def waves(self, concurrency: int) -> int:
        return math.ceil(self.requests / concurrency)

    @property
    def workload(self) -> Workload:
        return Workload(prompt=self.prompt, output_tokens=self.output_tokens)

    def shapes(self) -> list[tuple[str, Workload]]:
        """The cells of the sweep: what varies, and the request."""
        return [
            (name, self.workload.with_value(SWEEPS[name], value)) for name, values in self.sweep for value in values
        ]

    @property
    def total(self) -> int:
        """Requests in all, warm-up included."""
        closed = [*self.concurrencies, *[self.concurrencies[0]] * len(self.shapes())]
        return sum(c * (self.warmup + self.waves(c)) for c in closed) + len(self.rates) * (self.warmup + self.requests)


def measure(
    engine: Engine,
    images: Sequence[Any],
    load: Load,
    *,
    progress: Callable[[int], None] = lambda _: None,
    seed: int = 0,
    startup_s: float | None = None,
) -> dict[str, Any]:
    """Measure every cell of `load`; `images` are paths, taken in turn, or none. Gives the record's latency section."""
    pictures = Pictures(images, seed)
    numbers = iter(range(10**9))

    def take(workload: Workload, count: int) -> list[Request]:
        return [workload.request(pictures, first) for first in workload.take(numbers, count)]

    resources.reset_peak()
    levels = [
        {"concurrency": c, **_closed(engine, load.workload, c, take, load, progress, seed)} for c in load.concurrencies
    ]
    least = load.concurrencies[0]
    sweep = [
        {"varies": name, "concurrency": least, **_closed(engine, shape, least, take, load, progress, seed)}
        for name, shape in load.shapes()
    ]
    open_loop = [_open(engine, rate, take, load, progress, seed) for rate in load.rates]
    all_cells = [*levels, *sweep, *open_loop]
    return {
        "definitions": DEFINITIONS,
        "output_tokens": load.output_tokens,
        "prompt": load.prompt,
        "images": pictures.describe(),
        "caches": caches(engine),
        "slo_s": dict(load.slo),
        "warmup_waves": load.warmup,
        "startup_s": startup_s,
        **({} if startup_s is not None else {"startup_reason": "the engine was open already"}),
        "artefact": resources.artefact(engine.model),
        "memory": _memory(engine),
        "n": sum(cell["n"] for cell in all_cells),
        "failed": sum(cell["failed"] for cell in all_cells),
        "levels": levels,
        "sweep": sweep,
        "open_loop": open_loop,
    }


def cells(section: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every measured cell of a latency section, with words for it."""
    for cell in section.get("levels", ()):
        yield f"concurrency {cell['concurrency']}", cell
    for cell in section.get("sweep", ()):
        yield f"{cell['varies']} {cell['workload'][SWEEPS[cell['varies']]]}", cell
    for cell in section.get("open_loop", ()):
        yield f"{cell['rate']:g} requests/s", cell


def caches(engine: Engine) -> dict[str, Any]:
    """What could have answered in place of the model, and what was done against it."""
    about = engine.describe()
    unknown = "not told by the server" if engine.name == "openai" else "none"
    return {
        "prefix_caching": about.get("prefix_caching", unknown),
        "image_cache": about.get("image_cache", unknown),
        "repeated_images": 0,
        "how": "no image is sent twice, and an image (or a number) comes first in every prompt, so that no prompt "
        "shares more than the special tokens before it with another",
    }


def _memory(engine: Engine) -> dict[str, Any]:
    if engine.name == "openai":
        reason = "a server's memory cannot be seen from its URL"
        return {"peak_rss_bytes": None, "peak_gpu_bytes": None, "reason": reason}
    return resources.memory()


Take = Callable[[Workload, int], list[Request]]


def _warm_up(engine: Engine, workload: Workload, concurrency: int, waves: int, take: Take) -> dict[str, Any]:
    outputs: list[Output] = []
    for _ in range(waves):
        outputs += engine.generate(take(workload, concurrency))
    first = outputs[0].timing.e2e_s if outputs else None
    return {"requests": len(outputs), "failed": sum(o.error is not None for o in outputs), "first_e2e_s": first}


def _closed(
    engine: Engine,
    workload: Workload,
    concurrency: int,
    take: Take,
    load: Load,
    progress: Callable[[int], None],
    seed: int,
) -> dict[str, Any]:
    set_resolution(engine, workload.resolution)
    warmup = _warm_up(engine, workload, concurrency, load.warmup, take)
    progress(warmup["requests"])
    outputs: list[Output] = []
    wall_s = 0.0
    for _ in range(load.waves(concurrency)):
        wave = take(workload, concurrency)  # reading the image files is not the engine's time
        start = time.perf_counter()
        outputs += engine.generate(wave)
        wall_s += time.perf_counter() - start
        progress(concurrency)
    summary = summarise(
        outputs, wall_s, workload.output_tokens, seed, wave=concurrency, slo=load.slo, reason=UNSEEN.get(engine.name)
    )
    return {"workload": workload.as_dict(), "warmup": warmup, **summary}


def _open(
    engine: Engine, rate: float, take: Take, load: Load, progress: Callable[[int], None], seed: int
) -> dict[str, Any]:
    workload = load.workload
    set_resolution(engine, workload.resolution)
    warmup = _warm_up(engine, workload, 1, load.warmup, take)
    progress(warmup["requests"])
    requests = take(workload, load.requests)
    arrivals_s = poisson(rate, len(requests), seed)
    at_once = max(load.concurrencies)
    if engine.name == "openai":
        driven = drive_in_parallel(engine, requests, arrivals_s, progress=progress)
        admission = "each request is sent at its arrival"
    else:
        driven = drive_in_batches(engine, requests, arrivals_s, at_once, progress=progress)
        admission = f"a free engine gets all that have arrived, at most {at_once}; who comes meanwhile waits"
    summary = summarise(
        driven.outputs, driven.wall_s, workload.output_tokens, seed, slo=load.slo, reason=UNSEEN.get(engine.name)
    )
    return {
        "rate": rate,
        "offered_rate": len(arrivals_s) / arrivals_s[-1],
        "admission": admission,
        "workload": workload.as_dict(),
        "warmup": warmup,
        **summary,
        "dispatch_delay_s": quantiles(driven.delays_s, seed=seed),
    }


def summarise(
    outputs: Sequence[Output],
    wall_s: float,
    output_tokens: int,
    seed: int = 0,
    *,
    wave: int = 1,
    slo: Sequence[tuple[str, float]] = (),
    reason: str | None = None,
) -> dict[str, Any]:
    """Quantiles with intervals over the successful requests. A number that cannot be had is None with a reason.

    Args:
        wave: how many of `outputs`, in their order, were handed over together each time. They wait for each other, so
            that a wave and not a request is what intervals draw.
        reason: why the engine does not tell the parts of a request.
    """
    good = [output for output in outputs if output.error is None]
    errors = [output.error for output in outputs if output.error is not None]
    waves = [position // wave for position, output in enumerate(outputs) if output.error is None]
    tokens = [output.num_tokens for output in good]
    timings = [output.timing for output in good]
    gaps = [(b - a, w) for t, w in zip(timings, waves, strict=True) for a, b in itertools.pairwise(t.token_s)]
    paces = [(tpot(output), w) for output, w in zip(good, waves, strict=True) if output.num_tokens > 1]
    chunks = sum(len(t.token_s) for t in timings)
    drawn = partial(quantiles, seed=seed, unit="request" if wave == 1 else "wave")
    parts = {name: drawn([getattr(t, name) for t in timings], waves, reason=reason) for name in PARTS}
    return {
        "n": len(outputs),
        "failed": len(errors),
        "errors": sorted({str(error) for error in errors}),
        "wall_s": wall_s,
        "short": sum(n != output_tokens for n in tokens),
        "one_token": sum(n <= 1 for n in tokens),
        "prompt_tokens": _range([output.num_prompt_tokens for output in good]),
        "requests_per_s": len(good) / wall_s if good else None,
        "output_tokens_per_s": sum(tokens) / wall_s if good else None,
        "ttft_s": drawn([t.ttft_s for t in timings], waves, keep=True),
        "tpot_s": drawn([pace for pace, _ in paces], [w for _, w in paces], keep=True),
        "itl_s": drawn([gap for gap, _ in gaps], [w for _, w in gaps]),
        "itl_unit": "token" if chunks == sum(tokens) else f"chunk ({chunks} chunks for {sum(tokens)} tokens)",
        "e2e_s": drawn([t.e2e_s for t in timings], waves, keep=True),
        "parts": parts
        | {
            "wait_s": drawn([_wait(output) for output in good], waves, reason=reason),
            "decode_s": drawn([_difference(t.e2e_s, t.ttft_s) for t in timings], waves),
        },
        **_goodput(outputs, good, wall_s, slo),
    }


def tpot(output: Output) -> float | None:
    rest = _difference(output.timing.e2e_s, output.timing.ttft_s)
    return None if rest is None or output.num_tokens <= 1 else rest / (output.num_tokens - 1)


def _difference(later: float | None, earlier: float | None) -> float | None:
    return None if later is None or earlier is None else later - earlier


def _wait(output: Output) -> float | None:
    timing = output.timing
    known = [part for name in PARTS if (part := getattr(timing, name)) is not None]
    return None if len(known) < len(PARTS) else _difference(timing.ttft_s, sum(known))


def _range(values: Sequence[int]) -> dict[str, int] | None:
    return {"min": min(values), "max": max(values)} if values else None


def _goodput(
    outputs: Sequence[Output], good: Sequence[Output], wall_s: float, slo: Sequence[tuple[str, float]]
) -> dict[str, Any]:
    """Requests per second that meet every limit, and their share of all requests, failed ones included."""
    if not slo:
        return {}
    unknown = {"goodput_requests_per_s": None, "goodput_share": None}
    met = 0
    for output in good:
        times = {"ttft": output.timing.ttft_s, "e2e": output.timing.e2e_s, "tpot": tpot(output)}
        if output.num_tokens <= 1:
            times["tpot"] = 0.0
        if any(times[name] is None for name, _ in slo):
            return unknown | {"goodput_reason": "the engine did not time what the SLO limits"}
        met += all((times[name] or 0.0) <= limit for name, limit in slo)
    return {"goodput_requests_per_s": met / wall_s, "goodput_share": met / len(outputs)} if outputs else unknown


def quantiles(
    values: Sequence[float | None],
    waves: Sequence[int] | None = None,
    *,
    seed: int,
    unit: str = "request",
    keep: bool = False,
    reason: str | None = None,
) -> dict[str, Any]:
    """`waves`: of each value, for the intervals. `keep` puts the single values, and their waves, into the record too: a
    comparison of two runs draws from them."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        lacking = len(values) - len(known)
        if not lacking:
            reason = "no successful request"
        elif reason is None or known:
            reason = f"the engine timed {len(known)} of {len(values)} requests"
        return {"n": len(known), "mean": None, "reason": reason}
    intervals = stats.quantile_intervals(known, QUANTILES, waves, seed=seed, unit=unit)
    summary: dict[str, Any] = {"n": len(known), "mean": float(np.mean(known))}
    for quantile, interval in zip(QUANTILES, intervals, strict=True):
        summary[f"p{100 * quantile:g}"] = float(np.quantile(known, quantile))
        summary[f"p{100 * quantile:g}_interval"] = interval.as_dict() if interval else None
    if keep:
        summary["values"] = known
        summary |= {} if waves is None else {"waves": list(waves)}
    return summary
