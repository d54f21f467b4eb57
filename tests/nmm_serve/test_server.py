"""Launching: what is refused before a process starts, and how vLLM's failures read."""

import json
import socket
import sys

import pytest
from tiny_checkpoint import make_checkpoint

from nmm_serve import server as module
from nmm_serve import server_options
from nmm_serve.checkpoint import load_config
from nmm_serve.errors import CheckpointError, ConfigError, EngineError, UsageError
from nmm_serve.server import Server, free_port, server_command, start_failure
from nmm_serve.server_options import ServerOptions, flag_names


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("server") / "tiny")


@pytest.fixture
def command(checkpoint):
    def build(**options):
        return server_command(checkpoint, load_config(checkpoint), ServerOptions(**options), 8000)

    return build


def on_cpu(monkeypatch):
    for place in (module, server_options):
        monkeypatch.setattr(place, "on_gpu", lambda: False)


def value(command, flag):
    return command[command.index(flag) + 1]


def test_defaults_are_safe_and_exact(command, monkeypatch):
    on_cpu(monkeypatch)
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
    on_cpu(monkeypatch)
    asked = ServerOptions(extra=("--no-enforce-eager",))
    assert "--enforce-eager" not in command(extra=asked.extra)
    assert "TORCH_COMPILE_DISABLE" not in module.server_environment(asked)
    assert module.server_environment(ServerOptions())["TORCH_COMPILE_DISABLE"] == "1"
    for flags in (["-O3"], ["-O.mode=3"], ["-cc.mode=3"], ["-cc", "{}"], ["--optimization-level", "1"]):
        assert not server_options.eager(ServerOptions(extra=tuple(flags))), flags
    assert server_options.eager(ServerOptions(extra=("-tp", "2")))


class TestConfigFile:
    """vLLM's `--config`, whose flags it ranks below those of the command line: our defaults, too, stand there."""

    @pytest.fixture
    def file(self, tmp_path):
        def write(text):
            (tmp_path / "a.yaml").write_text(text)
            return "--config", str(tmp_path / "a.yaml")

        return write

    def test_what_is_in_it_replaces_defaults(self, command, file, monkeypatch):
        on_cpu(monkeypatch)
        text = "served_model_name: [mine, other]\nmax-model-len: 128\nenforce-eager: false\nseed:\n"
        built = command(extra=file(text + "disable-uvicorn-access-log: false\nssl-certfile: c.pem\n"))
        replaced = ("--served-model-name", "--max-model-len", "--enforce-eager", "--disable-uvicorn-access-log")
        assert not set(replaced) & set(built)
        assert "--config" in built
        assert module.served_name(built) == "mine"
        assert value(built, "--dtype") == "float32"
        assert module.served_name(command(extra=("--served-model-name", "over", *file(text)))) == "over"
        assert server_options.is_encrypted(ServerOptions(extra=file("ssl-certfile: c.pem")))

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("trust-remote-code: true", "--trust-remote-code cannot be passed on"),
            ("disable_chunked_mm_input: false", "wrong answers"),
            ("host: 0.0.0.0", "use the command's own --host"),
            ("dtype: float16", "--dtype was given twice"),
            ("a: [", "is not YAML with one 'flag: value' a line"),
            ("- a", "is not YAML with one 'flag: value' a line"),
        ],
    )
    def test_what_is_in_it_is_checked_like_flags(self, file, text, told):
        with pytest.raises(UsageError, match=told):
            server_options.check_flags(ServerOptions(extra=file(text), dtype="float32"))

    @pytest.mark.parametrize("flags", [("--config=a.yaml",), ("--config", "a.txt"), ("--config",), ("--config",) * 4])
    def test_another_way_to_name_it_is_refused(self, flags):
        with pytest.raises(UsageError, match="--config"):
            server_options.check_flags(ServerOptions(extra=flags))


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


