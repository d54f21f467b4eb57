"""Remote images of the server for exported models: the same rules as vLLM's server has (test_server_images.py)."""

import asyncio

import pytest
from image_web import OTHER_SPELLINGS, image_web, png

pytest.importorskip("httpx")

from nmm_serve.errors import ImageError
from nmm_serve.serving import fetch
from nmm_serve.serving.fetch import Fetcher


@pytest.fixture(scope="module")
def web():
    with image_web() as server:
        yield server


def get(url, *hosts):
    async def ask():
        async with Fetcher(hosts) as fetcher:
            return await fetcher.fetch(url)

    return asyncio.run(ask())


def test_only_named_hosts_are_asked(web):
    web.asked.clear()
    with pytest.raises(ImageError, match="no images from other hosts"):
        get(f"{web.url}/a.png")
    with pytest.raises(ImageError, match=r"it was started for: images\.example"):
        get(f"{web.url}/a.png", "images.example")
    assert web.asked == []
    assert get(f"{web.url}/a.png", "127.0.0.1") == png()


@pytest.mark.parametrize("url", [*OTHER_SPELLINGS, "http://a b/", "http://[/", "ftp://127.0.0.1/", "/etc/passwd", ""])
def test_other_spellings_of_a_host_are_other_hosts(url):
    with pytest.raises(ImageError, match="from that host|must begin with|is not a URL"):
        get(url, "127.0.0.1")


def test_what_is_checked_is_what_is_fetched(web):
    """Parsers differ on a backslash: this one takes what follows `@` for the host, and so does the request."""
    web.asked.clear()
    port = web.server_port
    assert get(f"http://evil.example\\@127.0.0.1:{port}/a.png", "127.0.0.1") == png()
    with pytest.raises(ImageError, match="from that host"):
        get(f"http://evil.example\\@127.0.0.1:{port}/a.png", "evil.example")
    assert web.asked == ["/a.png"]


def test_redirects_and_errors_are_told(web):
    web.asked.clear()
    with pytest.raises(ImageError, match=r"from 127\.0\.0\.1 \(it redirects, which is not followed\)"):
        get(f"{web.url}/away", "127.0.0.1")
    assert web.asked == ["/away"]
    with pytest.raises(ImageError, match="HTTP 404"):
        get(f"{web.url}/gone", "127.0.0.1")
    with pytest.raises(ImageError, match="ConnectError"):
        get("http://127.0.0.1:9/a.png", "127.0.0.1")


def test_a_slow_or_endless_host_is_left(web, monkeypatch):
    monkeypatch.setattr(fetch, "FETCH_S", 0.3)
    with pytest.raises(ImageError, match="could not be fetched from 127.0.0.1"):
        get(f"{web.url}/slow", "127.0.0.1")
    monkeypatch.setattr(fetch, "FETCH_S", 10)
    monkeypatch.setattr(fetch, "MAX_DOWNLOAD_BYTES", 2**18)
    with pytest.raises(ImageError, match="over the limit of 262144 bytes"):
        get(f"{web.url}/endless", "127.0.0.1")
