"""The folder of a run: one process at a time, one configuration for good."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from nmm_serve.errors import ConfigError, TrainingError
from nmm_serve.train.config import TrainConfig


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder. The lock goes with the process, also after SIGKILL. Raises TrainingError when it is taken."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainingError(f"another run is training in {folder}; wait for it or choose another --out") from None
        yield


def keep_config(folder: Path, config: TrainConfig) -> None:
    """Write `config.yaml`; a folder that has one is continued with the same. Raises ConfigError with the difference.

    A key that the file does not have yet had its default. `parallel` may differ: it changes where the work is done,
    not what is computed.
    """
    path = folder / "config.yaml"
    values = yaml.safe_load(yaml.safe_dump(_plain(config.to_dict())))
    if path.is_file():
        defaults = _flat(_plain(TrainConfig().to_dict()))
        old, new = defaults | _flat(yaml.safe_load(path.read_text()) or {}), _flat(values)
        changed = [k for k in sorted({*old, *new}) if old.get(k) != new.get(k) and not k.startswith("parallel.")]
        if changed:
            rows = ", ".join(f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in changed)
            raise ConfigError(
                f"{folder} holds a run with another configuration ({rows}); "
                "use the same one to go on, or another --out to start anew"
            )
        return
    path.write_text(yaml.safe_dump(values, sort_keys=False))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, sub in value.items() for k, v in _flat(sub, f"{prefix}.{key}" if prefix else key).items()}
    return {prefix: value}