CERTIFICATE = """
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgUL3+rOBobkfYTd+O
KGtokD98XJJ80XHWrGSaHqFAR7yhRANCAARP5rI7EVSrIFORFtS0WhbWBlwY9SVQ
fst4oTevQjKdcvBucoqGBmaVb40a2A+Qf9lnoXNdfrFJEFEXRh4EWDOT
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBdTCCARugAwIBAgIUBa8WYeFSE73jaRUqh9V8ck5DcZ8wCgYIKoZIzj0EAwIw
DzENMAsGA1UEAwwEdGVzdDAgFw0yNjExMjMxMzAzMDlaGA8yMTI2MTAzMDEzMDMw
OVowDzENMAsGA1UEAwwEdGVzdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABE/m
sjsRVKsgU5EW1LRaFtYGXBj1JVB+y3ihN69CMp1y8G5yioYGZpVvjRrYD5B/2Weh
c11+sUkQURdGHgRYM5OjUzBRMB0GA1UdDgQWBBSRS0khMPyLk7Ecy+Lfo9gaSXKS
DjAfBgNVHSMEGDAWgBSRS0khMPyLk7Ecy+Lfo9gaSXKSDjAPBgNVHRMBAf8EBTAD
AQH/MAoGCCqGSM49BAMCA0gAMEUCIQC7niR8d/XhEqVwidS1aGu2qhG70KThNqnT
8ozmJRNsXwIgXJCnApbnewXWc0BOFbgWbrX2bJUp7jyIgBLYjLjzlpc=
-----END CERTIFICATE-----
"""
STUB = """
import http.server, signal, ssl, sys, time
mode = sys.argv[1]
print("starting", mode, flush=True)
if mode == "crash":
    print("ERROR: ValueError: there is no room", flush=True)
    sys.exit(3)
if mode == "slow":
    time.sleep(60)
if mode == "noisy":
    for number in range(300):
        sys.stdout.buffer.write(b"line %d \\xff \\xe2\\x96\\x88 " % number + b"x" * 1000 + b"\\n")
if mode == "stubborn":
    signal.signal(signal.SIGTERM, lambda *_: print("not yet", flush=True))
else:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler)
if mode in ("https", "both sides"):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(sys.argv[5])
    if mode == "both sides":
        context.load_verify_locations(sys.argv[5])
        context.verify_mode = ssl.CERT_REQUIRED
    server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
"""


class TestProcess:
    """The life of the child process, with a stub in the place of vLLM."""

    @pytest.fixture
    def start(self, checkpoint, monkeypatch):
        pytest.importorskip("vllm")
        started = []

        def begin(mode, *flags, log=None):
            def stub(checkpoint, config, options, port):
                return [sys.executable, "-c", STUB, mode, str(port), "--served-model-name", "tiny", *flags[1:]]

            monkeypatch.setattr(module, "server_command", stub)
            lines: list[str] = []
            server = Server(checkpoint, ServerOptions(port=0, extra=flags), log=log or lines.append)
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

    def test_a_proxy_is_not_asked_whether_it_is_ready(self, start, monkeypatch):
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
        monkeypatch.delenv("no_proxy", raising=False)
        server, _ = start("good")
        server.wait_ready(timeout_s=20)

    @pytest.mark.parametrize("mode", ["https", "both sides"])
    def test_one_that_speaks_https_becomes_ready(self, start, tmp_path, mode):
        (tmp_path / "both.pem").write_text(CERTIFICATE)
        server, _ = start(mode, "--ssl-certfile", str(tmp_path / "both.pem"))
        server.wait_ready(timeout_s=20)
        assert server.url == f"https://127.0.0.1:{server.port}"

    def test_its_log_is_read_whatever_becomes_of_the_lines(self, start, caplog):
        """Else its pipe fills, and it stands still at its next word."""

        def log(line):
            raise RuntimeError("nobody reads this")

        server, _ = start("noisy", log=log)
        server.wait_ready(timeout_s=20)
        assert [record.message for record in caplog.records] == [
            "a line of the server's log could not be passed on: nobody reads this"
        ]
        assert "line 299 \ufffd \u2588 " + "x" * 1000 in server.last_log_lines()
