"""What `nmm-serve launch` puts around vLLM's server: who may ask, how much at once, and from where images may come.

vLLM imports this module in its API server, and nowhere else, because `launch` names `Gate` as a middleware.
"""

import asyncio
import contextlib
import hashlib
import hmac
import json
import os
from typing import Any

import aiohttp
from urllib3.util import Url, parse_url
from vllm import envs
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.media.connector import MEDIA_CONNECTOR_REGISTRY, MediaConnector
from vllm.multimodal.media.image import ImageMediaIO

from nmm_serve.errors import ImageError
from nmm_serve.images import load_image

CONNECTOR = "nmm"
"""Value of VLLM_MEDIA_CONNECTOR that chooses `StrictConnector`."""
MAX_BODY_BYTES = 64 * 2**20
MAX_DISCARD_BYTES, DISCARD_S = 4 * MAX_BODY_BYTES, 10
OPEN_PATHS = ("/health",)
"""What a load balancer needs before it knows a key."""


class Gate:
    """ASGI middleware: asks for the API key on every path, and refuses a large body before it is read.

    vLLM's own check leaves `/tokenize`, `/invocations`, `/metrics` and others open.
    """

    def __init__(self, app: Any):
        self.app = app
        key = os.environ.get("VLLM_API_KEY")
        self.key_digest = hashlib.sha256(key.encode()).digest() if key else None

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


class StrictImageIO(ImageMediaIO):
    """Reads images as every other engine does: sizes checked before decoding, a short list of formats, errors in words
    of our own."""

    def load_bytes(self, data: bytes) -> Any:
        try:
            # only upright RGB comes out, whatever was put in, so the bytes alone decide what a cache may reuse
            return MediaWithBytes(load_image(data), data)
        except ImageError as error:
            raise ValueError(str(error)) from None

    def load_base64(self, media_type: str, data: str) -> Any:
        try:
            return super().load_base64(media_type, data)
        except ValueError as error:
            message = str(error)
        raise ValueError(message if message.startswith("the image") else "the image is not valid base64")


@MEDIA_CONNECTOR_REGISTRY.register(CONNECTOR)
class StrictConnector(MediaConnector):
    """No remote image unless its domain was named, no local file ever.

    vLLM takes an empty list of domains for "all of them".
    """

    def _assert_url_in_allowed_media_domains(self, url_spec: Url) -> None:
        if not self.allowed_media_domains:
            raise ValueError(
                "this server fetches no images from other hosts; send the image itself as a base64 data URL, "
                "or have the operator name the domain with --allow-media-domain"
            )
        if url_spec.hostname not in self.allowed_media_domains:
            raise ValueError(
                "this server fetches no images from that host; it was started for: "
                + ", ".join(self.allowed_media_domains)
            )

    def _load_file_url(self, url_spec: Url, media_io: Any) -> Any:
        raise ValueError("this server reads no files of its own; send the image itself as a base64 data URL")

    def _load_data_url(self, url: str, media_io: Any) -> Any:
        try:
            return super()._load_data_url(url, media_io)
        except NotImplementedError:
            raise ValueError("the image's data URL is not base64; expected data:image/png;base64,...") from None

    def fetch_image(self, image_url: str, *, image_mode: str | None = "RGB") -> Any:
        return self.load_from_url(image_url, StrictImageIO(), fetch_timeout=envs.VLLM_IMAGE_FETCH_TIMEOUT)

    async def fetch_image_async(self, image_url: str, *, image_mode: str | None = "RGB") -> Any:
        try:
            return await self.load_from_url_async(
                image_url, StrictImageIO(), fetch_timeout=envs.VLLM_IMAGE_FETCH_TIMEOUT
            )
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            host = parse_url(image_url).hostname
            raise ValueError(f"the image could not be fetched from {host} ({type(error).__name__})") from None
