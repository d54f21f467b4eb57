"""Processes that are killed at chosen moments: at a file operation of theirs, or when a log says so.

Each life is forked from a server that has everything imported, and runs a command as the console script does.
"""

import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["nmm_serve.cli.train", "nmm_serve.train.sweep.run", "nmm_serve.train.loop"])
EVENTS = ("open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "shutil.rmtree")


@dataclass(frozen=True)
class Moment:
    """The n-th file operation on a path that contains `match`; or, with `after`, when that holds."""

    match: str = ""
    n: int = 0
    after: Callable[[], bool] | None = None


def strike(match: str, n: int) -> None:
    """SIGKILL this process at its n-th file operation on a path that contains `match`."""
    seen = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal seen
        if event in EVENTS and match in str(args[0]):
            seen += 1
            if seen == n:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def command(args: list[str]) -> None:
    """`nmm-train ARGS`, on one thread."""
    import torch

    from nmm_serve.cli.train import main

    torch.set_num_threads(1)
    main(args, prog_name="nmm-train")


def limited(size: int, args: list[str]) -> None:
    """`nmm-train ARGS` where no file may grow over `size`: libraries that write without Python meet that too."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    command(args)


def _live(target: Callable, args: tuple, told: str, match: str, n: int) -> None:
    with open(told, "a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    multiprocessing.set_start_method(None, force=True)  # the server's own is not what a console script finds
    if n:
        strike(match, n)
    target(*args)


def living(told: Path) -> list[str]:
    """The processes that still speak into the file `told`: what a killed life has left behind."""

    def speaks(process: Path) -> bool:
        try:
            return (process / "fd/1").readlink() == told
        except OSError:  # it has just ended, or is not ours
            return False

    return [process.name for process in Path("/proc").glob("[0-9]*") if speaks(process)]


def live(target: Callable, args: tuple, told: Path, moment: Moment | None = None, timeout: float = 300) -> int:
    """One life: its exit code, -9 when it was killed. What it says is added to the file `told`."""
    moment = moment or Moment()
    process = CONTEXT.Process(target=_live, args=(target, args, str(told), moment.match, moment.n))
    process.start()
    deadline = time.monotonic() + timeout
    while moment.after is not None and process.is_alive() and time.monotonic() < deadline:
        if moment.after():
            process.kill()
        time.sleep(0.002)
    process.join(max(1.0, deadline - time.monotonic()))
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError(f"no end after {timeout} s; it said: {told.read_text()}")
    assert process.exitcode is not None
    return process.exitcode
