"""The engine protocol: the one door through which evaluation and serving see a model.

Every engine takes the same requests and gives the same outputs. The torch engine is the slow, obvious
oracle; the others are tested against it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from PIL import Image

from nmm_serve.engines.occupancy import Occupancy

Progress = Callable[[int], None]
"""Called with the number of requests that have finished since the last call."""
CHUNK_BATCHES = 8
"""Batches in a chunk, for engines that answer in chunks: a batch that is not full comes once in so many."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to decode. `temperature == 0` is greedy. `max_tokens` counts new tokens only."""

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False
    """Return the log-probability of each chosen token."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt: chat `messages`, or a raw `prompt`; exactly one of the two.

    `messages` are in the OpenAI shape: `{"role": ..., "content": str | [parts]}` with parts
    `{"type": "text", "text": ...}` and `{"type": "image"}`. A raw `prompt` is text that marks each image with
    `<|image|>`, or token ids, taken as they are, with one id of `<|image|>` for each image. `images` are taken in the
    order in which they appear. A file is read when the request's turn comes; one that cannot be read fails the request.
    """

    messages: Sequence[dict[str, Any]] | None = None
    prompt: str | Sequence[int] | None = None
    images: Sequence[Image.Image | Path] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)

    def __post_init__(self) -> None:
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("a Request takes either messages or a prompt")


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds. None: this engine cannot see it.

    `ttft_s`, `e2e_s` and `token_s` count from the moment the request was handed over; the others are durations of parts
    of the time to first token. `token_s` holds the arrival of each new token (or streamed chunk); `ttft_s` is its first
    entry. What requests of one batch do together takes each of them its whole time.
    """

    ttft_s: float | None = None
    e2e_s: float | None = None
    preprocess_s: float | None = None
    """Everything before the model: `image_s` and `host_s`, of the whole batch where it is one."""
    image_s: float | None = None
    """Decoding the image files and scaling the pixels."""
    host_s: float | None = None
    """The rest of the host's work: template, tokenizer, patches, batch."""
    encoder_s: float | None = None
    """Pixels to decoder inputs: the patch projection (early), or ViT and connector (late)."""
    prefill_s: float | None = None
    """The decoder over the prompt, output layer and choice of the first token included."""
    token_s: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Output:
    """What came back. A request that failed has `error` set and an empty text; it is never scored as an answer."""

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: str = "stop"
    """`stop` (end token or stop string), `length`, or `error`."""
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    """New tokens. An engine that cannot see token ids (a server's URL) still counts them."""
    logprobs: tuple[float, ...] | None = None
    timing: Timing = field(default_factory=Timing)
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class ScoreRequest:
    """Log-likelihood of `continuation` after `context`.

    Both as text (the context raw, with `<|image|>` for each image) or both as token ids, which are taken as they are:
    whoever scores a word within a text must cut the tokens of the whole, since tokens may reach over the boundary.
    """

    context: str | Sequence[int]
    continuation: str | Sequence[int]
    images: Sequence[Image.Image] = ()


@dataclass(frozen=True, kw_only=True)
class Score:
    """Sum of log-probabilities (nats) of the continuation's tokens, and whether greedy decoding would give them."""

    logprob: float
    is_greedy: bool
    num_tokens: int


@runtime_checkable
class Engine(Protocol):
    """A loaded model that answers requests. Close it when done, or use it as a context manager."""

    name: str
    """`torch`, `vllm`, `openai`, ..."""
    model: str
    """The checkpoint directory or URL."""

    def generate(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Output]:
        """Answer every request, in order. A request that fails is an Output with `error`, never an exception."""
        ...

    def stream(self, requests: Iterable[Request], occupancy: Occupancy) -> Iterator[tuple[int, Output]]:
        """Answer requests as they come, however many: (position, output) of each as soon as it is there, in any order.

        No more are taken from `requests` than the engine needs to be kept busy. `occupancy` is told how full it was.
        """
        ...

    def loglikelihood(self, requests: Sequence[ScoreRequest], progress: Progress | None = None) -> list[Score]:
        """Score every continuation, in order."""
        ...

    def describe(self) -> dict[str, Any]:
        """Versions, dtype, device and settings that belong into a record."""
        ...

    def close(self) -> None: ...


class InChunks:
    """`stream` for an engine that works on lists: chunk after chunk, each waiting for the last of the one before.

    The engine gives its `name`, `generate` and, as `batch_size`, the requests that it runs at once.
    """

    name: str
    batch_size = 16

    def stream(self, requests: Iterable[Request], occupancy: Occupancy) -> Iterator[tuple[int, Output]]:
        occupancy.unknown(f"the {self.name} engine does not tell how many requests ran in each step")
        rest, done = iter(requests), 0
        while chunk := list(islice(rest, CHUNK_BATCHES * self.batch_size)):
            yield from enumerate(self.generate(chunk), done)  # type: ignore[attr-defined]
            done += len(chunk)
        occupancy.end()
