"""Resume checkpoints of several processes: each writes its own shards in the background while training goes on.

Beside the shards (torch.distributed.checkpoint in its safetensors format, no pickle) lie the model's configuration and
its processor. A resume checkpoint is published, by one rename, when every file of every process is on the disk, and
can be read by any number of processes.
"""

import json
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from nmm_serve.checkpoint import publish
from nmm_serve.config import NMMConfig
from nmm_serve.errors import CheckpointError
from nmm_serve.models import NMMForConditionalGeneration
from nmm_serve.processor import NMMProcessor
from nmm_serve.train.distributed import Processes
from nmm_serve.train.resume import apply_retention, damaged, sha256, unlisted

SHARDS = "training/shards"
STATE = "training/state.json"


def is_sharded(point: Path) -> bool:
    return (point / SHARDS).is_dir()


@dataclass
class _Pending:
    path: Path
    staging: Path
    work: Future[None]


class BackgroundSaves:
    """Writes one resume checkpoint at a time. Every method must be called by every process."""

    def __init__(self, folder: Path, procs: Processes, keep: int, keep_steps: tuple[int, ...]):
        self._folder, self._procs, self._keep, self._keep_steps = folder, procs, keep, keep_steps
        self._group = dist.new_group(backend="gloo")  # its own: it is used while the trainer talks on another
        self._thread = ThreadPoolExecutor(1, "resume-checkpoint")
        self._pending: _Pending | None = None

    def begin(
        self, step: int, model, processor, optimizer, run: dict[str, Any], state: dict[str, Any], adapted: bool
    ) -> None:
        """Copy what `step` needs and return; the copy is written while training goes on. Waits for an earlier save.
        A model with adapters (`adapted`) goes on from its base: of its weights only those that are trained are kept."""
        assert self._pending is None, "publish the save before"
        path = self._folder / f"step-{step:08d}"
        staging = self._folder / f".{path.name}.saving"
        state = {"step": step, "processes": self._procs.count, **state}
        self._procs.from_main(lambda: _prepare(staging, model, processor, run, state))
        upload = dcp.async_save(
            training_tensors(model, optimizer, adapted),
            storage_writer=HuggingFaceStorageWriter(str(staging / SHARDS), save_distributed=True),
            process_group=self._group,
        )
        assert isinstance(upload, Future)
        self._pending = _Pending(path, staging, self._thread.submit(_seal, upload, staging, self._procs.rank))

    def publish(self, wait: bool = False) -> Path | None:
        """Publish the save under way once it is durable everywhere; `wait` for that, or return None.

        Raises CheckpointError when a process could not write; older resume checkpoints are untouched.
        """
        pending = self._pending
        if pending is None:
            return None
        if not wait and self._procs.highest(int(not pending.work.done())):
            return None
        self._pending = None
        error = pending.work.exception()
        failed = self._procs.highest(int(error is not None))
        if failed:
            if error is not None and self._procs.main:
                shutil.rmtree(pending.staging, ignore_errors=True)
            if error is not None:
                raise CheckpointError(
                    f"the resume checkpoint {pending.path} could not be written: {_reason(error)}; "
                    "those before it are intact: mend that, and run the same command to go on"
                ) from error
            raise SystemExit(1)
        self._procs.from_main(lambda: self._publish(pending))
        return pending.path

    def _publish(self, pending: _Pending) -> None:
        publish(pending.staging, pending.path)
        apply_retention(self._folder, self._keep, self._keep_steps)

    def close(self) -> None:
        """Let a save under way end, unpublished, before the processes part."""
        self._thread.shutdown()


def _prepare(staging: Path, model, processor, run: dict[str, Any], state: dict[str, Any]) -> None:
    shutil.rmtree(staging, ignore_errors=True)
    (staging / SHARDS).mkdir(parents=True)
    model.config.save_pretrained(staging)
    processor.save_pretrained(staging)
    (staging / "run.json").write_text(json.dumps(run, indent=2) + "\n")
    (staging / STATE).write_text(json.dumps(state))
    _write_digests(staging, "files", [p for p in staging.rglob("*") if p.is_file()])


