"""Where runs are trained: worker processes of this machine, or Ray's on many. Both take jobs and give back results."""

import contextlib
import multiprocessing
import os
import platform
import sys
import threading
import time
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from nmm_serve.errors import ConfigError, NMMError, TrainingError

Values = dict[str, Any]
Result = tuple[str, str | None]
"""A job's name, and what went wrong with it or None."""


class Pool(Protocol):
    """Trains jobs; `free` says how many more it takes at once."""

    @property
    def free(self) -> int: ...

    def submit(self, name: str, values: Values, out: Path) -> None: ...

    def results(self, seconds: float) -> list[Result]:
        """Jobs that ended, waiting at most `seconds` for one."""
        ...

    def close(self) -> None: ...


def train_job(values: Values, out: str) -> str | None:
    """Train one run in this process. Gives back what went wrong, in one line, or None."""
    try:
        from nmm_serve.train.config import config_from
        from nmm_serve.train.loop import train

        train(config_from(values), out)
    except (NMMError, OSError) as error:
        return str(error)
    except Exception as error:  # a run that fails must not end the sweep
        return f"{type(error).__name__}: {error}"
    return None


def _work(connection: Connection, threads: int, parent: int) -> None:
    """A worker: imports once, then trains the jobs it is sent."""
    os.setpgid(0, 0)  # Ctrl-C is for the sweep, which ends its workers in order
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    import torch

    torch.set_num_threads(threads)
    while True:
        try:
            job = connection.recv()
            connection.send(train_job(*job))
        except (EOFError, OSError):  # the sweep is over
            return


def _leave_with(parent: int) -> None:
    """A sweep that was killed leaves no worker behind: a second one would find its folders taken."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


class LocalPool:
    """`workers` processes with `threads` threads each. A worker that dies is replaced."""

    def __init__(self, workers: int, threads: int) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._threads = threads
        self._idle: list[_Worker] = []
        self._busy: dict[str, _Worker] = {}
        self._workers = workers

    @property
    def free(self) -> int:
        return self._workers - len(self._busy)

    def submit(self, name: str, values: Values, out: Path) -> None:
        worker = self._idle.pop() if self._idle else _Worker(self._context, self._threads)
        try:
            worker.connection.send((values, str(out)))
        except OSError:  # it died while it was idle
            worker = _Worker(self._context, self._threads)
            worker.connection.send((values, str(out)))
        self._busy[name] = worker

    def results(self, seconds: float) -> list[Result]:
        ready = wait([w.connection for w in self._busy.values()], seconds) if self._busy else []
        ended: list[Result] = []
        for name, worker in list(self._busy.items()):
            if worker.connection not in ready:
                continue
            del self._busy[name]
            try:
                ended.append((name, worker.connection.recv()))
                self._idle.append(worker)
            except (EOFError, OSError):
                worker.process.join(10)
                ended.append((name, f"its process died with exit code {worker.process.exitcode}"))
        return ended

    def close(self) -> None:
        for worker in [*self._idle, *self._busy.values()]:
            worker.process.terminate()
            worker.connection.close()
        for worker in [*self._idle, *self._busy.values()]:
            worker.process.join(30)  # a run in hand saves a resume checkpoint first
            worker.process.kill()


class _Worker:
    def __init__(self, context: Any, threads: int) -> None:
        self.connection, theirs = context.Pipe()
        # OpenMP reads it when torch is loaded; later the count can only fall
        with _environment("OMP_NUM_THREADS", str(threads)):
            # no daemon: those may not have the processes that read a run's data
            self.process = context.Process(target=_work, args=(theirs, threads, os.getpid()))
            self.process.start()
        theirs.close()


@contextlib.contextmanager
def _environment(name: str, value: str):
    old = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if old is None:
            del os.environ[name]
        else:
            os.environ[name] = old


def _train_in_ray(values: Values, out: str, threads: int, directory: str) -> str | None:
    """`train_job` in a worker of Ray's, in the directory that the sweep was started in: a worker begins where its
    machine joined the cluster, and paths in `values` may be relative."""
    # Ray adds the directory that the sweep was started in; folders there may be named like libraries, as our source's
    sys.path[:] = [path for path in sys.path if path != directory]
    import torch

    torch.set_num_threads(threads)
    try:
        os.chdir(directory)
        missing = ""
    except OSError:  # no fault where every path is absolute
        missing = (
            f" ({platform.node()} has no folder {directory}, from which the plan's relative paths lead: start the "
            "sweep in a folder that all machines share, or make the paths absolute)"
        )
    problem = train_job(values, out)
    return None if problem is None else problem + missing


class RayPool:
    """Ray tasks on a cluster whose machines share the sweep's folder. Tried with two network namespaces of one
    computer, not on several computers.

    Raises ConfigError without Ray, or when no machine of the cluster has `threads` CPUs and `gpu_share` GPUs;
    TrainingError when the cluster cannot be reached.
    """

    def __init__(self, address: str, workers: int, threads: int, gpu_share: float) -> None:
        try:
            import ray
        except ImportError:
            raise ConfigError(
                "sweeps on many machines need Ray; pip install 'nmm-serve[sweep]', or leave --ray out"
            ) from None
        try:
            ray.init(address=address, log_to_driver=False)
        except Exception as error:
            raise TrainingError(f"Ray's cluster {address!r} cannot be reached: {error}") from None
        self._ray, self._workers = ray, workers
        self._settings = (threads, os.path.abspath(os.curdir))
        self._check(threads, gpu_share)
        self._task = ray.remote(num_cpus=threads, num_gpus=gpu_share, max_retries=0)(_train_in_ray)
        self._busy: dict[Any, str] = {}

    @property
    def free(self) -> int:
        return self._workers - len(self._busy)

    def submit(self, name: str, values: Values, out: Path) -> None:
        self._busy[self._task.remote(values, str(out.resolve()), *self._settings)] = name

    def _check(self, threads: int, gpu_share: float) -> None:
        """Ray lets a task wait for ever that no machine can take."""
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if not any(m.get("CPU", 0) >= threads and m.get("GPU", 0) >= gpu_share for m in machines):
            self._ray.shutdown()
            found = "; ".join(f"{m.get('CPU', 0):g} and {m.get('GPU', 0):g}" for m in machines)
            raise ConfigError(
                f"no machine of the Ray cluster has {threads} CPUs and {gpu_share:g} GPUs for a run (its machines have "
                f"{found}); lower `threads` in the plan, or --gpu-share, which is 0 where there are no GPUs"
            )

    def results(self, seconds: float) -> list[Result]:
        if not self._busy:
            return []
        ready, _ = self._ray.wait(list(self._busy), num_returns=len(self._busy), timeout=seconds)
        ended: list[Result] = []
        for reference in ready:
            name = self._busy.pop(reference)
            try:
                ended.append((name, self._ray.get(reference)))
            except Exception as error:
                ended.append((name, f"its Ray task died: {self._reason(error)}"))
        return ended

    def _reason(self, error: Exception) -> str:
        """One line: of an error with a traceback in it the last, else the first."""
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return lines[-1 if isinstance(error, self._ray.exceptions.RayTaskError) else 0]

    def close(self) -> None:
        for reference in self._busy:
            self._ray.cancel(reference)  # as Ctrl-C is to it
        if self._busy:  # a run in hand saves a resume checkpoint first
            self._ray.wait(list(self._busy), num_returns=len(self._busy), timeout=30)
        self._ray.shutdown()
