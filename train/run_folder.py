"""The folder of a run: one process at a time, one configuration for good."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import yaml

from nmm_serve.errors import ConfigError, TrainingError
from nmm_serve.train.config import TrainConfig

BASE = "base"
"""Beside a run's checkpoints: the model that its adapters were put on."""
TRACES = ("log.jsonl", "checkpoints", BASE, "final")
"""What a run leaves in its folder, beside its configuration."""

_held: set[IO[str]] = set()


def _let_go() -> None:
    """A lock is held as long as any process has its file open: a data worker that outlives a killed run must not."""
    while _held:
        _held.pop().close()


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder. The lock goes with the process, also after SIGKILL. Raises TrainingError when it is taken."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainingError(f"another run is training in {folder}; wait for it or choose another --out") from None
        _held.add(handle)
        try:
            yield
        finally:
            _held.discard(handle)


def keep_config(folder: Path, config: TrainConfig) -> None:
    """Write `config.yaml`; a run that has begun is continued with the same. Raises ConfigError with the difference.

    A key that the file does not have yet had its default. `parallel` may differ: it changes where the work is done,
    not what is computed. A run has begun once its data and model could be opened.
    """
    changed = changes(folder, config)
    if changed:
        raise ConfigError(
            f"{folder} holds a run with another configuration ({', '.join(changed.values())}); "
            "use the same one to go on, or another --out to start anew"
        )
    if changed is None:
        write_whole(folder / "config.yaml", yaml.safe_dump(_stored(config), sort_keys=False))


def changes(folder: Path, config: TrainConfig) -> dict[str, str] | None:
    """The keys in which a configuration differs from that of the run that has begun in a folder, each in words. None
    where none has begun."""
    path = folder / "config.yaml"
    if not path.is_file() or not any((folder / trace).exists() for trace in TRACES):
        return None
    defaults = _flat(_plain(TrainConfig().to_dict()))
    old, new = defaults | _flat(read_yaml(path)), _flat(_stored(config))
    changed = [k for k in sorted({*old, *new}) if old.get(k) != new.get(k) and not k.startswith("parallel.")]
    return {k: f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in changed}


def _stored(config: TrainConfig) -> dict[str, Any]:
    """A configuration as it comes back out of a YAML file."""
    values: dict[str, Any] = yaml.safe_load(yaml.safe_dump(_plain(config.to_dict())))
    return values


def read_yaml(path: Path) -> dict[str, Any]:
    """Raises ConfigError for a file that is damaged."""
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        values = None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is damaged: it is no YAML mapping; delete it to go on with what you give now")
    return values


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole, and durably, or as it was."""
    staging = path.with_name(f".{path.name}.tmp")
    with staging.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(staging, path)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, sub in value.items() for k, v in _flat(sub, f"{prefix}.{key}" if prefix else key).items()}
    return {prefix: value}
