"""What a run needs to go on bit for bit: optimiser, random state, place in the data. Safetensors and JSON, no pickle.

A resume checkpoint is a whole checkpoint (any engine can open it) with a `training/` folder beside the weights.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from nmm_serve.checkpoint import WEIGHTS, atomic_directory, checkpoint_hash, write_checkpoint
from nmm_serve.errors import CheckpointError
from nmm_serve.train.adapters import Adapters, trained_tensors
from nmm_serve.train.distributed import Processes, sharded_like

STEP = re.compile(r"step-(\d{8})")
TRAINED = "training/trained.safetensors"
DIGESTS = "training/sha256-files.json"
"""Every file's checksum: a resume goes on with what was written, or not at all."""


def save_resume(
    folder: Path,
    step: int,
    keep: int,
    keep_steps: Sequence[int],
    model,
    processor,
    optimizer,
    run: dict,
    state: dict,
    adapters: Adapters | None = None,
) -> Path:
    """Publish `folder/step-N`, then delete all but the newest `keep` and those of `keep_steps`: never before the new
    one is durable. With adapters the checkpoint holds the merged model, and `training/` what is trained."""
    path = folder / f"step-{step:08d}"
    with atomic_directory(path) as staging:
        write_checkpoint(staging, model if adapters is None else adapters.merged(), processor, run)
        training = staging / "training"
        training.mkdir()
        save_file(_optimizer_tensors(model, optimizer), training / "optimizer.safetensors")
        if adapters is not None:
            save_file(trained_tensors(model), staging / TRAINED)
        (training / "state.json").write_text(json.dumps({"step": step, **state}))
        files = sorted(str(p.relative_to(staging)) for p in staging.rglob("*") if p.is_file())
        (staging / DIGESTS).write_text(json.dumps({name: sha256(staging / name) for name in files}))
    apply_retention(folder, keep, keep_steps)
    return path


def apply_retention(folder: Path, keep: int, keep_steps: Sequence[int]) -> None:
    """Delete all resume checkpoints but the newest `keep` and those of `keep_steps`; each goes whole, by a rename."""
    others = [point for point in resume_points(folder) if step_of(point) not in keep_steps]
    for old in others[:-keep]:
        shutil.rmtree(old.rename(folder / f".{old.name}.gone"))


def step_of(point: Path) -> int:
    """The step that a resume checkpoint was saved after."""
    return int(point.name.removeprefix("step-"))


def branch_off(point: Path, folder: Path) -> None:
    """Start another run in `folder` at a resume checkpoint: its files are linked, not copied, where the disk can.

    The run goes on from there under a configuration of its own. Does nothing in a folder that has started.
    Raises CheckpointError for a damaged checkpoint.
    """
    target = folder / "checkpoints" / point.name
    if resume_points(target.parent) or (folder / "final").is_dir():
        return
    check_point(point)
    with atomic_directory(target) as staging:
        shutil.copytree(point, staging, copy_function=_link, dirs_exist_ok=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copy2(source, target)


def resume_points(folder: Path) -> list[Path]:
    """Complete resume checkpoints, oldest first. Unfinished ones have other names."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if STEP.fullmatch(p.name))


def check_point(point: Path) -> None:
    """Raise CheckpointError when a file of a resume checkpoint is missing or not what was written."""
    lists = {point / DIGESTS, *point.glob("training/sha256-*.json")}  # several processes write several
    digests: dict[str, str] = {}
    for file in sorted(lists):
        try:
            digests |= json.loads(file.read_text())
        except (OSError, ValueError, TypeError):
            raise damaged(file, point) from None
    if unlisted(point, digests):
        raise damaged(point / DIGESTS, point)
    for name, digest in digests.items():
        try:
            intact = sha256(point / name) == digest
        except OSError:
            intact = False
        if not intact:
            raise damaged(point / name, point)


def check_base(base: Path, point: Path) -> str:
    """The hash of the model that adapters were put on. Raises CheckpointError unless it is what it was."""
    expected = json.loads((point / "training/state.json").read_text()).get("base")
    if expected is None:
        raise CheckpointError(
            f"{point} does not say which model its adapters were put on: an earlier version of nmm-train wrote it. "
            f"Delete {point.parent.parent} to start again"
        )
    if checkpoint_hash(base) != expected:
        raise CheckpointError(
            f"{base} is not the model that the adapters in {point} were trained on: a file of it is damaged or "
            f"missing. Put it back, or delete {base.parent} to start again"
        )
    return str(expected)


def unlisted(point: Path, digests: Container[str]) -> list[str]:
    """Files that a run would go on from and that have no checksum: a list of them was cut short."""
    names = {"config.json", "training/state.json", *(str(p.relative_to(point)) for p in point.rglob("*.safetensors"))}
    return sorted(name for name in names if name not in digests)


def damaged(file: str | Path, point: Path) -> CheckpointError:
    what = "is damaged: it is not what was written" if Path(file).exists() else "is missing"
    earlier = [p.name for p in resume_points(point.parent) if p.name < point.name]
    then = f"the one before it, {earlier[-1]}" if earlier else "the beginning: there is none before it"
    return CheckpointError(f"{file} {what}. Delete {point} to go on from {then}.")


def load_resume(path: Path, model, optimizer, procs: Processes) -> dict[str, Any]:
    """Put weights and optimiser back and return the rest of the state; `check_point` has been asked before. Tensors are
    read one by one, those of a sharded model by the main process alone."""

    def read(file, name: str, like: torch.Tensor) -> torch.Tensor:
        handed_out = isinstance(like, DTensor) and not procs.main
        return sharded_like(torch.empty(like.shape, dtype=like.dtype) if handed_out else file.get_tensor(name), like)

    state = json.loads((path / "training/state.json").read_text())
    own = model.state_dict()
    adapted = (path / TRAINED).is_file()  # the rest is as the run began
    tied = model.config.tie_word_embeddings and not adapted
    shared = {"lm_head.weight": "model.embed_tokens.weight"} if tied else {}
    with safe_open(path / (TRAINED if adapted else WEIGHTS), framework="pt") as file:
        names = file.keys() if adapted else list(own)
        weights = {name: read(file, shared.get(name, name), own[name]) for name in names}
    model.load_state_dict(weights, strict=False)
    parameters = dict(model.named_parameters())
    with safe_open(path / "training/optimizer.safetensors", framework="pt") as file:
        keys = file.keys()
        for key in keys:
            kind, name = key.split("/", 1)
            parameter = parameters[name]
            # the fused optimiser wants its step where the parameter is
            value = file.get_tensor(key).to(parameter.device) if kind == "step" else read(file, key, parameter.detach())
            optimizer.state[parameter][kind] = value
    torch.set_rng_state(torch.tensor(state["torch_rng"], dtype=torch.uint8))
    return state


def rng_state() -> list[int]:
    return torch.get_rng_state().tolist()


def _optimizer_tensors(model, optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{kind}/{name}": value.contiguous()
        for name, parameter in model.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
