"""How fast a model answers: time to first token, time per output token, throughput, at several concurrencies.

Closed loop in waves: `concurrency` requests are handed over together, and the next wave starts when all of them are
done. Every engine can do that through `Engine.generate`, so their numbers can be set side by side.

- Every request asks for the same number of new tokens (end tokens are ignored), so a talkative model is not slower.
- Every request has an image of its own, so that no image or prefix cache answers for the model.
- A failed request is counted and named, and its time enters no average.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from nmm_serve.engines.base import Engine, Output, Request, SamplingParams
from nmm_serve.errors import ConfigError, ImageError
from nmm_serve.evals import stats
from nmm_serve.images import load_image

QUANTILES = (0.5, 0.9, 0.99)

DEFINITIONS = {
    "arrival": "closed loop in waves: `concurrency` requests together, the next wave when all of them are done",
    "ttft_s": "time to first token: seconds from handing over the request to its first new token",
    "tpot_s": "time per output token: (e2e - ttft) / (tokens - 1); requests with one token have none",
    "itl_s": "inter-token latency: gaps between successive tokens (streamed chunks for a URL), pooled over requests",
    "e2e_s": "end-to-end latency: seconds from handing over the request to its last token",
    "output_tokens_per_s": "new tokens of successful requests / wall-clock seconds of all measured waves",
    "requests_per_s": "successful requests / wall-clock seconds of all measured waves",
    "failed": "requests that came back with an error; they enter no average",
}


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked of the engine."""

    concurrencies: tuple[int, ...] = (1, 4)
    requests: int = 16
    """Measured requests per concurrency, rounded up to whole waves."""
    warmup: int = 2
    """Waves before measuring at each concurrency; they compile and allocate, and are thrown away."""
    output_tokens: int = 32
    prompt: str = "Describe the image."

    def __post_init__(self) -> None:
        for name in ("requests", "output_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"latency {name} is {getattr(self, name)}; expected at least 1")
        if not self.concurrencies or min(self.concurrencies) < 1:
            raise ConfigError(f"latency concurrencies are {self.concurrencies}; expected numbers of at least 1")

    def waves(self, concurrency: int) -> int:
        return math.ceil(self.requests / concurrency)

    @property
    def total(self) -> int:
        """Requests in all, warm-up included."""
        return sum(c * (self.warmup + self.waves(c)) for c in self.concurrencies)


def measure(
    engine: Engine,
    images: Sequence[Any],
    load: Load,
    *,
    progress: Callable[[int], None] = lambda _: None,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure every concurrency of `load`; `images` are paths, taken in turn. Returns the record's latency section."""
    requests = _requests(images, load)
    levels = []
    for concurrency in load.concurrencies:
        for _ in range(load.warmup):
            engine.generate([next(requests) for _ in range(concurrency)])
            progress(concurrency)
        outputs: list[Output] = []
        wall_s = 0.0
        for _ in range(load.waves(concurrency)):
            wave = [next(requests) for _ in range(concurrency)]  # decoding the image files is not the engine's time
            start = time.perf_counter()
            outputs += engine.generate(wave)
            wall_s += time.perf_counter() - start
            progress(concurrency)
        levels.append({"concurrency": concurrency, **summarise(outputs, wall_s, load.output_tokens, seed)})
    failed = sum(level["failed"] for level in levels)
    return {
        "definitions": DEFINITIONS,
        "output_tokens": load.output_tokens,
        "prompt": load.prompt,
        "warmup_waves": load.warmup,
        "n": sum(level["n"] for level in levels),
        "failed": failed,
        "levels": levels,
    }


def summarise(outputs: Sequence[Output], wall_s: float, output_tokens: int, seed: int = 0) -> dict[str, Any]:
    """Quantiles with intervals over the successful requests. A number that cannot be had is None with a reason."""
    good = [output for output in outputs if output.error is None]
    errors = [output.error for output in outputs if output.error is not None]
    tokens = [output.num_tokens for output in good]
    timings = [output.timing for output in good]
    gaps = [b - a for t in timings for a, b in zip(t.token_s, t.token_s[1:], strict=False)]
    return {
        "n": len(outputs),
        "failed": len(errors),
        "errors": sorted({str(error) for error in errors}),
        "wall_s": wall_s,
        "short": sum(n != output_tokens for n in tokens),
        "requests_per_s": len(good) / wall_s if good else None,
        "output_tokens_per_s": sum(tokens) / wall_s if good else None,
        "ttft_s": _quantiles([t.ttft_s for t in timings], seed, keep=True),
        "tpot_s": _quantiles([_tpot(output) for output in good if output.num_tokens > 1], seed, keep=True),
        "itl_s": _quantiles(gaps, seed),
        "e2e_s": _quantiles([t.e2e_s for t in timings], seed, keep=True),
    }


def _tpot(output: Output) -> float | None:
    timing = output.timing
    if timing.ttft_s is None or timing.e2e_s is None:
        return None
    return (timing.e2e_s - timing.ttft_s) / (output.num_tokens - 1)


def _quantiles(values: Sequence[float | None], seed: int, keep: bool = False) -> dict[str, Any]:
    """`keep` puts the single values into the record too: a comparison of two runs draws from them."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        lacking = len(values) - len(known)
        reason = f"the engine timed {len(known)} of {len(values)} requests" if lacking else "no successful request"
        return {"n": len(known), "mean": None, "reason": reason}
    intervals = stats.quantile_intervals(known, QUANTILES, seed=seed)
    summary: dict[str, Any] = {"n": len(known), "mean": float(np.mean(known))}
    for quantile, interval in zip(QUANTILES, intervals, strict=True):
        summary[f"p{100 * quantile:g}"] = float(np.quantile(known, quantile))
        summary[f"p{100 * quantile:g}_interval"] = interval.as_dict() if interval else None
    if keep:
        summary["values"] = known
    return summary


def _requests(images: Sequence[Any], load: Load) -> Iterator[Request]:
    """Endless requests with distinct images. When the images run out, a corner pixel tells the rounds apart."""
    sampling = SamplingParams(max_tokens=load.output_tokens, ignore_eos=True)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": load.prompt}]}]
    index = 0
    while True:
        image = load_image(images[index % len(images)])
        yield Request(messages=messages, images=(_marked(image, index // len(images)),), sampling=sampling)
        index += 1


def _marked(image: Image.Image, round_: int) -> Image.Image:
    if round_ == 0:
        return image
    if round_ >= 256**3:
        raise ImageError("more rounds over the images than one pixel can tell apart; give more images")
    image = image.copy()
    image.putpixel((0, 0), tuple((round_ >> shift) & 255 for shift in (16, 8, 0)))
    return image
