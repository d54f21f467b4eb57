"""Overload, slow bodies, remote images and a soak: endpoints and scheduler in this process, over real sockets."""

import asyncio
import base64
import io
import itertools
import json
import os
import random
import socket
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from exported import exported
from image_web import image_web, png
from PIL import Image

pytest.importorskip("onnxruntime")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

import httpx
import uvicorn

from nmm_serve import images
from nmm_serve.onnx.runtime import Runtime
from nmm_serve.prompt import TokenizerFile
from nmm_serve.serving import app as endpoints_of
from nmm_serve.serving.app import Endpoints, build_app
from nmm_serve.serving.connections import ClientConnection
from nmm_serve.serving.fetch import Fetcher
from nmm_serve.serving.metrics import Metrics
from nmm_serve.serving.scheduler import Scheduler

QUESTION = {"prompt": "what is the colour", "max_tokens": 40, "ignore_eos": True, "temperature": 0}


class Served:
    """The server in a thread of this process."""

    def __init__(self):
        self.runtime = Runtime(exported("late-moe"), slots=3, threads=1)
        manifest = self.runtime.manifest
        self.metrics = Metrics()
        self.scheduler = Scheduler(self.runtime, 4, self.metrics.ended)
        self.metrics.watch(self.scheduler)
        encoder = TokenizerFile(exported("late-moe"), manifest.patch_size, manifest.image_size)
        self.fetcher = Fetcher(["127.0.0.1"])
        self.endpoints = Endpoints("tiny", encoder, manifest, self.scheduler, self.metrics, self.fetcher)
        config = uvicorn.Config(
            build_app(self.endpoints, None),
            port=0,
            http=ClientConnection,
            lifespan="off",
            log_config=None,
            log_level="critical",
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=asyncio.run, args=(self.run(),), daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.address = self.server.servers[0].sockets[0].getsockname()
        self.client = httpx.Client(base_url="http://{}:{}".format(*self.address), timeout=60)

    async def run(self):
        async with self.fetcher:
            await self.server.serve()

    def close(self):
        self.client.close()
        self.server.should_exit = True
        self.thread.join(timeout=30)
        self.scheduler.stop()
        assert not self.thread.is_alive()

    def ask(self, body, path="/v1/completions"):
        return self.client.post(path, json=body)

    def opened(self, body, length=None, path="/v1/completions"):
        """A connection on which a request was sent, of which nothing was read."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection = socket.create_connection(self.address, timeout=30)
        head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {length or len(data)}\r\n\r\n".encode() + data)
        return connection

    def value(self, name):
        return self.metrics.registry.get_sample_value(name)

    def until_idle(self):
        end = time.monotonic() + 30
        while self.value("nmm_requests_running") or self.value("nmm_requests_waiting") or self.endpoints.held_bytes:
            assert time.monotonic() < end, "a slot was not freed"
            time.sleep(0.02)

    def ended(self):
        return {
            outcome: self.metrics.registry.get_sample_value("nmm_requests_total", {"outcome": outcome})
            for outcome in ("success", "error", "aborted")
        }


@pytest.fixture(scope="module")
def served():
    server = Served()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def _free_again(served):
    yield
    served.until_idle()
    assert (served.endpoints.held_bytes, served.endpoints.in_preparation) == (0, 0)


def test_a_burst_is_answered_or_told_to_come_again(served):
    alone = served.ask(QUESTION).json()["choices"][0]["text"]
    before, rejected = served.ended(), served.value("nmm_rejected_total")
    with ThreadPoolExecutor(60) as pool:
        answers = list(pool.map(lambda _: served.ask(QUESTION), range(60)))
    good = [answer for answer in answers if answer.status_code == 200]
    assert {answer.json()["choices"][0]["text"] for answer in good} == {alone}
    assert 7 <= len(good) < 60, "three run and four wait"
    refused = [answer for answer in answers if answer.status_code != 200]
    assert {(answer.status_code, answer.headers["retry-after"]) for answer in refused} == {(429, "1")}
    assert served.ended() == before | {"success": before["success"] + len(good)}, "an accepted request was lost"
    assert served.value("nmm_rejected_total") == rejected + len(refused)


@pytest.mark.parametrize("limit", ["CHUNK_S", "BODY_S"])
def test_a_body_that_does_not_come_is_408_and_holds_nobody_up(served, monkeypatch, limit):
    monkeypatch.setattr(endpoints_of, limit, 0.5)
    slow = [served.opened(b'{"prompt": ', length=1000) for _ in range(20)]
    assert served.ask(QUESTION).status_code == 200
    assert [connection.recv(1000)[:12] for connection in slow] == [b"HTTP/1.1 408"] * 20


def test_bodies_are_held_up_to_a_limit(served, monkeypatch):
    monkeypatch.setattr(endpoints_of, "MAX_HELD_BYTES", 100_000)
    slow = [served.opened(b" " * 30_000, length=40_000) for _ in range(3)]
    end = time.monotonic() + 10
    while served.endpoints.held_bytes < 90_000:
        assert time.monotonic() < end
        time.sleep(0.01)
    refused = served.ask({"prompt": "a" * 20_000})
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert served.ask(QUESTION).status_code == 200, "a small one has room"
    for connection in slow:
        connection.close()


def test_prompts_are_prepared_up_to_a_limit(served, monkeypatch):
    gate = threading.Event()
    read = endpoints_of.requests.parse_json
    monkeypatch.setattr(endpoints_of.requests, "parse_json", lambda body: (gate.wait(20), read(body))[1])
    with ThreadPoolExecutor(20) as pool:
        asked = [pool.submit(served.ask, QUESTION | {"max_tokens": 1}) for _ in range(20)]
        end = time.monotonic() + 20
        while sum(answer.done() for answer in asked) < 13:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert {answer.result().status_code for answer in asked if answer.done()} == {429}
        gate.set()
        assert sum(answer.result().status_code == 200 for answer in asked) == 7


def test_a_slow_reader_keeps_no_slot(served):
    before = served.ended()["success"]
    readers = [served.opened(QUESTION | {"stream": True, "max_tokens": 300, "n": 2}) for _ in range(2)]
    end = time.monotonic() + 30
    while served.ended()["success"] < before + 4:
        assert time.monotonic() < end, "all should be computed, though nobody reads it"
        time.sleep(0.02)
    for connection in readers:
        read = b""
        while not read.endswith(b"0\r\n\r\n"):
            read += connection.recv(2**16)
        assert read.count(b'"finish_reason": "length"') == 2
        connection.close()


def test_a_client_that_leaves_before_the_first_piece_frees_its_slot(served):
    begin, aborted = served.value("nmm_generation_tokens_total"), served.ended()["aborted"]
    for stream in (True, False):
        served.opened(QUESTION | {"stream": stream, "max_tokens": 500, "n": 4, "temperature": 1}).close()
    end = time.monotonic() + 30
    while served.ended()["aborted"] < aborted + 8:
        assert time.monotonic() < end, "a job for nobody was not ended"
        time.sleep(0.02)
    assert served.value("nmm_generation_tokens_total") - begin < 8 * 500


def chat(url):
    return {"max_tokens": 3, "messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what"}]}]}  # fmt: skip


def test_one_image_of_a_request_is_open_at_a_time(served, monkeypatch):
    """All of them could take gigabytes, from a request of some kilobytes."""
    seen, alive = [], []
    convert = images.to_rgb

    def to_rgb(image):
        alive.append(sum(ref() is not None for ref in seen))
        rgb = convert(image)
        seen.append(weakref.ref(rgb))
        return rgb

    monkeypatch.setattr(images, "to_rgb", to_rgb)
    buffer = io.BytesIO()
    Image.new("L", (64, 64)).save(buffer, "PNG")
    body = chat("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())
    body["messages"][0]["content"] *= 4
    assert served.ask(body, "/v1/chat/completions").status_code == 200
    assert alive == [0, 0, 0, 0]


def test_log_probabilities_of_completions_are_whole(served):
    """In vLLM's shape: the chosen token and, with 1, the likeliest one; where each begins in their texts."""
    body = QUESTION | {"temperature": 1.5, "seed": 3, "max_tokens": 12, "logprobs": 1}
    choice = served.ask(body).json()["choices"][0]["logprobs"]
    starts = [0, *itertools.accumulate(map(len, choice["tokens"]))]
    assert choice["text_offset"] == starts[:-1]
    columns = zip(choice["tokens"], choice["token_logprobs"], choice["top_logprobs"], strict=True)
    for token, logprob, top in columns:
        assert logprob <= top[token] == max(top.values()) or top[token] == logprob  # two tokens may look alike
        assert len(top) <= 2
    assert any(len(top) == 2 for top in choice["top_logprobs"]), "some token was not the likeliest"
    lines = served.ask(body | {"stream": True}).text.splitlines()
    pieces = [json.loads(line[6:])["choices"][0]["logprobs"] for line in lines if line.startswith("data: {")]
    assert {name: [value for piece in pieces for value in piece[name]] for name in choice} == choice
    only = served.ask(body | {"logprobs": 0}).json()["choices"][0]["logprobs"]
    assert only["top_logprobs"] == [
        {token: value} for token, value in zip(choice["tokens"], choice["token_logprobs"], strict=True)
    ]


def test_an_assistant_may_have_said_nothing(served):
    def ask(content):
        said = [("user", "what"), ("assistant", content), ("user", "is")]
        body = {"messages": [{"role": role, "content": text} for role, text in said]}
        return served.ask(body, "/tokenize").json()

    assert ask(None) == ask("")


def test_remote_images_are_those_of_named_hosts(served):
    data_url = "data:image/png;base64," + base64.b64encode(png()).decode()
    with image_web() as web:
        remote, sent = (served.ask(chat(url), "/v1/chat/completions") for url in (f"{web.url}/a.png", data_url))
        assert remote.status_code == 200
        assert remote.json()["usage"] == sent.json()["usage"]
        counted = served.ask({"messages": chat(f"{web.url}/a.png")["messages"]}, "/tokenize")
        assert counted.json()["count"] == remote.json()["usage"]["prompt_tokens"]
        web.asked.clear()
        for url, told in (
            (f"http://localhost:{web.server_port}/a.png", "it was started for: 127.0.0.1"),
            (f"{web.url}/gone", "HTTP 404"),
            ("file:///etc/passwd", "reads no files"),
            (f"{web.url}/away", "redirects"),
        ):
            answer = served.ask(chat(url), "/v1/chat/completions")
            assert answer.status_code == 400
            assert told in answer.json()["error"]["message"]
        many = {"role": "user", "content": chat(f"{web.url}/a.png")["messages"][0]["content"][:1] * 16}
        assert "At most 15" in served.ask({"messages": [many]}, "/v1/chat/completions").json()["error"]["message"]
        assert web.asked == ["/gone", "/away"]


def soak(served, count):
    """Whole and streamed answers, several at once, bad requests, and clients that leave at any time. Gives the number
    of answers by kind."""
    alone = served.ask(QUESTION).json()["choices"][0]["text"]

    def one(number):
        kind = ("whole", "stream", "chat", "bad", "leave", "leave")[number % 6]
        rng = random.Random(number)
        if kind == "bad":
            assert served.ask({"prompt": "", "max_tokens": -number}).status_code in (400, 429)
        elif kind == "leave":
            stream = rng.random() < 0.5
            connection = served.opened(QUESTION | {"max_tokens": 400, "n": rng.choice((1, 2)), "stream": stream})
            time.sleep(rng.random() * 0.05)
            if stream and rng.random() < 0.5:
                connection.recv(100)
            connection.close()
        else:
            body = QUESTION | {"stream": kind == "stream"}
            url = "data:image/png;base64," + base64.b64encode(png()).decode()
            while True:
                answer = (
                    served.ask(chat(url), "/v1/chat/completions") if kind == "chat" else served.ask(body)
                )  # fmt: skip
                if answer.status_code != 429:
                    break
                time.sleep(0.02)
            assert answer.status_code == 200
            if kind == "whole":
                assert answer.json()["choices"][0]["text"] == alone
            if kind == "stream":
                events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
                assert "".join(event["choices"][0]["text"] for event in events) == alone
        return kind

    with ThreadPoolExecutor(6) as pool:
        kinds = list(pool.map(one, range(count)))
    served.until_idle()
    assert served.ask(QUESTION).json()["choices"][0]["text"] == alone
    return kinds


def resident_bytes():
    """Of this process, which the server is a part of; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def check_soak(served, count):
    soak(served, 12)  # whatever is made once is made now
    served.client.close()
    served.client = httpx.Client(base_url=served.client.base_url, timeout=60)
    before, threads, memory = served.ended(), threading.active_count(), resident_bytes()
    kinds = soak(served, count)
    after = served.ended()
    assert len(kinds) == count
    assert after["error"] == 0
    whole = sum(kind in ("whole", "stream", "chat") for kind in kinds)
    assert whole <= after["success"] - before["success"], "an accepted request was lost"
    assert served.scheduler.running == []
    assert served.scheduler.arriving is None
    assert not served.scheduler.waiting
    served.client.close()
    served.client = httpx.Client(base_url=served.client.base_url, timeout=60)
    end = time.monotonic() + 10
    while served.server.server_state.connections or served.server.server_state.tasks:
        assert time.monotonic() < end, "a connection or its task is left"
        time.sleep(0.05)
    assert threading.active_count() <= threads + 2, "threads are left"
    assert resident_bytes() - memory < 64 * 2**20, "memory is left"


def test_a_soak_leaves_nothing_behind(served):
    check_soak(served, 120)


@pytest.mark.slow
def test_a_long_soak_leaves_nothing_behind(served):
    check_soak(served, 1000)
