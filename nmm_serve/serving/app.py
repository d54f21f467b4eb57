"""The endpoints. Work that takes time (JSON, images, tokens) is done in threads; the event loop passes things on.

What is taken in at once is bounded: bytes of requests, requests whose prompt is being made, jobs in the line.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from nmm_serve.errors import ImageError
from nmm_serve.onnx.manifest import Manifest
from nmm_serve.prompt import TokenizerFile
from nmm_serve.server_gate import MAX_BODY_BYTES, Gate, discard
from nmm_serve.serving import requests
from nmm_serve.serving.answers import Answer, ServerFailure, error_fields
from nmm_serve.serving.fetch import Fetcher
from nmm_serve.serving.metrics import Metrics
from nmm_serve.serving.requests import Asked, BadRequest, Fetched, Fields
from nmm_serve.serving.scheduler import Busy, Scheduler

PREPARED_AT_ONCE = 2
"""Requests whose images and texts are decoded at the same time. Each has one image open, which may take half a gigabyte
for a moment (`MAX_PIXELS`)."""
MAX_HELD_BYTES = 4 * MAX_BODY_BYTES
"""Of bodies and fetched images that are not prompts yet, of all clients together."""
BODY_S, CHUNK_S = 120.0, 20.0
"""For a request's body, and for each next piece of it."""
RETRY = {"Retry-After": "1"}
KINDS = {
    400: "BadRequestError", 404: "NotFoundError", 405: "MethodNotAllowedError", 408: "RequestTimeoutError",
    415: "UnsupportedMediaTypeError", 429: "RateLimitError", 500: "InternalServerError", 503: "ServiceUnavailableError",
}  # fmt: skip


def error(status: int, message: str, param: str | None = None, headers: dict[str, str] | None = None) -> JSONResponse:
    fields = error_fields(message, KINDS.get(status, "BadRequestError"), param, status)
    return JSONResponse({"error": fields}, status, headers=headers)


