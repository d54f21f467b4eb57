"""Clients that are slow, against uvicorn in this process with an application of a few lines."""

import asyncio
import socket
import threading
import time

import pytest

pytest.importorskip("uvicorn")

import uvicorn

from nmm_serve.serving import connections

HEAD = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


async def app(scope, receive, send):
    """/big sends until `ended` is set, /wait answers when `go` is set, others at once."""
    headers = [(b"content-length", b"2")] if scope["path"] != "/big" else []
    if scope["path"] == "/wait":
        while not go.is_set():
            await asyncio.sleep(0.01)
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    while scope["path"] == "/big" and not ended.is_set():
        await send({"type": "http.response.body", "body": bytes(2**16), "more_body": True})
        await asyncio.sleep(0)
    await send({"type": "http.response.body", "body": b"ok"})


go, ended = threading.Event(), threading.Event()


@pytest.fixture
def address(monkeypatch):
    monkeypatch.setattr(connections, "HEAD_S", 0.3)
    monkeypatch.setattr(connections, "READ_S", 0.3)
    config = uvicorn.Config(
        app, port=0, http=connections.ClientConnection, lifespan="off", log_config=None, log_level="critical"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    go.clear(), ended.clear()
    yield server.servers[0].sockets[0].getsockname()
    go.set(), ended.set()
    server.should_exit = server.force_exit = True
    thread.join(timeout=10)
    assert not thread.is_alive()


def opened(address, data=b""):
    connection = socket.create_connection(address, timeout=10)
    connection.sendall(data)
    return connection


def ending(connection):
    """What is still read until the server closes; a reset ends it too."""
    read = b""
    try:
        while piece := connection.recv(2**16):
            read += piece
    except ConnectionResetError:
        pass
    return read


@pytest.mark.parametrize("data", [b"", b"GET", HEAD[:-2]])
def test_a_head_that_does_not_come_is_not_waited_for(address, data):
    slow = opened(address, data)
    assert ending(opened(address, HEAD.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))).endswith(b"ok")
    assert ending(slow) == b""


def test_one_byte_after_an_answer_does_not_hold_a_connection(address):
    """uvicorn's own limit ends with the first byte of the next request."""
    connection = opened(address, HEAD)
    assert connection.recv(1000).startswith(b"HTTP/1.1 200")
    connection.sendall(b"G")
    assert ending(connection).removeprefix(b"ok") == b""


def test_a_trickle_of_headers_has_one_limit(address):
    connection, end = opened(address, HEAD[:-2]), time.monotonic() + 10
    try:
        while time.monotonic() < end:
            connection.sendall(b"X-A: b\r\n")
            time.sleep(0.02)
    except OSError:  # reset, or a broken pipe
        return
    pytest.fail("it was not cut off")


def test_work_has_no_limit_here(address):
    connection = opened(address, HEAD.replace(b"/ ", b"/wait "))
    time.sleep(0.6)
    go.set()
    assert connection.recv(1000).startswith(b"HTTP/1.1 200")


def test_who_does_not_read_is_cut_off(address):
    connection = opened(address, HEAD.replace(b"/ ", b"/big "))
    time.sleep(1)
    ended.set()
    read = ending(connection)
    assert len(read) > 2**16
    assert not read.endswith(b"ok\r\n0\r\n\r\n")


def test_too_many_connections_cost_the_idle_ones(address, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_S", 30)
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 3)
    idle = [opened(address) for _ in range(3)]
    time.sleep(0.1)
    working = [opened(address, HEAD.replace(b"/ ", b"/wait ")) for _ in range(3)]
    assert [ending(connection) for connection in idle] == [b""] * 3
    time.sleep(0.1)
    assert ending(opened(address, HEAD)) == connections.REFUSAL
    go.set()
    assert all(connection.recv(1000).startswith(b"HTTP/1.1 200") for connection in working)
