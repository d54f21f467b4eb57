"""A server started as a user starts it, in a process of its own, and how tests ask it."""

import base64
import io
import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

KEY = "sesame"
LAUNCH = [str(Path(sys.executable).parent / "nmm-serve"), "launch"]


class Live:
    """`nmm-serve launch MODEL` with `flags`, ready when made; its model is served as `model`."""

    def __init__(self, folder: Path, log: Path, *flags: str):
        import openai

        self.log, self.model = log, folder.name
        command = [*LAUNCH, str(folder), "--port", "0", "--api-key", KEY, "--log-file", str(log), *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        ready = self.process.stdout.readline()
        if not ready.startswith("Ready: "):
            self.process.kill()
            pytest.fail(f"the server did not start: {ready}{self.process.stderr.read()}")
        self.url = re.match(rf"Ready: (http://127\.0\.0\.1:\d+)/v1 \(model {self.model}\)", ready)[1]
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0)

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def chat(self, *content: dict[str, Any], **options: Any) -> Any:
        options = {"model": self.model, "max_tokens": 8, "temperature": 0} | options
        return self.client.chat.completions.create(messages=[{"role": "user", "content": list(content)}], **options)

    def ask(self, path, body=None, key=KEY, kind="application/json", method=None):
        """Status and JSON (or text) of a plain request."""
        headers = {"Content-Type": kind} | ({"Authorization": f"Bearer {key}"} if key else {})
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                status, page = answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            status, page = error.code, error.read().decode()
        return status, json.loads(page) if page.startswith("{") else page

    def metric(self, name: str) -> float:
        """A number of /metrics; `name` is a regular expression."""
        return float(re.search(rf"^{name} ([\d.e+]+)$", self.ask("/metrics")[1], re.M)[1])

    def until_idle(self) -> None:
        end = time.monotonic() + 20
        while self.metric("nmm_requests_running") or self.metric("nmm_requests_waiting"):
            assert time.monotonic() < end, "a slot was not freed"
            time.sleep(0.05)


@contextmanager
def launched(folder: Path, log: Path, *flags: str) -> Iterator[Live]:
    server = Live(folder, log, *flags)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.terminate()
            server.process.wait(timeout=60)


@contextmanager
def healthy_after(live: Live) -> Iterator[None]:
    """Whatever the block asked, the server lives on; unless it ended the server."""
    before = live.process.poll()
    yield
    if before is None and live.process.poll() is None:
        assert live.ask("/health", key=None)[0] == 200


def text(words):
    return {"type": "text", "text": words}


def url_image(url):
    return {"type": "image_url", "image_url": {"url": url}}


def raw_image(data, kind="png"):
    return url_image(f"data:image/{kind};base64,{base64.b64encode(data).decode()}")


def picture(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return raw_image(buffer.getvalue())
