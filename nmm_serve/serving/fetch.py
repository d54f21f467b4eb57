"""Images from the hosts that the operator named."""

import asyncio
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from nmm_serve.errors import EngineError, ImageError
from nmm_serve.image_hosts import MAX_DOWNLOAD_BYTES, NO_FILES, check_host, not_fetched

FETCH_S = 5.0
"""For a whole image, from the first byte sent to the last received."""


class Fetcher:
    """Gets images over HTTP. Redirects are not followed, and no proxy of the environment is used.

    Raises EngineError when httpx is missing.
    """

    def __init__(self, hosts: Sequence[str]):
        try:
            import httpx
        except ImportError:
            raise EngineError("fetching images needs httpx; pip install 'nmm-serve[onnx]'") from None
        self.hosts = tuple(host.lower() for host in hosts)
        self.httpx = httpx
        self.client: Any = None

    async def __aenter__(self) -> "Fetcher":
        self.client = self.httpx.AsyncClient(follow_redirects=False, trust_env=False, timeout=FETCH_S)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.client.aclose()

    def checked(self, url: str) -> Any:
        """The URL as it will be asked for: parsed once, so that what is checked is what is fetched.

        Raises ImageError for another scheme, and for a host that was not named.
        """
        try:
            parsed = self.httpx.URL(url)
        except (self.httpx.InvalidURL, UnicodeError):
            raise ImageError("the image's URL is not a URL") from None
        if parsed.scheme == "file":
            raise ImageError(NO_FILES)
        if parsed.scheme not in ("http", "https"):
            raise ImageError("the image's URL must begin with https://, http:// or data:")
        check_host(parsed.host, self.hosts)
        return parsed

    async def fetch(self, url: str, arrived: Callable[[int], None] = lambda _: None) -> bytes:
        """The image's bytes; `arrived` is called with the length of each piece.

        Raises ImageError for what `checked` refuses, an answer other than 200, too many bytes, and a slow host.
        """
        parsed = self.checked(url)
        data = bytearray()
        try:
            async with asyncio.timeout(FETCH_S), self.client.stream("GET", parsed) as response:
                if response.is_redirect:
                    raise ImageError(not_fetched(parsed.host, "it redirects, which is not followed"))
                if response.status_code != 200:
                    raise ImageError(not_fetched(parsed.host, f"HTTP {response.status_code}"))
                async for chunk in response.aiter_bytes():
                    arrived(len(chunk))
                    data += chunk
                    if len(data) > MAX_DOWNLOAD_BYTES:
                        raise ImageError(f"the image is over the limit of {MAX_DOWNLOAD_BYTES} bytes")
        except (TimeoutError, self.httpx.HTTPError, OSError) as error:
            raise ImageError(not_fetched(parsed.host, type(error).__name__)) from None
        return bytes(data)
