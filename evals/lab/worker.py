"""An engine in a process of its own; vLLM allows one engine a process.

The process waits on a pipe while others are measured; requests are rebuilt there from their numbers.
"""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nmm_serve.engines.base import Engine, Output
from nmm_serve.evals.lab.process import Child, answer
from nmm_serve.evals.lab.workload import Pictures, Workload


class Worker(Child):
    """Args:
        model, engine, options: as `open_engine` takes them.
        files, seed: as `Pictures` takes them.

    Raises EngineError when the engine does not open, or its process ends.
    """

    def __init__(
        self, name: str, model: str, engine: str, options: dict[str, Any], *, files: Sequence[Path] = (), seed: int = 0
    ) -> None:
        self.name, self.model, self.engine = name, model, engine
        self._options, self._files, self._seed = options, files, seed
        super().__init__(f"{name} with engine {engine}", _run, model, engine, options, tuple(map(str, files)), seed)

    def again(self, **options: Any) -> "Worker":
        """A further process with the same model, and other options."""
        return Worker(self.name, self.model, self.engine, self._options | options, files=self._files, seed=self._seed)

    def wave(self, workload: Workload, numbers: Sequence[int]) -> tuple[list[Output], float]:
        """Answers to the requests of these numbers, handed over together, and the seconds it took."""
        return self.ask("wave", workload, list(numbers))

    def memory(self) -> dict[str, Any]:
        return self.ask("memory")

    def operator_calls(self, workload: Workload, number: int) -> dict[str, Any]:
        """As `operator_calls` below gives them."""
        return self.ask("operators", workload, number)


def _run(pipe: Connection, model: str, name: str, options: dict[str, Any], files: tuple[str, ...], seed: int) -> None:
    os.dup2(2, 1)  # what libraries print is no result
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of compilers beside the engine
    from nmm_serve.engines import open_engine
    from nmm_serve.evals.lab import resources
    from nmm_serve.evals.lab.workload import set_resolution

    with ExitStack() as stack:
        # what a start costs must not hang on what was compiled before
        caches = stack.enter_context(TemporaryDirectory(ignore_cleanup_errors=True))
        os.environ |= {"VLLM_CACHE_ROOT": caches, "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor"}

        def open_() -> tuple[dict[str, Any], Callable[..., Any]]:
            engine = open_engine(model, name, **options)
            stack.callback(engine.close)
            resources.reset_peak()
            pictures = Pictures(files, seed)

            def wave(workload: Workload, numbers: Sequence[int]) -> tuple[list[Output], float]:
                set_resolution(engine, workload.resolution)
                requests = [workload.request(pictures, number) for number in numbers]
                begin = time.perf_counter()
                outputs = engine.generate(requests)
                wall_s = time.perf_counter() - begin
                return [replace(o, text="", token_ids=(), logprobs=None) for o in outputs], wall_s

            def handle(what: str, *message: Any) -> Any:
                if what == "wave":
                    return wave(*message)
                if what == "operators":
                    return operator_calls(engine, message[0], pictures, message[1])
                return resources.memory()

            return engine.describe(), handle

        answer(pipe, open_)


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
