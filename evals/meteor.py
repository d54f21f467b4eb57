"""METEOR 1.5 through the jar that pycocoevalcap bundles.

pycocoevalcap's own wrapper asks for one caption at a time, never reads the stderr that it pipes, and hangs for ever in
its destructor when Java dies. The protocol is the same here: `SCORE ||| references ||| hypothesis` gives a line of
statistics, `EVAL ||| statistics...` a score for each caption and then the corpus score.
"""

import contextlib
import queue
import subprocess
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

from nmm_serve.errors import EngineError, NMMError
from nmm_serve.evals import java

_SILENCE_S = 120.0
"""Java is given up when it says nothing for so long. Loading its tables takes 10 to 20 s."""
_ENDING_S = 2.0
"""Between closing its output and ending."""
_FIELD = " ||| "


class Meteor:
    """METEOR's Java on tokenised captions. It works beside us from the start; leaving the `with` block stops it.

    Raises EngineError when Java cannot be started.
    """

    def __init__(self, java_path: str, hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        self._questions = [
            _FIELD.join(["SCORE", *refs, _hypothesis(hypothesis)])
            for hypothesis, refs in zip(hypotheses, references, strict=True)
        ]
        command = [java_path, *java.OPTIONS, "-Xmx2G", "-jar", str(_jar()), "-", "-", "-stdio", "-l", "en", "-norm"]
        self._conversation = _Conversation(command)
        self._conversation.send(self._questions)

    def __enter__(self) -> "Meteor":
        return self

    def __exit__(self, *exc: object) -> None:
        self._conversation.close()

    def scores(self) -> tuple[float, list[float]]:
        """METEOR 1.5 (English, normalised): the corpus score and one per image, both 0 to 1.

        Raises EngineError when Java dies, answers nonsense or falls silent for two minutes.
        """
        count = len(self._questions)
        statistics = self._conversation.receive(count)
        self._conversation.send([_FIELD.join(["EVAL", *statistics])])
        answers = self._conversation.receive(count + 1)
        try:
            *per_image, total = [float(answer) for answer in answers]
        except ValueError:
            raise EngineError(f"METEOR's Java answered {answers[0]!r} where a score was expected") from None
        return total, per_image


def _hypothesis(text: str) -> str:
    """As pycocoevalcap passes it on."""
    return text.replace("|||", "").replace("  ", " ")


def _jar() -> Path:
    try:
        from pycocoevalcap.meteor import meteor
    except ImportError:
        raise NMMError("METEOR needs pycocoevalcap; pip install 'nmm-serve[evals]'") from None
    return Path(meteor.__file__).parent / meteor.METEOR_JAR


class _Conversation:
    """Lines to a Java child and lines back; it is stopped when it falls silent.

    Nobody waits on a full pipe: a thread sends, one drains stderr, and one keeps whatever is answered.
    """

    def __init__(self, command: Sequence[str]) -> None:
        try:
            self._process = java.start(command)
        except EngineError as error:
            raise EngineError(f"METEOR's Java failed: {error}") from None
        self._to_send: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._last_words = b""
        self._threads = [
            threading.Thread(target=target, daemon=True) for target in (self._send, self._read, self._read_stderr)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        java.kill(self._process)
        self._to_send.put(None)
        for thread in self._threads:
            thread.join()
        java.stop(self._process)

    def send(self, lines: Iterable[str]) -> None:
        self._to_send.put("".join(line + "\n" for line in lines).encode())

    def receive(self, count: int) -> list[str]:
        """The next `count` answers. Raises EngineError when they do not all come."""
        lines = []
        for _ in range(count):
            try:
                line = self._answers.get(timeout=_SILENCE_S)
            except queue.Empty:
                raise EngineError(f"METEOR's Java said nothing for {_SILENCE_S:g} s and was stopped") from None
            if not line:
                raise EngineError(f"METEOR's Java {self._ending()}")
            lines.append(line.decode(errors="replace").strip())
        return lines

    def _send(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it is gone: whoever reads its answers tells why
            while (payload := self._to_send.get()) is not None:
                self._process.stdin.write(payload)
                self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(b"")

    def _read_stderr(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._last_words = line.strip() or self._last_words

    def _ending(self) -> str:
        try:
            status = f"ended with exit status {self._process.wait(timeout=_ENDING_S)}"
        except subprocess.TimeoutExpired:
            return "closed its output"
        self._threads[-1].join(timeout=_ENDING_S)  # for the last line of stderr
        words = self._last_words.decode(errors="replace")
        return f"{status}: {words}" if words else status
