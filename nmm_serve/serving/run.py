"""Start and end the server: listen, announce, drain."""

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from nmm_serve.errors import ConfigError, EngineError
from nmm_serve.onnx.runtime import INSTALL, Runtime
from nmm_serve.prompt import TokenizerFile
from nmm_serve.server import DRAIN_S, free_port
from nmm_serve.server_options import ServerOptions, check_domains


def serve(
    model: str | Path,
    options: ServerOptions,
    *,
    slots: int = 8,
    max_waiting: int = 64,
    threads: int | None = None,
    ready: Callable[[str, str], None] = lambda url, name: None,
) -> None:
    """Serve an exported model until SIGTERM or SIGINT; what runs may then end, until a second signal.

    Args:
        model: directory that `nmm-serve export` wrote.
        options: host, port, key and the hosts that images may be fetched from; the rest belongs to vLLM.
        slots: requests that run at once.
        max_waiting: requests that wait for a slot; more are refused with 429.
        threads: of the model; default: one for each physical core.
        ready: called with the URL and the model's name when the server listens.

    Raises:
        CheckpointError: `model` is not an exported model.
        ConfigError: an option that this engine does not have.
        EngineError: a missing package, or a port that cannot be had.
        UsageError: a host for images that is none.
    """
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise EngineError(f"{error.name} is not installed; run {INSTALL}") from None
    from nmm_serve.serving.app import Endpoints, build_app
    from nmm_serve.serving.connections import ClientConnection
    from nmm_serve.serving.fetch import Fetcher
    from nmm_serve.serving.metrics import Metrics
    from nmm_serve.serving.scheduler import Scheduler

    check_options(options, max_waiting)
    fetcher = Fetcher(options.media_domains) if options.media_domains else None
    port = free_port(options.host, options.port)
    runtime = Runtime(model, slots=slots, threads=threads)
    encoder = TokenizerFile(model, runtime.manifest.patch_size, runtime.manifest.image_size)
    metrics = Metrics()
    scheduler = Scheduler(runtime, max_waiting, metrics.ended)
    metrics.watch(scheduler)
    name = Path(os.path.abspath(model)).name  # a link keeps its name

    endpoints: Any = None

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            if early:
                self.should_exit = True
                return
            await super().startup(sockets)
            if self.started:
                host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(options.host, options.host)
                ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}", name)

        def handle_exit(self, sig: int, frame: Any) -> None:
            endpoints.draining = True
            if self.should_exit:  # the second signal
                self.force_exit = True
                asyncio.get_running_loop().call_soon_threadsafe(self.cut_all)
            self.should_exit = True

        def cut_all(self) -> None:
            """uvicorn alone would still wait for what is being sent."""
            for connection in list(self.server_state.connections):
                assert isinstance(connection, ClientConnection)
                connection.cut()

    async def main() -> None:
        nonlocal endpoints
        endpoints = Endpoints(name, encoder, runtime.manifest, scheduler, metrics, fetcher)
        config = uvicorn.Config(
            build_app(endpoints, options.api_key), host=options.host, port=port, http=ClientConnection, ws="none",
            lifespan="off", log_config=None, log_level="warning", access_log=False, server_header=False,
            timeout_graceful_shutdown=DRAIN_S,
        )  # fmt: skip
        async with fetcher or nullcontext():
            await Server(config).serve()

    # before uvicorn listens to signals; and when it is done it gives them on, which have been obeyed then
    early: list[int] = []
    before = [
        (number, signal.signal(number, lambda number, _: early.append(number)))
        for number in (signal.SIGINT, signal.SIGTERM)
    ]
    try:
        asyncio.run(main())
    finally:
        scheduler.stop()
        for number, handler in before:
            signal.signal(number, handler)


def check_options(options: ServerOptions, max_waiting: int) -> None:
    """Raises ConfigError for options of vLLM's, and for ones that make no sense."""
    if options.extra:
        raise ConfigError(f"unknown option {options.extra[0]!r} of the onnx engine; see: nmm-serve launch --help")
    check_domains(options.media_domains)
    if options.dtype != "auto":
        raise ConfigError("an exported model has its type already; leave --dtype out, or export with another --quant")
    if options.max_model_len is not None:
        raise ConfigError("an exported model has the model's own context; leave --max-model-len out")
    if options.api_key is not None and not options.api_key.strip():
        raise ConfigError("--api-key is empty, which would leave the server open; give a key or leave the option out")
    if max_waiting < 0:
        raise ConfigError(f"--max-waiting must be at least 0, not {max_waiting}")
