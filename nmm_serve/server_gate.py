"""Who may ask the server, and how much at once: before our own server, and before vLLM's as `VLLMGate`, which
`nmm-serve launch` names to it as a middleware."""

import asyncio
import contextlib
import hashlib
import hmac
import importlib
import json
import os
import signal
import threading
import time
from typing import Any

MAX_BODY_BYTES = 64 * 2**20
MAX_DISCARD_BYTES, DISCARD_S = 4 * MAX_BODY_BYTES, 10
PARENT = "NMM_SERVE_PARENT"
"""Environment variable with the process that launched the server."""
OPEN_PATHS = ("/health",)
"""What a load balancer needs before it knows a key."""


class Gate:
    """ASGI middleware: asks for the API key on every path, and refuses a large body before it is read."""

    def __init__(self, app: Any, api_key: str | None = None):
        self.app = app
        self.key_digest = hashlib.sha256(api_key.encode()).digest() if api_key else None

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        headers = {name.lower(): value for name, value in scope["headers"]}
        if not self._may_enter(scope, headers):
            return await refuse(scope, send, 401, "the API key is missing or wrong; send it as 'Authorization: Bearer'")
        if scope["type"] == "websocket":
            return await self.app(scope, receive, send)
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > MAX_BODY_BYTES:
            await discard(receive)
            return await refuse(scope, send, 413, too_large())
        body = BodyLimit(scope, receive, send)
        await self.app(scope, body.receive, body.send)

    def _may_enter(self, scope: dict[str, Any], headers: dict[bytes, bytes]) -> bool:
        if self.key_digest is None or scope["path"] in OPEN_PATHS or scope.get("method") == "OPTIONS":
            return True
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(hashlib.sha256(key).digest(), self.key_digest)


class VLLMGate(Gate):
    """The same for vLLM, whose own check leaves `/tokenize`, `/invocations`, `/metrics` and others open.

    Being built, it also brings in `server_images`, which vLLM then uses for every image. vLLM imports this module in
    its API server, and nowhere else.
    """

    def __init__(self, app: Any):
        importlib.import_module("nmm_serve.server_images")
        if parent := os.environ.get(PARENT):
            threading.Thread(target=end_with, args=(int(parent),), daemon=True).start()
        self._told = False
        super().__init__(app, os.environ.get("VLLM_API_KEY"))

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if not self._told and scope.get("path") == "/metrics" and "app" in scope:
            self._told = True
            tell_limit(scope["app"].state)
        await super().__call__(scope, receive, send)


def tell_limit(state: Any) -> None:
    """Among vLLM's metrics are the requests that run and wait, but not how many it runs at once."""
    from prometheus_client import Gauge

    gauge = Gauge("nmm_max_num_seqs", "Requests that run at once at most.", multiprocess_mode="max")
    gauge.set(state.vllm_config.scheduler_config.max_num_seqs)


class BodyLimit:
    """Counts a body without a declared length as it arrives. Past the limit the client gets 413 and the server's
    application sees a client that has gone."""

    def __init__(self, scope: dict[str, Any], receive: Any, send: Any):
        self._scope, self._receive, self._send = scope, receive, send
        self._received = 0
        self._refused = self._answering = False

    async def receive(self) -> dict[str, Any]:
        message = {"type": "http.disconnect"} if self._refused else await self._receive()
        self._received += len(message.get("body", b""))
        if self._received > MAX_BODY_BYTES and not self._refused:
            self._refused = True
            if not self._answering:
                await discard(self._receive)
                await refuse(self._scope, self._send, 413, too_large())
            message = {"type": "http.disconnect"}
        return message

    async def send(self, message: dict[str, Any]) -> None:
        self._answering = True
        if not self._refused:
            await self._send(message)


def end_with(parent: int) -> None:
    """Stop the server when its launcher is gone, even if that was killed: nobody would find it otherwise."""
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.kill(parent, 0)  # asks only whether it is there
            time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


async def discard(receive: Any) -> None:
    """Let a client finish sending what it began, within reason: one that is cut off does not read the answer."""
    received = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_S):
            while received < MAX_DISCARD_BYTES:
                message = await receive()
                received += len(message.get("body", b""))
                if not message.get("more_body"):
                    return


def too_large() -> str:
    return f"the request body is over the limit of {MAX_BODY_BYTES} bytes; send fewer or smaller images"


async def refuse(scope: dict[str, Any], send: Any, status: int, message: str) -> None:
    """An error in OpenAI's shape."""
    if scope["type"] == "websocket":
        return await send({"type": "websocket.close", "code": 1008, "reason": message})
    kind = {401: "AuthenticationError", 413: "RequestEntityTooLarge"}[status]
    body = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": status}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"connection", b"close")]})
    await send({"type": "http.response.body", "body": body})
