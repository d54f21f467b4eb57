"""Answers kept on disk as they come: a killed evaluation goes on where it was, a repeated one asks nothing twice.

One JSON line a request, in `answers/TASK-IDENTITY.jsonl` beside the record: an `Output` or a `Score`. The key of a line
is a hash of everything that an answer hangs on: the checkpoint's files (weights, config, tokenizer, processor, chat
template), the engine with its versions and type, the task and its version, the kind and the whole content of the
request (prompt, decoding, images), and the seed. Delete the file to ask everything again.
"""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from nmm_serve import __version__
from nmm_serve.chat import CHAT_TEMPLATE
from nmm_serve.engines.base import Engine, Output, Request, Score, ScoreRequest
from nmm_serve.errors import DataError, ImageError, NMMError
from nmm_serve.evals.model_files import ANSWERS, model_files
from nmm_serve.images import load_image

SYNC_S = 1.0
"""A machine that loses power loses no more than the answers of so many seconds; a killed process loses none."""
_SPEED_ONLY = frozenset({
    "threads", "batch_size", "concurrency", "max_num_seqs", "max_num_batched_tokens", "kv_cache_tokens",
    "prefix_caching", "image_cache", "use_cache", "enforce_eager",
})  # fmt: skip
"""What engines tell of themselves that makes them faster or slower only. Anything not listed is part of the key, and
the batch size too where the engine says `answers_depend_on_batch`."""
_KEPT_FIELDS: dict[type, tuple[str, ...]] = {
    Output: ("text", "finish_reason", "num_prompt_tokens", "num_tokens"),
    Score: ("logprob", "is_greedy", "num_tokens"),
}
_TYPES: dict[str, Any] = {"text": str, "finish_reason": str, "logprob": (int, float), "is_greedy": bool}
"""Of their fields; the others are integers."""

Answer = Output | Score


def identity(engine: Engine, seed: int) -> dict[str, Any] | None:
    """What, beside the item, an engine's answers hang on. None when that cannot be known: a URL hides its weights."""
    folder = Path(engine.model)
    if engine.model.startswith(("http://", "https://")) or not folder.is_dir():
        return None
    files = [
        path for path in model_files(folder) if path.name != "run.json"
    ]  # how it was trained: no answer hangs on it
    about = engine.describe()
    speed_only = _SPEED_ONLY - ({"batch_size"} if about.get("answers_depend_on_batch") else set())
    return {
        "files": {path.relative_to(folder).as_posix(): _file_digest(path) for path in files},
        "template": CHAT_TEMPLATE,
        "engine": {key: value for key, value in about.items() if key not in speed_only},
        "nmm-serve": __version__,
        "seed": seed,
    }


