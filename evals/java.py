"""Java, for the tokenizer and METEOR: looked for first, and always stoppable.

Every Java is started in a session of its own and stopped with all its children. Killing the one process would not do:
where `java` is a shell script, the real Java would live on and hold the pipes open that we wait for.
"""

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Sequence

from nmm_serve.errors import EngineError

HINT = "install Java (Debian, Ubuntu: apt install default-jre-headless) for the exact tokenizer and METEOR"
# Java's numbers and bytes would otherwise follow the user's locale.
OPTIONS = ("-Dfile.encoding=UTF-8", "-Duser.language=en", "-Duser.country=US")
_VERSION_TIMEOUT_S = 20


def find_java() -> str:
    """Path of a `java` that runs. Raises EngineError saying why there is none."""
    java = shutil.which("java")
    if java is None:
        raise EngineError(f"there is no java on the PATH; {HINT}")
    try:
        run([java, "-version"], timeout_s=_VERSION_TIMEOUT_S)
    except EngineError as error:
        raise EngineError(f"{java} does not run: {error}; {HINT}") from None
    return java


def start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start Java with pipes for stdin and stdout; end it with `stop`. Raises EngineError when it cannot be started."""
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        raise EngineError(f"it could not be started ({error.strerror})") from None


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and its children, whatever they do. Whoever reads from them then sees the end."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and its children and free its pipes."""
    kill(process)
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def run(command: Sequence[str], stdin: bytes = b"", *, timeout_s: float) -> bytes:
    """Run Java to its end and return what it wrote to stdout. Raises EngineError when it fails or takes too long."""
    process = start(command)
    try:
        out, err = process.communicate(stdin, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise EngineError(f"it did not finish within {timeout_s} s and was stopped") from None
    finally:
        stop(process)
    if process.returncode != 0:
        last = (err.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        raise EngineError(f"it ended with exit status {process.returncode}: {last}")
    return out
