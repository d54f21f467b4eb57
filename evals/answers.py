"""Answers kept on disk as they come: a killed evaluation goes on where it was, a repeated one asks nothing twice.

One JSON line an item, in `answers/TASK-IDENTITY.jsonl` beside the record. The key of a line is a hash of everything
that an answer hangs on: the checkpoint's files (weights, config, tokenizer, processor, chat template), the engine with
its versions and type, the task and its version, the prompt, the decoding, the seed, and the bytes of the image.
Delete the file to ask everything again.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from nmm_serve import __version__
from nmm_serve.chat import CHAT_TEMPLATE
from nmm_serve.engines.base import Engine, Output, SamplingParams
from nmm_serve.errors import DataError

FOLDER = "answers"
_SPEED_ONLY = frozenset({
    "threads", "batch_size", "concurrency", "max_num_seqs", "max_num_batched_tokens", "kv_cache_tokens",
    "prefix_caching", "image_cache", "use_cache", "enforce_eager",
})  # fmt: skip
"""What engines tell of themselves that makes them faster or slower only. Anything not listed is part of the key."""
_NOT_THE_MODEL = frozenset({"run.json", "README.md"})
_KEPT_FIELDS = ("text", "finish_reason", "num_prompt_tokens", "num_tokens")


def identity(engine: Engine, seed: int) -> dict[str, Any] | None:
    """What, beside the item, an engine's answers hang on. None when that cannot be known: a URL hides its weights."""
    folder = Path(engine.model)
    if engine.model.startswith(("http://", "https://")) or not folder.is_dir():
        return None
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and path.name not in _NOT_THE_MODEL and path.relative_to(folder).parts[0] != "training"
    )
    return {
        "files": {path.relative_to(folder).as_posix(): _file_digest(path) for path in files},
        "template": CHAT_TEMPLATE,
        "engine": {key: value for key, value in engine.describe().items() if key not in _SPEED_ONLY},
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
        self._image_digests: dict[Path, str | None] = {}
        self._kept: dict[str, dict[str, Any]] = {}
        self._file: BinaryIO | None = None
        self.path: Path | None = None
        self.reused = 0
        if model is None:
            return
        self.path = folder / FOLDER / f"{task}-{_digest(self._base)[:16]}.jsonl"
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
                key, output = kept["key"], kept["output"]
                if isinstance(key, str) and set(output) == set(_KEPT_FIELDS) and isinstance(output["text"], str):
                    self._kept[key] = output
            except (ValueError, TypeError, KeyError):
                continue

    def key(self, text: str, image: Path, sampling: SamplingParams) -> str | None:
        """The key of one item; None when nothing is kept, or when the image cannot be read, which the asking tells."""
        if self._file is None:
            return None
        if image not in self._image_digests:
            try:
                self._image_digests[image] = _file_digest(image)
            except OSError:
                self._image_digests[image] = None
        digest = self._image_digests[image]
        if digest is None:
            return None
        return _digest({**self._base, "text": text, "image": digest, "decoding": asdict(sampling)})

    def get(self, key: str | None) -> Output | None:
        """The kept answer, without its timing."""
        if key is None or key not in self._kept:
            return None
        self.reused += 1
        return Output(**self._kept[key])

    def add(self, answered: list[tuple[str | None, Any, Output]]) -> None:
        """Keep (key, id, output) of each item. A failed item is not kept, so that the next run asks it again."""
        lines = []
        for key, item_id, output in answered:
            if key is not None and output.error is None and key not in self._kept:
                fields = {name: getattr(output, name) for name in _KEPT_FIELDS}
                self._kept[key] = fields
                line = {"key": key, "task": self._task, "id": item_id, "output": fields}
                lines.append(json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
        if lines and self._file is not None:
            self._file.write(b"".join(lines))
            self._file.flush()
            os.fsync(self._file.fileno())


def _file_digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
