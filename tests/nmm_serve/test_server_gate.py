"""The gate before vLLM's server, as an ASGI application without a server around it."""

import asyncio
import json
import os
import queue
import signal
import subprocess
import threading
from functools import partial
from types import SimpleNamespace

import prometheus_client
import pytest

pytest.importorskip("vllm")

from nmm_serve import server_gate as module
from nmm_serve.server_gate import VLLMGate as Gate


async def echo(scope, receive, send):
    """Reads the whole body and answers with its length."""
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size += len(message["body"])
        more = message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(size).encode()})


def ask(path="/v1/chat/completions", headers=(), body=(b"",), app=echo, method="POST", kind="http"):
    """Send the pieces of `body` through the gate; status (or close code), answer, pieces that nobody read."""
    pieces, sent = list(body), []

    async def receive():
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def send(message):
        sent.append(message)

    headers = [(name.encode(), value.encode()) for name, value in headers]
    scope = {"type": kind, "method": method, "path": path, "root_path": "", "headers": headers}
    asyncio.run(Gate(app)(scope, receive, send))
    first = sent[0]
    return first.get("status", first.get("code")), b"".join(m.get("body", b"") for m in sent), pieces


@pytest.fixture
def _key(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "sesame")


@pytest.fixture
def _small(monkeypatch):
    monkeypatch.setattr(module, "MAX_BODY_BYTES", 10)
    monkeypatch.setattr(module, "MAX_DISCARD_BYTES", 40)


def test_without_a_key_everyone_may_enter():
    assert ask(body=(b"abc",))[:2] == (200, b"3")


@pytest.mark.usefixtures("_key")
@pytest.mark.parametrize(
    "path", ["/v1/models", "//v1/models", "/tokenize", "/invocations", "/metrics", "/health/", "/", "/V1/models", ""]
)
def test_every_path_needs_the_key(path):
    assert ask(path)[0] == 401
    assert ask(path, [("authorization", "Bearer sesame")])[0] == 200


def test_metrics_tell_how_many_requests_run_at_once(monkeypatch):
    registry = prometheus_client.CollectorRegistry()
    monkeypatch.setattr(prometheus_client, "Gauge", partial(prometheus_client.Gauge, registry=registry))
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=7))
    gate = Gate(echo)

    async def nothing(*_):
        return {"type": "http.disconnect"}

    app = SimpleNamespace(state=SimpleNamespace(vllm_config=config))
    for _ in range(2):  # a gauge of a name can be made only once
        asyncio.run(gate({"type": "http", "path": "/metrics", "headers": [], "app": app}, nothing, nothing))
    assert b"nmm_max_num_seqs 7.0" in prometheus_client.generate_latest(registry)


@pytest.mark.usefixtures("_key")
@pytest.mark.parametrize("header", ["sesame", "Basic sesame", "Bearer", "Bearer wrong", "Bearer sesame2", "Bearer  x"])
def test_wrong_keys(header):
    status, answer, _ = ask(headers=[("Authorization", header)])
    assert status == 401
    assert "API key" in json.loads(answer)["error"]["message"]


@pytest.mark.usefixtures("_key")
def test_health_is_open_and_websockets_are_not():
    assert ask("/health")[0] == 200
    assert ask("/v1/realtime", kind="websocket")[0] == 1008


@pytest.mark.usefixtures("_small")
def test_a_declared_body_over_the_limit_is_refused_unread_by_the_application():
    async def never(scope, receive, send):
        raise AssertionError("reached the application")

    status, answer, rest = ask(headers=[("content-length", "11")], body=(b"x" * 5, b"x" * 6), app=never)
    assert status == 413
    assert "over the limit of 10 bytes" in json.loads(answer)["error"]["message"]
    assert rest == []  # read to its end, so that the client gets to the answer


@pytest.mark.usefixtures("_small")
def test_an_undeclared_body_is_counted():
    assert ask(body=(b"12345", b"67890"))[:2] == (200, b"10")
    status, answer, _ = ask(body=(b"12345", b"67890", b"1", b"more"))
    assert status == 413
    assert json.loads(answer)["error"]["code"] == 413


@pytest.mark.usefixtures("_small")
def test_an_endless_body_is_cut_off():
    status, _, rest = ask(body=[b"x" * 10] * 100)
    assert status == 413
    assert len(rest) > 90
    status, _, rest = ask(headers=[("content-length", "1000")], body=[b"x" * 10] * 100)
    assert status == 413
    assert len(rest) > 90


def test_the_server_ends_with_its_launcher(monkeypatch):
    launcher = subprocess.Popen(["sleep", "60"])
    told = queue.Queue()
    real = os.kill
    monkeypatch.setattr(module.time, "sleep", lambda seconds: told.put("alive") if launcher.poll() is None else None)
    monkeypatch.setattr(os, "kill", lambda pid, number: told.put(number) if pid == os.getpid() else real(pid, number))
    watch = threading.Thread(target=module.end_with, args=(launcher.pid,), daemon=True)
    watch.start()
    assert told.get(timeout=10) == "alive"
    launcher.kill()
    launcher.wait()
    watch.join(timeout=10)
    assert [*told.queue][-1] == signal.SIGTERM


@pytest.mark.usefixtures("_small")
def test_a_body_that_stalls_is_cut_off(monkeypatch):
    monkeypatch.setattr(module, "DISCARD_S", 0.05)
    sent = []

    async def receive():
        await asyncio.sleep(60)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"content-length", b"99")]}
    asyncio.run(Gate(echo)(scope, receive, send))
    assert sent[0]["status"] == 413