class Endpoints:
    """What the routes call."""

    def __init__(
        self,
        served: str,
        encoder: TokenizerFile,
        manifest: Manifest,
        scheduler: Scheduler,
        metrics: Metrics,
        fetcher: Fetcher | None = None,
    ):
        self.served, self.encoder, self.manifest = served, encoder, manifest
        self.scheduler, self.metrics, self.fetcher = scheduler, metrics, fetcher
        self.preparing = asyncio.Semaphore(PREPARED_AT_ONCE)
        self.in_preparation = 0
        self.held_bytes = 0
        self.draining = False

    async def health(self, request: Request) -> Response:
        if self.scheduler.failure:
            return error(503, f"the model's thread ended with {self.scheduler.failure}; restart the server")
        return self._ending() if self.draining else JSONResponse({})

    async def models(self, request: Request) -> Response:
        card = {
            "id": self.served, "object": "model", "created": 0, "owned_by": "nmm-serve",
            "max_model_len": self.manifest.context_length,
        }  # fmt: skip
        return JSONResponse({"object": "list", "data": [card]})

    async def metrics_page(self, request: Request) -> Response:
        return Response(self.metrics.page(), media_type=self.metrics.content_type)

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, requests.read_chat)

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, requests.read_completion)

    async def tokenize(self, request: Request) -> Response:
        def work(fields: Fields, fetched: Fetched) -> list[int]:
            requests.check_names(fields, ("model", "prompt", "messages", "add_special_tokens"))
            if fields.get("messages") is not None:
                messages, images = requests.read_messages(fields["messages"], self.manifest, fetched)
                return requests.encode(lambda: self.encoder.prompt_of_chat(messages, images), "messages").input_ids
            text = requests.text_of(fields.get("prompt"), "prompt")
            special = requests.flag(fields, "add_special_tokens", True)
            return self.encoder.encode_marked(text) if special else self.encoder.encode_text(text)

        try:
            tokens = await self._prepare(request, work)
        except Busy:
            return self._busy()
        return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": self.manifest.context_length})

    async def _prepare(self, request: Request, work: Callable[[Fields, Fetched], Any]) -> Any:
        """What `work` makes of the request's fields and remote images. Raises BadRequest, and Busy."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise BadRequest("the content type must be application/json", status=415)
        async with self._held() as hold:
            body = await self._body(request, hold)
            if self.in_preparation >= self.scheduler.max_waiting + self.scheduler.runtime.slots:
                raise Busy
            self.in_preparation += 1
            try:
                async with self.preparing:
                    fields = await run_in_threadpool(requests.parse_json, body)
                requests.check_model(fields, self.served)
                fetched = await self._fetch(fields, hold)
                async with self.preparing:
                    return await run_in_threadpool(work, fields, fetched)
            finally:
                self.in_preparation -= 1

    @asynccontextmanager
    async def _held(self) -> AsyncIterator[Callable[[int], None]]:
        """Count bytes as held until the end of the block. The count raises Busy past the limit."""
        mine = 0

        def hold(count: int) -> None:
            nonlocal mine
            if self.held_bytes + count > MAX_HELD_BYTES:
                raise Busy
            mine += count
            self.held_bytes += count

        try:
            yield hold
        finally:
            self.held_bytes -= mine

    async def _body(self, request: Request, hold: Callable[[int], None]) -> bytes:
        """Raises BadRequest (408) for a client that is too slow, Busy when too much is held already."""
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(BODY_S):
                while more:
                    async with asyncio.timeout(CHUNK_S):
                        message = await request.receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    more = message.get("more_body", False)
                    hold(len(message.get("body", b"")))
                    body += message.get("body", b"")
        except TimeoutError:
            raise BadRequest("the request's body came too slowly; send it again", status=408) from None
        except Busy:
            del body
            if more:
                await discard(request.receive)
            raise
        return bytes(body)

    async def _fetch(self, fields: Fields, hold: Callable[[int], None]) -> Fetched:
        """The remote images of a request: none unless hosts were named. Raises BadRequest."""
        urls = requests.remote_urls(fields) if self.fetcher is not None else []
        if not urls or len(urls) > requests.most_images(self.manifest):
            return {}
        assert self.fetcher is not None
        try:
            for url in urls:
                self.fetcher.checked(url)
            fetched = {}
            for url in dict.fromkeys(urls):
                fetched[url] = await self.fetcher.fetch(url, hold)
        except ImageError as caught:
            raise BadRequest(str(caught), "messages") from None
        return fetched

    async def _answer(
        self, request: Request, read: Callable[[Fields, TokenizerFile, Manifest, Fetched], Asked]
    ) -> Response:
        if self.draining:
            return self._ending()
        if self.scheduler.is_full():  # before any work is done for it
            return self._busy()
        try:
            asked = await self._prepare(
                request, lambda fields, fetched: read(fields, self.encoder, self.manifest, fetched)
            )
            answer = Answer(asked, self.encoder, self.manifest, self.served)
            self.scheduler.submit(answer.jobs)
        except Busy:
            return self._busy()
        if asked.stream:
            return Stream(answer)
        return await self._whole(request, answer)

    def _busy(self) -> Response:
        self.metrics.rejected.inc()
        return error(429, "the server is busy; try again later", headers=RETRY)

    def _ending(self) -> Response:
        return error(503, "the server is shutting down", headers=RETRY)

    async def _whole(self, request: Request, answer: Answer) -> Response:
        """The whole answer, unless the client goes away first."""
        working = asyncio.ensure_future(answer.whole())
        leaving = asyncio.ensure_future(gone(request))
        try:
            await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                return Response(status_code=499)  # nobody reads it
            return JSONResponse(working.result())
        finally:
            answer.cancel()
            working.cancel()
            leaving.cancel()


async def gone(request: Request) -> None:
    """Until the client closes its connection. The body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Stream(StreamingResponse):
    """An answer in pieces. Whatever ends the stream ends the work for it, even before its first piece was sent."""

    def __init__(self, answer: Answer):
        self.answer, self.pieces = answer, answer.pieces()
        super().__init__(self.pieces, media_type="text/event-stream")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answer.cancel()
            await self.pieces.aclose()


def build_app(endpoints: Endpoints, api_key: str | None) -> Any:
    """The ASGI application, behind the same gate as vLLM's server: key on every path, body size before reading."""
    handlers: dict[Any, Any] = {  # each takes its own kind of exception, which starlette's types do not know
        BadRequest: _bad_request,
        HTTPException: _http_error,
        ServerFailure: _failure,
        ClientDisconnect: _left,
        Exception: _unexpected,
    }
    app = Starlette(
        routes=[
            Route("/health", endpoints.health),
            Route("/metrics", endpoints.metrics_page),
            Route("/v1/models", endpoints.models),
            Route("/v1/chat/completions", endpoints.chat, methods=["POST"]),
            Route("/v1/completions", endpoints.completions, methods=["POST"]),
            Route("/tokenize", endpoints.tokenize, methods=["POST"]),
        ],
        exception_handlers=handlers,
    )
    return Gate(app, api_key)


Handler = Callable[[Request, Any], Awaitable[Response]]


async def _bad_request(request: Request, caught: BadRequest) -> Response:
    return error(caught.status, str(caught), caught.param)


async def _http_error(request: Request, caught: HTTPException) -> Response:
    return error(caught.status_code, caught.detail, headers=dict(caught.headers or {}))


async def _failure(request: Request, caught: ServerFailure) -> Response:
    return error(500, str(caught))


async def _left(request: Request, caught: ClientDisconnect) -> Response:
    return Response(status_code=499)


async def _unexpected(request: Request, caught: Exception) -> Response:
    return error(500, "the server made a mistake on this request; its log says more")
