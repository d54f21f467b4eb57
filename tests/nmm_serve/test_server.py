"""Launching: what is refused before a process starts, and how vLLM's failures read."""

import json
import socket
import sys

import pytest
from tiny_checkpoint import make_checkpoint

from nmm_serve import server as module
from nmm_serve.checkpoint import load_config
from nmm_serve.errors import CheckpointError, ConfigError, EngineError, UsageError
from nmm_serve.server import Server, ServerOptions, flag_names, free_port, server_command, start_failure


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("server") / "tiny")


@pytest.fixture
def command(checkpoint):
    def build(**options):
        return server_command(checkpoint, load_config(checkpoint), ServerOptions(**options), 8000)

    return build


def value(command, flag):
    return command[command.index(flag) + 1]


def test_defaults_are_safe_and_exact(command, monkeypatch):
    monkeypatch.setattr(module, "on_gpu", lambda: False)
    built = command()
    assert built[:4] == [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server"]
    assert value(built, "--host") == "127.0.0.1"
    assert value(built, "--served-model-name") == "tiny"  # not its path
    assert value(built, "--dtype") == "float32"
    assert value(built, "--max-model-len") == "512"
    assert value(built, "--load-format") == "safetensors"
    assert value(built, "--middleware") == "nmm_serve.server_gate.VLLMGate"
    assert {"--disable-chunked-mm-input", "--disable-uvicorn-access-log", "--enforce-eager"} <= set(built)
    assert "--allowed-media-domains" not in built
    # an image takes 32 to 64 of the 512 tokens, so more than 15 are refused unread
    assert json.loads(value(built, "--limit-mm-per-prompt")) == {"image": 15}


def test_the_key_is_not_on_the_command_line(command):
    options = ServerOptions(api_key="sesame")
    assert "sesame" not in " ".join(command(api_key="sesame"))
    assert module.server_environment(options)["VLLM_API_KEY"] == "sesame"


def test_guards_cannot_be_undone_by_the_environment(monkeypatch):
    monkeypatch.setenv("VLLM_MEDIA_URL_ALLOW_REDIRECTS", "1")
    monkeypatch.setenv("VLLM_MEDIA_CONNECTOR", "http")
    monkeypatch.setenv("VLLM_MAX_N_SEQUENCES", "8")
    environment = module.server_environment(ServerOptions())
    assert environment["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"
    assert environment["VLLM_MEDIA_CONNECTOR"] == "nmm"
    assert environment["VLLM_MAX_N_SEQUENCES"] == "8"  # the user's own bound stays
    assert environment["PYTHONSAFEPATH"] == "1"
    assert environment["VLLM_NO_USAGE_STATS"] == "1"


def test_further_flags_pass_through_and_replace_defaults(command):
    built = command(
        extra=("--max_num_seqs", "4", "--served-model-name=other", "--limit-mm-per-prompt.image", "2"),
        media_domains=("a.example", "b.example"),
    )
    assert value(built, "--max_num_seqs") == "4"
    assert "--served-model-name" not in built
    assert module.served_name(built) == "other"
    assert "--limit-mm-per-prompt" not in built
    at = built.index("--allowed-media-domains")
    assert built[at + 1 : at + 3] == ["a.example", "b.example"]


def test_compiling_can_be_asked_for(command, monkeypatch):
    monkeypatch.setattr(module, "on_gpu", lambda: False)
    asked = ServerOptions(extra=("--no-enforce-eager",))
    assert "--enforce-eager" not in command(extra=asked.extra)
    assert "TORCH_COMPILE_DISABLE" not in module.server_environment(asked)
    assert module.server_environment(ServerOptions())["TORCH_COMPILE_DISABLE"] == "1"


def test_flag_names():
    flags = ["--max_num_seqs=4", "-tp", "2", "--seed", "-5", "--limit-mm-per-prompt.image"]
    assert flag_names(flags) == ["max-num-seqs", "tp", "seed", "limit-mm-per-prompt.image"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"extra": ("--api_key", "x")}, "--api-key cannot be passed on to vLLM"),
        ({"extra": ("--allowed-media-domains", "x")}, "use --allow-media-domain"),
        ({"extra": ("--no-disable-chunked-mm-input",)}, "wrong answers"),
        ({"extra": ("--trust-remote-code",)}, "never run"),
        ({"extra": ("--model=other",)}, "the checkpoint is the command's argument"),
        ({"extra": ("--uds", "/x")}, "--uds cannot"),
        ({"extra": ("--allowed-media-d", "x")}, "--allowed-media-domains cannot"),
        ({"extra": ("--dtype", "float16"), "dtype": "float32"}, "--dtype was given twice"),
        ({"media_domains": ("https://a.example/x",)}, "without http://"),
        ({"media_domains": ("",)}, "not a host name"),
        ({"api_key": ""}, "--api-key is empty"),
        ({"api_key": " "}, "--api-key is empty"),
        ({"max_model_len": 513}, "between 1 and the model's context of 512"),
        ({"max_model_len": 0}, "between 1 and"),
    ],
)
def test_contradictions_are_refused(checkpoint, options, told):
    pytest.importorskip("vllm")
    with pytest.raises(ConfigError, match=told):
        Server(checkpoint, ServerOptions(**options))


