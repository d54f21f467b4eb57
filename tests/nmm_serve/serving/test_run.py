"""The server's start, end and log, in this process."""

import logging
import os
import signal
import threading

import pytest
from click.testing import CliRunner
from exported import exported

pytest.importorskip("onnxruntime")
pytest.importorskip("prometheus_client")

import httpx

from nmm_serve.cli import serve as command
from nmm_serve.server_options import ServerOptions
from nmm_serve.serving import app, requests, run


def test_a_signal_before_it_listens_is_obeyed(monkeypatch):
    build = app.build_app

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return build(*args)

    monkeypatch.setattr(app, "build_app", interrupted)
    run.serve(exported("late-moe"), ServerOptions(port=0), threads=1, ready=lambda *_: pytest.fail("it started"))


def test_its_own_faults_are_in_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(logging.root, "handlers", [])  # those of pytest, which a server does not have
    told = []

    def fault(*args):
        raise RuntimeError("a fault of ours")

    def ask(url):
        try:
            told.append(httpx.post(f"{url}/v1/completions", json={"prompt": "a"}, trust_env=False).status_code)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    def ready(url, *_):
        threading.Thread(target=ask, args=(url,)).start()
        return "ready"

    monkeypatch.setattr(requests, "read_completion", fault)
    monkeypatch.setattr(command, "_welcome", ready)
    log = tmp_path / "log"
    flags = ["--port", "0", "--threads", "1", "--log-file", str(log)]
    result = CliRunner().invoke(command.main, ["launch", str(exported("late-moe")), *flags])
    assert (result.exit_code, result.stdout, told) == (0, "ready\n", [500])
    assert "a fault of ours" in log.read_text()