class Answers:
    """The kept answers of one task and one model. Use it as a context manager: it holds a lock on its file.

    With `model` None nothing is kept: whose answers they are could not be told.
    """

    def __init__(self, folder: Path, task: str, version: int, model: Mapping[str, Any] | None) -> None:
        """Raises DataError when another evaluation is writing the same file, OSError when it cannot be written."""
        self._base = {"task": task, "version": version, "model": model}
        self._task = task
        self._file_digests: dict[Path, str] = {}
        self._kept: dict[str, Answer] = {}
        self._file: BinaryIO | None = None
        self._synced_s = 0.0
        self.path: Path | None = None
        self.reused = 0
        if model is None:
            return
        self.path = folder / ANSWERS / f"{task}-{_digest(self._base)[:16]}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise DataError(
                f"another evaluation of the same model and task is writing {self.path}; wait for it, or give "
                "-o another folder"
            ) from None
        self._read(self._file)

    def __enter__(self) -> "Answers":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            self._sync(self._file)
            self._file.close()

    def _read(self, file: BinaryIO) -> None:
        """A line that is no answer is as good as none: its item is asked again. A half-written last one is cut off."""
        file.seek(0)
        payload = file.read()
        whole = payload.rfind(b"\n") + 1
        if whole < len(payload):
            file.truncate(whole)
        for line in payload[:whole].split(b"\n"):
            try:
                kept = json.loads(line)
                if isinstance(kept["key"], str):
                    self._kept[kept["key"]] = _answer(kept["output"])
            except (ValueError, TypeError, KeyError):
                continue

    def key(self, kind: str, content: Mapping[str, Any], images: Sequence[Any] = ()) -> str | None:
        """The key of one request of a kind (`generate`, `loglikelihood`); None when nothing is kept, or when an image
        cannot be read, which the asking tells.

        Args:
            content: all that the request holds beside its images: prompt, decoding.
            images: files, whose bytes count, or what `load_image` takes, of which the pixels count.
        """
        if self._file is None:
            return None
        try:
            digests = [self._image_digest(image) for image in images]
        except (OSError, ImageError):
            return None
        return _digest({**self._base, "kind": kind, **content, "images": digests})

    def key_of(self, request: Request | ScoreRequest, task: str, version: Any) -> str | None:
        """The key of an engine's request, made for one of several tasks that are kept together."""
        kind = "generate" if isinstance(request, Request) else "loglikelihood"
        fields = {name: value for name, value in vars(request).items() if name != "images"}
        if isinstance(request, Request):
            fields["sampling"] = asdict(request.sampling)
        return self.key(kind, {"subtask": task, "subtask_version": version, "request": fields}, request.images)

    def _image_digest(self, image: Any) -> str:
        if not isinstance(image, Path):
            upright = load_image(image)
            return hashlib.sha256(f"{upright.size} ".encode() + upright.tobytes()).hexdigest()
        if image not in self._file_digests:
            self._file_digests[image] = _file_digest(image)
        return self._file_digests[image]

    def complete(
        self,
        items: Sequence[tuple[str | None, Any]],
        ask: Callable[[list[int]], Iterable[tuple[int, Any]]],
        progress: Callable[[int], None],
        order: Callable[[int], int] = lambda _: 0,
    ) -> list[Any]:
        """Answers in the order of `items`, which are (key, id): those that were kept, and what `ask` gives for the
        others.

        It is called once with their positions, sorted by `order`, and gives (index into them, answer) as answers come,
        each of which is written down before the next is taken. `progress` is told of those that were kept.
        """
        answers: list[Any] = [self.get(key) for key, _ in items]
        waiting = sorted((i for i, answer in enumerate(answers) if answer is None), key=order)
        progress(len(items) - len(waiting))
        for index, answer in ask(waiting) if waiting else ():
            position = waiting[index]
            answers[position] = answer
            self.add([(*items[position], answer)])
        return answers

    def get(self, key: str | None) -> Answer | None:
        """The kept answer, without its timing."""
        if key is None or key not in self._kept:
            return None
        self.reused += 1
        return self._kept[key]

    def add(self, answered: Iterable[tuple[str | None, Any, Answer | NMMError]]) -> None:
        """Keep (key, id, answer) of each item. A failed item is not kept, so that the next run asks it again."""
        lines = []
        for key, item_id, answer in answered:
            if key is None or key in self._kept or isinstance(answer, NMMError):
                continue
            if isinstance(answer, Output) and answer.error is not None:
                continue
            fields = {name: getattr(answer, name) for name in _KEPT_FIELDS[type(answer)]}
            self._kept[key] = type(answer)(**fields)
            line = {"key": key, "task": self._task, "id": item_id, "output": fields}
            lines.append(json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
        if lines and self._file is not None:
            self._file.write(b"".join(lines))
            self._file.flush()  # outlives this process
            if time.monotonic() - self._synced_s >= SYNC_S:
                self._sync(self._file)

    def _sync(self, file: BinaryIO) -> None:
        os.fsync(file.fileno())  # outlives the machine
        self._synced_s = time.monotonic()


def _answer(fields: dict[str, Any]) -> Answer:
    """Raises TypeError or ValueError for what is no answer."""
    for kind, names in _KEPT_FIELDS.items():
        if set(fields) == set(names) and all(isinstance(fields[name], _TYPES.get(name, int)) for name in names):
            return kind(**fields)
    raise ValueError("neither an Output nor a Score")


def _file_digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
