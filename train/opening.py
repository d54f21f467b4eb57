"""What a run begins with: a fresh model, or that of its last resume checkpoint; with adapters, the base they are on."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nmm_serve.checkpoint import checkpoint_hash, load_model, load_processor, read_run, save_checkpoint
from nmm_serve.config import NMMConfig
from nmm_serve.errors import ConfigError
from nmm_serve.image_processor import takes_raw_pixels
from nmm_serve.models import NMMForConditionalGeneration
from nmm_serve.presets import PRESETS, preset
from nmm_serve.processor import NMMProcessor
from nmm_serve.train.adapters import SOFT_TOKEN, Adapters, has_adapters
from nmm_serve.train.build import build
from nmm_serve.train.config import TrainConfig
from nmm_serve.train.data.mixture import Mixture
from nmm_serve.train.distributed import Processes, fingerprint
from nmm_serve.train.resume import check_base, check_point, load_resume, resume_points
from nmm_serve.train.run_folder import BASE
from nmm_serve.train.sharded_resume import check_sharded, is_sharded, load_sharded, open_sharded


@dataclass
class Opening:
    """A model on the CPU: whole in every process, or, where it will be sharded, in the main one alone (the others have
    one without values, until `spread` gives each its shards). What was trained of it is loaded by `load`, later."""

    model: NMMForConditionalGeneration
    processor: NMMProcessor
    adapters: Adapters | None
    base_hash: str | None
    point: Path | None
    """The resume checkpoint to go on from."""
    peak_lr: float

    def load(self, optimizer: Any, procs: Processes) -> dict[str, Any]:
        """Put weights and optimiser of the resume checkpoint in place, once the model is spread over the processes.
        Returns the rest of the state, which is empty in a fresh run."""
        if self.point is None:
            return {}
        if is_sharded(self.point):
            return load_sharded(self.point, self.model, optimizer, procs, adapted=self.adapters is not None)
        return load_resume(self.point, self.model, optimizer, procs)


def open_run(config: TrainConfig, mixture: Mixture, out: Path, procs: Processes) -> Opening:
    """Every process must call; the main one checks files and writes the base.

    Raises CheckpointError for a damaged resume checkpoint or base, ConfigError without a rate, and what building a
    model raises.
    """
    point = procs.from_main(lambda: next(reversed(resume_points(out / "checkpoints")), None))
    sharded = point is not None and is_sharded(point)
    if point is not None:  # before anything in it is read
        check_sharded(point, procs) if sharded else procs.from_main(lambda: check_point(point))
    base, adapted = out / BASE, has_adapters(config)
    base_hash = procs.from_main(lambda: check_base(base, point)) if adapted and point is not None else None

    def from_files() -> tuple[NMMForConditionalGeneration, NMMProcessor]:
        if point is None:
            return build(config, mixture)
        if adapted:  # resume checkpoints hold the merged model
            return load_model(base), load_processor(base)
        return open_sharded(point) if sharded else (load_model(point), load_processor(point))

    model, processor = _in_main(from_files, procs) if procs.shards else from_files()
    peak_lr = procs.from_main(lambda: _peak_lr(config, point))
    processor.image_processor.raw_pixels = takes_raw_pixels(procs.device)
    if adapted and point is None:
        told = {"name": f"{config.name}, before training"}
        procs.from_main(lambda: save_checkpoint(base, model, processor, told))
        base_hash = procs.from_main(lambda: checkpoint_hash(base))
    adapters = Adapters(model, config, processor.token_id(SOFT_TOKEN), base) if adapted else None
    if point is None and not procs.shards:
        procs.check_same("tokenizer and fresh weights", lambda: fingerprint(model, processor))
    return Opening(model, processor, adapters, base_hash, point, peak_lr)


def _peak_lr(config: TrainConfig, point: Path | None) -> float:
    """`optimizer.lr`, or the rate of the preset that the model has. Raises ConfigError when that is not known."""
    if config.optimizer.lr is not None:
        return config.optimizer.lr
    if config.init_from is None:
        return preset(config.model.preset).peak_lr
    if point is not None:  # `init_from` may be gone; before the rate was recorded it was this preset's
        return float(read_run(point).get("peak_lr", preset(config.model.preset).peak_lr))
    trained: dict[str, Any] = read_run(config.init_from).get("config") or {}
    name = (trained.get("model") or {}).get("preset")
    own_shape = trained.get("init_from") is None and (trained.get("start") or {}).get("decoder") is None
    if name not in PRESETS or not own_shape:
        raise ConfigError(
            f"optimizer.lr is not given, and {config.init_from} does not record a preset to take it from: no run of "
            "nmm-train from scratch wrote it; set optimizer.lr"
        )
    return PRESETS[name].peak_lr


def _in_main(
    from_files: Callable[[], tuple[NMMForConditionalGeneration, NMMProcessor]], procs: Processes
) -> tuple[NMMForConditionalGeneration, NMMProcessor]:
    """Build the model in the main process; the others get one of the same shape that takes no memory."""
    built: list[NMMForConditionalGeneration] = []

    def build_here() -> tuple[NMMConfig, NMMProcessor]:
        model, processor = from_files()
        built.append(model)
        return model.config, processor

    model_config, processor = procs.from_main(build_here)
    torch.set_rng_state(procs.from_main(torch.get_rng_state))  # it was drawn from there alone
    if built:
        return built[0], processor
    with torch.device("meta"):
        return NMMForConditionalGeneration(model_config), processor
