"""A run's logs: `log.jsonl`, one JSON object an event, and TensorBoard; cut back to the step of a resume."""

import json
import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nmm_serve.errors import TrainingError


class RunLog:
    """Appends events to `folder/log.jsonl` and scalars to `folder/tensorboard`."""

    def __init__(self, folder: Path, resume_step: int):
        self.path = folder / "log.jsonl"
        self.events = [e for e in _read(self.path) if e.get("step", 0) <= resume_step]
        staging = self.path.with_suffix(".tmp")
        staging.write_text("".join(json.dumps(e) + "\n" for e in self.events))
        os.replace(staging, self.path)
        self._file = self.path.open("a", buffering=1)
        self._board = _tensorboard(folder / "tensorboard", resume_step)

    def write(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        self._file.write(json.dumps(event) + "\n")
        if self._board is not None and "step" in event:
            for key, value in event.items():
                if isinstance(value, float):
                    self._board.add_scalar(f"{event['event']}/{key}", value, event["step"])

    def sync(self) -> None:
        """Have what was written on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


@dataclass(frozen=True)
class Progress:
    """How far a run is. `loss` is that of its last logged step."""

    step: int
    steps: int
    loss: float | None
    done: bool


def progress(folder: Path) -> Progress | None:
    """Read a run's progress from its folder; None before it has started."""
    config = folder / "config.yaml"
    if not config.is_file():
        return None
    values = yaml.safe_load(config.read_text())
    last = next((e for e in reversed(_read(folder / "log.jsonl")) if e["event"] == "train"), None)
    return Progress(
        step=last["step"] if last else 0,
        steps=values["steps"],
        loss=last["loss"] if last else None,
        done=(folder / "final").is_dir(),
    )


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    events = []
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            events.append(json.loads(line))
        except ValueError:
            if number == len(lines):  # a run was killed in the middle of it
                break
            raise TrainingError(
                f"{path} is damaged: line {number} is not JSON. Restore the file, or delete the line: its event will "
                "be missing in the run's record"
            ) from None
    return events


def _tensorboard(folder: Path, resume_step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logging.getLogger(__name__).warning("tensorboard is not installed; logging to log.jsonl only")
        return None
    _leave_write_errors_to_the_run()
    return SummaryWriter(folder, purge_step=resume_step + 1)


def _leave_write_errors_to_the_run() -> None:
    """TensorBoard writes in a thread. Its error, a full disk, is raised again in the run, which says it in one line;
    the thread itself need not print a traceback before."""
    before = threading.excepthook

    def hook(told: threading.ExceptHookArgs) -> None:
        if not (issubclass(told.exc_type, OSError) and type(told.thread).__name__ == "_AsyncWriterThread"):
            before(told)

    if getattr(before, "__qualname__", "") != hook.__qualname__:
        threading.excepthook = hook
