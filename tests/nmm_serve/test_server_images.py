"""Where images may come from, against a local web server, and how they are read."""

import asyncio
import base64
import io
import re
import struct
import zlib

import pytest
from image_web import OTHER_SPELLINGS, image_web, png
from PIL import Image

pytest.importorskip("vllm")

from vllm.multimodal.media.connector import MEDIA_CONNECTOR_REGISTRY

from nmm_serve import server_images


def data_url(data, kind="image/png"):
    return f"data:{kind};base64," + base64.b64encode(data).decode()


def bomb(width, height):
    """A PNG whose header promises far more pixels than its data hold."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


LOOP = asyncio.new_event_loop()
"""vLLM keeps its connections open, so all of them belong to one loop."""


def fetch(url, domains=()):
    connector = MEDIA_CONNECTOR_REGISTRY.load("nmm", allowed_media_domains=list(domains))
    assert isinstance(connector, server_images.StrictConnector)
    return LOOP.run_until_complete(connector.fetch_image_async(url)).media


@pytest.fixture(scope="module")
def web():
    with image_web() as server:
        yield server


def test_a_data_url_is_read_upright_and_opaque():
    transparent = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    image = fetch(data_url(png(transparent)))
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == (255, 255, 255)
    rotated = Image.new("RGB", (4, 2))
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    rotated.save(buffer, "JPEG", exif=exif)
    assert fetch(data_url(buffer.getvalue(), "image/jpeg")).size == (2, 4)


def test_no_remote_image_unless_its_host_was_named(web):
    web.asked.clear()
    url = f"http://127.0.0.1:{web.server_port}/a.png"
    with pytest.raises(ValueError, match="no images from other hosts"):
        fetch(url)
    with pytest.raises(ValueError, match=r"it was started for: images\.example"):
        fetch(url, ["images.example"])
    assert web.asked == []
    assert fetch(url, ["127.0.0.1"]).size == (4, 3)


@pytest.mark.parametrize("url", [*OTHER_SPELLINGS, "http://evil.example\\@127.0.0.1/"])
def test_other_spellings_of_a_host_are_other_hosts(url):
    with pytest.raises(ValueError, match=r"from that host|must be either|Failed to parse|could not be fetched"):
        fetch(url, ["127.0.0.1"])


def test_redirects_are_not_followed(web, monkeypatch):
    monkeypatch.setenv("VLLM_MEDIA_URL_ALLOW_REDIRECTS", "0")
    web.asked.clear()
    with pytest.raises(ValueError):  # noqa: PT011  the decoder's or the client's words
        fetch(f"http://127.0.0.1:{web.server_port}/away", ["127.0.0.1"])
    assert "/a.png" not in web.asked


def test_a_host_that_fails_is_the_clients_trouble(web, monkeypatch):
    monkeypatch.setenv("VLLM_MEDIA_FETCH_MAX_RETRIES", "1")
    with pytest.raises(ValueError, match=r"could not be fetched from 127\.0\.0\.1"):
        fetch("http://127.0.0.1:9/a.png", ["127.0.0.1"])
    with pytest.raises(Exception, match="HTTP 404"):
        fetch(f"http://127.0.0.1:{web.server_port}/gone", ["127.0.0.1"])


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("file:///etc/passwd", "reads no files of its own"),
        ("FILE:///etc/passwd", "reads no files of its own"),
        ("/etc/passwd", "must be either"),
        ("ftp://h/a.png", "must be either"),
        ("data:image/png,abc", "not base64"),
        ("data:image/png;base64", "Invalid data URL"),
        ("data:image/png;base64,@@@@", "not valid base64"),
        (data_url(b"no image at all"), "not a readable image"),
        (data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"), "not a readable image"),
        (data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "not a readable image"),
        (data_url(png()[:45]), "damaged or truncated"),
        (data_url(bomb(100, 100)), "damaged or truncated"),
        (data_url(bomb(9000, 9000)), "over the limit of 67108864"),
        (data_url(bomb(60000, 60000)), "more than 67108864 pixels"),
        (data_url(bomb(0, 5)), "not a readable image|no pixels"),
    ],
)
def test_bad_images_are_value_errors_in_our_words(url, told):
    with pytest.raises(ValueError, match=told) as caught:
        fetch(url)
    assert not re.search(r"\b0x[0-9a-f]+", str(caught.value))
