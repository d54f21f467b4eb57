"""An engine in a process of its own: its memory and its start are its own, and vLLM allows one engine a process.

The process waits on a pipe while others are measured; requests are rebuilt there from their numbers.
"""

import contextlib
import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from nmm_serve.engines.base import Engine, Output
from nmm_serve.errors import EngineError, NMMError
from nmm_serve.evals.lab.workload import Pictures, Workload

CLOSE_S = 20.0


class Worker:
    """The other end of the pipe.

    Args:
        model, engine, options: as `open_engine` takes them.
        files, seed: as `Pictures` takes them.

    Raises EngineError when the engine does not open, or its process ends.
    """

    def __init__(
        self,
        name: str,
        model: str,
        engine: str,
        options: dict[str, Any],
        *,
        files: Sequence[Path] = (),
        seed: int = 0,
    ) -> None:
        self.name, self.model, self.engine = name, model, engine
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_run, args=(theirs, model, engine, options, tuple(map(str, files)), seed), name=f"engine-{name}"
        )
        begin = time.perf_counter()
        self.process.start()
        theirs.close()
        self.about: dict[str, Any] = self._receive()
        self.startup_s = time.perf_counter() - begin

    def wave(self, workload: Workload, numbers: Sequence[int]) -> tuple[list[Output], float]:
        """Answers to the requests of these numbers, handed over together, and the seconds it took."""
        return self._ask("wave", workload, list(numbers))

    def memory(self) -> dict[str, Any]:
        return self._ask("memory")

    def operator_calls(self, workload: Workload, number: int) -> dict[str, Any]:
        """As `operator_calls` below gives them."""
        return self._ask("operators", workload, number)

    def close(self) -> None:
        if self.process.is_alive():
            with contextlib.suppress(OSError):
                self.pipe.send(None)
            self.process.join(CLOSE_S)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join()
        self.pipe.close()

    def _ask(self, *message: Any) -> Any:
        try:
            self.pipe.send(message)
        except OSError as error:
            raise EngineError(f"the process of {self.name} with engine {self.engine} is gone: {error}") from None
        return self._receive()

    def _receive(self) -> Any:
        try:
            kind, value = self.pipe.recv()
        except EOFError:
            self.process.join(CLOSE_S)
            raise EngineError(
                f"the process of {self.name} with engine {self.engine} ended by itself (exit code "
                f"{self.process.exitcode}); it may have run out of memory"
            ) from None
        if kind == "error":
            raise EngineError(f"{self.name} with engine {self.engine}: {value}")
        return value


def _run(pipe: Connection, model: str, name: str, options: dict[str, Any], files: tuple[str, ...], seed: int) -> None:
    os.dup2(2, 1)  # what libraries print is no result
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of compilers beside the engine
    from nmm_serve.engines import open_engine
    from nmm_serve.evals.lab import resources
    from nmm_serve.evals.lab.workload import set_resolution

    try:
        engine = open_engine(model, name, **options)
    except NMMError as error:
        pipe.send(("error", str(error)))
        return
    try:
        resources.reset_peak()
        pictures = Pictures(files, seed)
        pipe.send(("ready", engine.describe()))
        while (message := pipe.recv()) is not None:
            try:
                if message[0] == "wave":
                    _, workload, numbers = message
                    set_resolution(engine, workload.resolution)
                    requests = [workload.request(pictures, number) for number in numbers]
                    begin = time.perf_counter()
                    outputs = engine.generate(requests)
                    wall_s = time.perf_counter() - begin
                    pipe.send(("done", ([replace(o, text="", token_ids=(), logprobs=None) for o in outputs], wall_s)))
                elif message[0] == "operators":
                    pipe.send(("done", operator_calls(engine, message[1], pictures, message[2])))
                else:
                    pipe.send(("done", resources.memory()))
            except NMMError as error:
                pipe.send(("error", str(error)))
    except (EOFError, BrokenPipeError):
        pass  # whoever asked is gone
    finally:
        engine.close()


def operator_calls(engine: Engine, workload: Workload, pictures: Pictures, number: int) -> dict[str, Any]:
    """Operators that one request makes torch call, views apart: up to the first token, and for each further one.

    Counted without compilation. On a GPU each is at least one kernel launch. Engines without torch give none.
    """
    if engine.name not in ("torch", "vllm"):
        return {"prefill": None, "decode_step": None, "reason": f"engine {engine.name!r} does not run torch operators"}
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += not func.is_view
            return func(*args, **(kwargs or {}))

    counts = []
    for tokens in (1, 2):
        request = replace(workload, output_tokens=tokens).request(pictures, number + tokens)
        with Count() as count:
            (output,) = engine.generate([request])
        if output.error is not None:
            return {"prefill": None, "decode_step": None, "reason": output.error}
        counts.append(count.calls)
    return {"prefill": counts[0], "decode_step": counts[1] - counts[0]}