def test_a_wrong_checkpoint_is_refused(tmp_path):
    pytest.importorskip("vllm")
    for path, told in ((tmp_path, "it lacks config.json"), (tmp_path / "no", "does not exist")):
        with pytest.raises(CheckpointError, match=told):
            Server(path)
    with pytest.raises(UsageError, match="give the directory first"):
        Server("--port")


def test_without_vllm(checkpoint, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"pip install 'nmm-serve\[vllm\]'"):
        Server(checkpoint)


def test_port_in_use_is_found_first(checkpoint):
    pytest.importorskip("vllm")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(EngineError, match=f"cannot listen on 127.0.0.1:{port}: address already in use"):
            Server(checkpoint, ServerOptions(port=port))


def test_ports_and_hosts():
    assert free_port("127.0.0.1", 0) > 1023
    with pytest.raises(ConfigError, match="not an address"):
        free_port("no such host", 8000)
    with pytest.raises(EngineError, match=r"cannot listen on 203\.0\.113\.7:8000"):
        free_port("203.0.113.7", 8000)


USAGE = "usage: api_server.py [-h] [--max-num-seqs MAX]\n  [--max-model-len N]\n"


@pytest.mark.parametrize(
    ("log", "kind", "told"),
    [
        (USAGE + "api_server.py: error: unrecognized arguments: --max-num-seqz 3", UsageError,
         "unknown option '--max-num-seqz'. Did you mean '--max-num-seqs'? See: nmm-serve launch --help"),
        (USAGE + "api_server.py: error: unrecognized arguments: --prot 3", UsageError,
         "unknown option '--prot'. Did you mean '--port'? See: nmm-serve launch --help"),
        (USAGE + "api_server.py: error: argument --dtype: invalid choice: 'x'", UsageError,
         "vLLM refuses its flags: argument --dtype: invalid choice: 'x'"),
        ("(EngineCore pid=3) ERROR 11-22 [core.py:9] ValueError: no room for the KV cache\nTraceback\n"
         "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}", EngineError,
         "vLLM did not start: ValueError: no room for the KV cache"),
        ("one\n\ntwo", EngineError, "vLLM did not start (exit status 1). Its last words:\n  one\n  two"),
        ("", EngineError, "vLLM did not start (exit status 1). Its last words:\n  (none)"),
    ],
)  # fmt: skip
def test_failure_to_start_reads_as_one_line(log, kind, told):
    error = start_failure(log.splitlines(), 1)
    assert (type(error), str(error)) == (kind, told)


def test_stopping_what_was_never_started(checkpoint):
    pytest.importorskip("vllm")
    assert Server(checkpoint, ServerOptions(port=0)).stop() == 0


STUB = """
import http.server, signal, sys, time
mode = sys.argv[1]
print("starting", mode, flush=True)
if mode == "crash":
    print("ERROR: ValueError: there is no room", flush=True)
    sys.exit(3)
if mode == "slow":
    time.sleep(60)
if mode == "stubborn":
    signal.signal(signal.SIGTERM, lambda *_: print("not yet", flush=True))
else:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
"""


class TestProcess:
    """The life of the child process, with a stub in the place of vLLM."""

    @pytest.fixture
    def start(self, checkpoint, monkeypatch):
        pytest.importorskip("vllm")
        started = []

        def begin(mode):
            def stub(checkpoint, config, options, port):
                return [sys.executable, "-c", STUB, mode, str(port), "--served-model-name", "tiny"]

            monkeypatch.setattr(module, "server_command", stub)
            lines: list[str] = []
            server = Server(checkpoint, ServerOptions(port=0), log=lines.append)
            server.start()
            started.append(server)
            return server, lines

        yield begin
        for server in started:
            server.stop(grace_s=0.1)

    def test_it_becomes_ready_and_stops_when_told(self, start):
        server, lines = start("good")
        server.wait_ready()
        assert server.stop() == 0
        assert lines[0] == "starting good"

    def test_it_dies_while_starting(self, start):
        server, _ = start("crash")
        with pytest.raises(EngineError, match="vLLM did not start: ValueError: there is no room"):
            server.wait_ready()

    def test_it_takes_too_long(self, start):
        server, _ = start("slow")
        seconds = []
        with pytest.raises(EngineError, match="not ready after 0.6 s"):
            server.wait_ready(seconds.append, timeout_s=0.6)
        assert seconds == sorted(seconds)
        assert seconds

    def test_it_is_told_to_stop_while_starting(self, start):
        server, _ = start("slow")
        server.terminate()
        with pytest.raises(KeyboardInterrupt):
            server.wait_ready()

    def test_the_second_request_to_stop_ends_it_at_once(self, start):
        server, _ = start("stubborn")
        server.wait_ready()
        server.terminate()
        with pytest.raises(module.subprocess.TimeoutExpired):
            server.process.wait(timeout=0.5)
        server.terminate()
        assert server.wait() == -9

    def test_one_that_does_not_stop_is_ended_by_force(self, start):
        server, lines = start("stubborn")
        server.wait_ready()
        assert server.stop(grace_s=0.5) == -9
        assert "not yet" in lines
