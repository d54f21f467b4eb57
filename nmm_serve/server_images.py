"""Where the server's images come from and how they are read. `VLLM_MEDIA_CONNECTOR=nmm` chooses `StrictConnector`."""

from typing import Any

import aiohttp
from urllib3.util import Url, parse_url
from vllm import envs
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.media.connector import MEDIA_CONNECTOR_REGISTRY, MediaConnector
from vllm.multimodal.media.image import ImageMediaIO

from nmm_serve.errors import ImageError
from nmm_serve.image_hosts import BAD_BASE64, NO_FILES, NOT_BASE64, check_host, not_fetched
from nmm_serve.images import load_image


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
        raise ValueError(message if message.startswith("the image") else BAD_BASE64)


@MEDIA_CONNECTOR_REGISTRY.register("nmm")
class StrictConnector(MediaConnector):
    """No remote image unless its domain was named, no local file ever.

    vLLM takes an empty list of domains for "all of them".
    """

    def _assert_url_in_allowed_media_domains(self, url_spec: Url) -> None:
        try:
            check_host(url_spec.hostname, self.allowed_media_domains or ())
        except ImageError as error:
            raise ValueError(str(error)) from None

    def _load_file_url(self, url_spec: Url, media_io: Any) -> Any:
        raise ValueError(NO_FILES)

    def _load_data_url(self, url: str, media_io: Any) -> Any:
        try:
            return super()._load_data_url(url, media_io)
        except NotImplementedError:
            raise ValueError(NOT_BASE64) from None

    def fetch_image(self, image_url: str, *, image_mode: str | None = "RGB") -> Any:
        return self.load_from_url(image_url, StrictImageIO(), fetch_timeout=envs.VLLM_IMAGE_FETCH_TIMEOUT)

    async def fetch_image_async(self, image_url: str, *, image_mode: str | None = "RGB") -> Any:
        try:
            return await self.load_from_url_async(
                image_url, StrictImageIO(), fetch_timeout=envs.VLLM_IMAGE_FETCH_TIMEOUT
            )
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            host = parse_url(image_url).hostname
            raise ValueError(not_fetched(host, type(error).__name__)) from None
