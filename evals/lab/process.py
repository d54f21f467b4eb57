"""A process of its own that answers over a pipe: its memory and its start are its own, and its end is not ours."""

import contextlib
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from nmm_serve.errors import EngineError, NMMError

CLOSE_S = 20.0
ANSWER_S = 1800.0
"""A process that says nothing for this long hangs."""


class Child:
    """The asking end of the pipe.

    Args:
        what: words for errors.
        target: runs in the process with its end of the pipe and `arguments`; it calls `answer` there.

    Raises EngineError when the process ends before it is ready, or says so.
    """

    def __init__(self, what: str, target: Callable[..., None], *arguments: Any) -> None:
        self.what = what
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=target, args=(theirs, *arguments), name=what)
        begin = time.perf_counter()
        self.process.start()
        theirs.close()
        try:
            self.about: dict[str, Any] = self._receive()
        except BaseException:
            self.close()
            raise
        self.startup_s = time.perf_counter() - begin

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    def ask(self, *message: Any) -> Any:
        """What the process's `handle` gives for this message. Raises EngineError."""
        try:
            self.pipe.send(message)
        except OSError as error:
            raise EngineError(f"the process of {self.what} is gone: {error}") from None
        return self._receive()

    def close(self) -> None:
        if self.alive:
            with contextlib.suppress(OSError):
                self.pipe.send(None)
            self.process.join(CLOSE_S)
        if self.alive:
            self.process.terminate()
            self.process.join(CLOSE_S)
        if self.alive:
            self.process.kill()
            self.process.join()
        self.pipe.close()

    def _receive(self) -> Any:
        try:
            if not self.pipe.poll(ANSWER_S):
                self.process.kill()
                self.process.join()
                raise EngineError(f"the process of {self.what} gave no answer for {ANSWER_S / 60:.0f} minutes")
            kind, value = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join(CLOSE_S)
            raise EngineError(
                f"the process of {self.what} ended by itself (exit code {self.process.exitcode}); it may have run out "
                "of memory"
            ) from None
        if kind == "error":
            raise EngineError(f"{self.what}: {value}")
        return value


def answer(pipe: Connection, open_: Callable[[], tuple[dict[str, Any], Callable[..., Any]]]) -> None:
    """The answering end: `open_` says what it is ready with, and gives what handles messages, until there are no more.

    Errors are sent over, whatever they are: the asking end goes on with other processes.
    """
    handle: Callable[..., Any] | None = None
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # whoever asked is gone
        try:
            about, handle = open_()
            pipe.send(("ready", about))
        except Exception as error:
            pipe.send(("error", told(error)))
        while handle is not None and (message := pipe.recv()) is not None:
            try:
                result = handle(*message)
            except Exception as error:
                pipe.send(("error", told(error)))
            else:
                pipe.send(("done", result))


def told(error: Exception) -> str:
    """The error in one line; of one that is not ours the log gets the traceback."""
    if isinstance(error, NMMError):
        return str(error)
    traceback.print_exception(error, file=sys.stderr)
    return f"{type(error).__name__}: {error}"