def _seal(upload: Future, staging: Path, rank: int) -> None:
    """Wait until this process's shards are on the disk, then write down what is in them."""
    upload.result()
    _write_digests(staging, f"shards-{rank:05d}", list((staging / SHARDS).glob(f"shard-{rank + 1:05d}-*")))


def _write_digests(staging: Path, name: str, files: list[Path]) -> None:
    digests = {str(file.relative_to(staging)): sha256(file) for file in sorted(files)}
    (staging / f"training/sha256-{name}.json").write_text(json.dumps(digests))


def _reason(error: BaseException) -> str:
    text = str(error.__cause__ or error)
    if "os error 28" in text or "Errno 28" in text or "No space left" in text:
        return "disk full"
    return (text.splitlines() or [type(error).__name__])[-1]


def _kept(model, adapted: bool) -> dict[str, torch.nn.Parameter]:
    """The parameters in a resume checkpoint."""
    # a tied weight has one name here
    return {name: p for name, p in model.named_parameters() if p.requires_grad or not adapted}


def training_tensors(model, optimizer, adapted: bool) -> dict[str, torch.Tensor]:
    """Weights and optimiser state by name, each as this process holds it."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in _kept(model, adapted).items():
        tensors[f"weight/{name}"] = parameter.detach()
        for kind, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{kind}/{name}"] = value.reshape(1) if value.dim() == 0 else value
    return tensors


def open_sharded(path: Path) -> tuple[NMMForConditionalGeneration, NMMProcessor]:
    """The model of a sharded resume checkpoint, its weights still to be loaded, and the processor."""
    model = NMMForConditionalGeneration(NMMConfig.from_pretrained(path))
    return model, NMMProcessor.from_pretrained(path, local_files_only=True)


def load_sharded(path: Path, model, optimizer, procs: Processes, adapted: bool = False) -> dict[str, Any]:
    """Put weights and optimiser back and return the rest of the state, whatever the number of processes that wrote it;
    `check_sharded` has been asked before.

    Raises CheckpointError when the shards are not those of this model.
    """
    state = json.loads((path / STATE).read_text())
    reader = HuggingFaceStorageReader(str(path / SHARDS))
    parameters = _kept(model, adapted)
    wanted: dict[str, torch.Tensor] = {}
    for key in reader.read_metadata().state_dict_metadata:
        kind, name = key.split("/", 1)
        if name not in parameters:
            raise CheckpointError(f"{path} does not fit this model: it has no parameter {name}; delete {path}")
        parameter = parameters[name].detach()
        if kind == "weight":
            wanted[key] = parameter
        else:
            wanted[key] = torch.zeros(1) if kind == "step" else torch.zeros_like(parameter)
    missing = [name for name in parameters if f"weight/{name}" not in wanted]
    if missing:
        raise CheckpointError(f"{path} is incomplete: it lacks {', '.join(missing[:3])}; delete {path}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a process by itself: it is meant
        dcp.load(wanted, storage_reader=reader, no_dist=procs.strategy == "none")
    for key, tensor in wanted.items():
        kind, name = key.split("/", 1)
        if kind != "weight":
            parameter = parameters[name]
            # the fused optimiser wants its step where the parameter is
            optimizer.state[parameter][kind] = tensor[0].to(parameter.device) if kind == "step" else tensor
    torch.set_rng_state(torch.tensor(state["torch_rng"], dtype=torch.uint8))
    return state


def check_sharded(path: Path, procs: Processes) -> None:
    """Raise CheckpointError when a file is missing or was changed since it was written. Every process must call; each
    reads its share of the files."""
    lists = sorted(path.glob("training/sha256-*.json"))
    try:
        state = json.loads((path / STATE).read_text())
        digests = {name: digest for file in lists for name, digest in json.loads(file.read_text()).items()}
        complete = len(lists) == state["processes"] + 1 and not unlisted(path, digests)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # damaged JSON may be JSON of another kind
        complete = False
    bad = [] if complete else [str(path)]
    if complete:
        for name in sorted(digests)[procs.rank :: procs.count]:
            file = path / name
            if not file.is_file() or sha256(file) != digests[name]:
                bad.append(str(file))
    found = procs.merged({procs.rank: bad})
    if any(found.values()):
        procs.fail(damaged(Path(next(name for names in found.values() for name in names)), path))
