"""Any OpenAI-compatible server as an engine: ours, a plain vLLM, or someone else's.

Two things go beyond the OpenAI API and are used only where the server says that it is vLLM: token ids in the answer,
and the log-probabilities of a prompt's tokens.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any, TypeVar
from urllib.parse import urlsplit

from nmm_serve.engines.base import Output, Progress, Request, SamplingParams, Score, ScoreRequest
from nmm_serve.engines.occupancy import Occupancy
from nmm_serve.engines.openai_answer import Answer
from nmm_serve.engines.openai_messages import as_json, with_images
from nmm_serve.engines.openai_retries import NotFound, Retries, Retry
from nmm_serve.engines.server_load import EVERY_S, GAUGES, ServerLoad
from nmm_serve.errors import ConfigError, EngineError, ImageError, PromptError, unknown_name

CONCURRENCY = 64
"""Requests in flight to a server that does not tell how many it runs at once."""
IN_FLIGHT = 4
"""Short answers end together: while a server takes in those that follow, a batch of others has to wait there. With half
as many again as it ran at once, a batch of one-word answers was full a third of the time; with four times, always."""
MAX_CONCURRENCY = 256
METRICS_TIMEOUT_S = 2.0

T = TypeVar("T")


class OpenAIEngine:
    """Requests go out in parallel and are streamed, so that the arrival of each token can be seen.

    Timings count from the moment the request is sent, its images already encoded; they include retries.

    Args:
        model: the server's URL. Without a path, `/v1` is meant.
        api_key: default: the environment variable OPENAI_API_KEY.
        served_model: which of the server's models. May be left out where it serves only one.
        concurrency: requests in flight at most. Default: `IN_FLIGHT` times as many as the server runs at once, up to
            `MAX_CONCURRENCY`; `CONCURRENCY` where its metrics do not tell.
        timeout: seconds without a sign of life after which a request is tried again.
        max_retries: how often a request is tried again after 408, 409, 425, 429, 5xx, a timeout or a broken connection.

    Raises EngineError when the server cannot be reached, refuses the key, or does not have the model.
    """

    name = "openai"

    def __init__(
        self,
        model: str,
        *,
        api_key: str | None = None,
        served_model: str | None = None,
        concurrency: int | None = None,
        timeout: float = 600.0,
        max_retries: int = 5,
    ):
        try:
            import openai
        except ImportError:
            raise EngineError(
                "the openai package is not installed; install it with: pip install 'nmm-serve[evals]'"
            ) from None
        if concurrency is not None and concurrency < 1:
            raise ConfigError(f"concurrency must be at least 1, not {concurrency}")
        self.model = model
        self.openai = openai
        self.client = openai.OpenAI(
            base_url=base_url(model),
            api_key=api_key or os.environ.get("OPENAI_API_KEY") or "none",
            timeout=timeout,
            max_retries=0,  # a stream that breaks half-way has to be tried again too, so all of it is done here
        )
        self.persist = Retries(openai, model, timeout, max_retries)
        card = self._find_model(served_model)
        self.served_model: str = card["id"]
        self.owner: str = card.get("owned_by") or ""
        self.is_vllm = self.owner == "vllm"
        self.is_extended = self.owner in ("vllm", "nmm-serve")
        """Whether the server takes vLLM's additions: `ignore_eos`, `return_token_ids`, `prompt_logprobs`."""
        self.context_length: int | None = card.get("max_model_len")
        self.load = ServerLoad(self._metrics, self.owner) if self.owner in GAUGES else None
        self.at_once = self.load.limit() if self.load else None
        """Requests that the server runs at once; None where it does not tell."""
        known = min(IN_FLIGHT * self.at_once, MAX_CONCURRENCY) if self.at_once else CONCURRENCY
        self.concurrency = concurrency or known

    def __enter__(self) -> "OpenAIEngine":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self.client.close()

    def describe(self) -> dict[str, Any]:
        return {
            "engine": self.name,
            "url": str(self.client.base_url),
            "served_model": self.served_model,
            "server": f"vllm {self._vllm_version()}" if self.is_vllm else None,
            "openai": self.openai.__version__,
            "concurrency": self.concurrency,
        }

    def generate(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Output]:
        return self._in_parallel(self._answer, requests, progress)

    def stream(self, requests: Iterable[Request], occupancy: Occupancy) -> Iterator[tuple[int, Output]]:
        """`concurrency` requests are in flight until the last one is sent. A full batch is the server's where its
        metrics tell how many requests it runs at once, and else the client's own `concurrency`."""
        watched: AbstractContextManager[None] = nullcontext()
        if self.load and self.at_once:
            seen_by = f"the server's metrics, read every {EVERY_S:g} s: requests that run or wait"
            occupancy.start(self.at_once, seen_by, told=True)
            watched = self.load.watched(self.at_once, occupancy)
        else:
            seen_by = "the client: its requests in flight, since the server does not tell how many it runs at once"
            occupancy.start(self.concurrency, seen_by)

        def answer(item: tuple[int, Request]) -> tuple[int, Output]:
            position, request = item
            return position, self._answer(request, occupancy)

        with watched:
            yield from self._as_they_end(answer, enumerate(requests))
        occupancy.end()

    def loglikelihood(self, requests: Sequence[ScoreRequest], progress: Progress | None = None) -> list[Score]:
        """Raises EngineError for a context with images (the completions API takes none) and for a server that does
        not give the log-probabilities of a prompt."""
        for request in requests:
            if request.images:
                raise EngineError(
                    "a server cannot score a raw context with images; use the checkpoint with engine torch or vllm"
                )
            if not len(request.continuation):
                raise PromptError("an empty continuation has no likelihood")
        return self._in_parallel(self._score, requests, progress)

    # ---- requests

    def _in_parallel(self, work: Callable[[Any], T], items: Sequence[Any], progress: Progress | None) -> list[T]:
        results: dict[int, T] = {}
        for position, result in self._as_they_end(lambda item: (item[0], work(item[1])), enumerate(items)):
            results[position] = result
            if progress:
                progress(1)
        return [results[position] for position in range(len(items))]

    def _as_they_end(self, work: Callable[[Any], T], items: Iterable[Any]) -> Iterator[T]:
        """Results in the order in which they come. An unexpected error ends the whole call."""
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="openai-engine")
        rest = iter(items)
        # one waits behind each that is in flight, so that a thread never has to
        working = {pool.submit(work, item) for item in islice(rest, 2 * self.concurrency)}
        try:
            while working:
                done, working = wait_for(working, return_when=FIRST_COMPLETED)
                working |= {pool.submit(work, item) for item in islice(rest, len(done))}
                for future in done:
                    yield future.result()
        except BaseException:
            self.persist.stopping.set()  # no thread starts another attempt
            raise
        finally:
            pool.shutdown(cancel_futures=True)
            self.persist.stopping.clear()

    def _answer(self, request: Request, occupancy: Occupancy | None = None) -> Output:
        try:
            endpoint, body = self._body(request)
            with occupancy.in_flight() if occupancy else nullcontext():
                begin = time.perf_counter()
                return self.persist(lambda: self._stream(endpoint, body, begin))
        except (PromptError, ImageError, EngineError) as error:
            return Output(text="", finish_reason="error", error=str(error))

    def _body(self, request: Request) -> tuple[str, dict[str, Any]]:
        """Endpoint and request body. Raises PromptError or ImageError for what cannot be sent."""
        body: dict[str, Any] = {"model": self.served_model, "stream": True, "stream_options": {"include_usage": True}}
        body |= self._sampling(request.sampling, chat=request.messages is not None)
        if request.messages is not None:
            return "chat", body | {"messages": with_images(request.messages, request.images)}
        if request.images:
            raise PromptError("a server takes images only in chat messages, not in a raw prompt; use messages")
        assert request.prompt is not None
        return "completions", body | {"prompt": as_json(request.prompt)}

    def _sampling(self, params: SamplingParams, chat: bool) -> dict[str, Any]:
        body: dict[str, Any] = {
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
        }
        if params.seed is not None:
            body["seed"] = params.seed
        if params.stop:
            body["stop"] = list(params.stop)
        if params.logprobs:
            body["logprobs"] = True if chat else 1
        if params.ignore_eos and not self.is_extended:
            raise PromptError(f"ignore_eos is vLLM's own option, and {self.model} is not a vLLM server")
        if self.is_extended:
            body["extra_body"] = {"return_token_ids": True, "ignore_eos": params.ignore_eos}
        return body

    def _stream(self, endpoint: str, body: dict[str, Any], begin: float) -> Output:
        create: Any = self.client.chat.completions.create if endpoint == "chat" else self.client.completions.create
        answer = Answer()
        with create(**body) as stream:
            for chunk in self._chunks(stream):
                answer.add(chunk, time.perf_counter() - begin)
        if answer.finish_reason is None:
            raise Retry("the stream ended early")
        return answer.output(time.perf_counter() - begin)

    def _chunks(self, stream: Any) -> Iterator[Any]:
        """The client lets transport and JSON errors of a running stream through as they are."""
        chunks = iter(stream)
        while True:
            try:
                chunk = next(chunks)
            except StopIteration:
                return
            except self.openai.OpenAIError:
                raise
            except Exception as error:
                raise Retry(f"the stream broke ({type(error).__name__})") from error
            if not hasattr(chunk, "choices"):
                raise Retry("the stream holds something that is not a completion")
            yield chunk

    # ---- scores

    def _score(self, request: ScoreRequest) -> Score:
        return self.persist(lambda: self._score_vllm(request) if self.is_extended else self._score_echo(request))

    def _score_vllm(self, request: ScoreRequest) -> Score:
        context, target = (
            self._tokenize(side, is_context) if isinstance(side, str) else list(side)
            for side, is_context in ((request.context, True), (request.continuation, False))
        )
        response = self.client.completions.create(
            model=self.served_model,
            prompt=context + target,
            max_tokens=1,
            temperature=0,
            extra_body={"prompt_logprobs": 0},
        )
        entries: Any = getattr(response.choices[0], "prompt_logprobs", None)
        if not entries or len(entries) != len(context) + len(target):
            raise EngineError(f"{self.model} gave no log-probabilities of the prompt")
        scored = [entry[str(token)] for entry, token in zip(entries[len(context) :], target, strict=True)]
        return Score(
            logprob=sum(entry["logprob"] for entry in scored),
            is_greedy=all(entry["rank"] == 1 for entry in scored),
            num_tokens=len(target),
        )

    def tokenize(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text, by the server's own tokenizer. Raises EngineError where the server is not vLLM."""
        if not self.is_vllm:
            raise EngineError(f"{self.model} is not a vLLM server, so it does not tell its tokens")
        return self._in_parallel(
            lambda text: self.persist(lambda: self._tokenize(text, add_special_tokens)), texts, None
        )

    def _tokenize(self, text: str, add_special_tokens: bool) -> list[int]:
        body = {"model": self.served_model, "prompt": text, "add_special_tokens": add_special_tokens}
        response: Any = self._root.post("/tokenize", body=body, cast_to=object)
        return response["tokens"]

    def _score_echo(self, request: ScoreRequest) -> Score:
        """The way of the old completions API: the prompt is echoed with its log-probabilities."""
        if not isinstance(request.context, str) or not isinstance(request.continuation, str):
            raise EngineError(f"{self.model} scores text, not token ids: it is not a vLLM server")
        response = self.client.completions.create(
            model=self.served_model,
            prompt=request.context + request.continuation,
            max_tokens=0,
            temperature=0,
            echo=True,
            logprobs=1,
        )
        found = response.choices[0].logprobs
        if not found or not found.text_offset or not found.token_logprobs or not found.tokens:
            raise EngineError(f"{self.model} does not echo the log-probabilities of a prompt, so it cannot score text")
        boundary = len(request.context)
        if boundary not in found.text_offset:
            raise PromptError(
                f"a token of {self.model} reaches over the end of the context {request.context[-20:]!r}, "
                "so the continuation has no score of its own"
            )
        first = found.text_offset.index(boundary)
        logprobs = found.token_logprobs[first:]
        best = [max(top.values()) for top in (found.top_logprobs or [])[first:]]
        return Score(
            logprob=sum(logprobs),
            is_greedy=len(best) == len(logprobs) and all(lp >= b for lp, b in zip(logprobs, best, strict=True)),
            num_tokens=len(logprobs),
        )

    # ---- the server

    def _find_model(self, wanted: str | None) -> dict[str, Any]:
        try:
            cards = [card.model_dump() for card in self.persist(self.client.models.list).data]
        except NotFound:
            if wanted is None:
                raise EngineError(
                    f"{self.model} is no OpenAI-compatible server: it has no {base_url(self.model)}/models"
                ) from None
            return {"id": wanted}
        names = [card["id"] for card in cards]
        if wanted is None:
            if len(names) != 1:
                raise EngineError(f"{self.model} serves {len(names)} models, name one of them: {', '.join(names)}")
            return cards[0]
        if wanted not in names:
            raise EngineError(f"{self.model}: {unknown_name('model', wanted, names)}")
        return cards[names.index(wanted)]

    @property
    def _root(self) -> Any:
        """The server beside its API."""
        return self.client.with_options(base_url=str(self.client.base_url).removesuffix("/").removesuffix("/v1"))

    def _metrics(self) -> str | None:
        try:
            return self._root.get("/metrics", cast_to=str, options={"timeout": METRICS_TIMEOUT_S})
        except self.openai.OpenAIError:
            return None

    def _vllm_version(self) -> str:
        try:
            response: Any = self._root.get("/version", cast_to=object)
            return response["version"]
        except (self.openai.OpenAIError, KeyError, TypeError):
            return "(version not told)"


def base_url(url: str) -> str:
    """`http://host:8000` means `http://host:8000/v1`; a URL with a path is taken as it is."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"{url!r} is not a server's URL; expected something like http://127.0.0.1:8000")
    if parts.username or parts.password:
        raise ConfigError("a URL with a password in it would end up in records; use the API key instead")
    return url.rstrip("/") + ("/v1" if parts.path in ("", "/") else "")
