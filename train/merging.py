"""Average and interpolate checkpoints of one architecture, weight by weight."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from nmm_serve import __version__
from nmm_serve.checkpoint import (
    checkpoint_hash,
    load_config,
    load_model,
    load_processor,
    read_run,
    save_checkpoint,
)
from nmm_serve.errors import ConfigError, TrainingError
from nmm_serve.models import NMMForConditionalGeneration
from nmm_serve.sizing import count_params
from nmm_serve.train.config import TrainConfig, config_from
from nmm_serve.train.throughput import count_labels
from nmm_serve.train.validate import Validation

NOT_ARCHITECTURE = {"transformers_version", "_name_or_path", "architectures"}


def check_alike(paths: Sequence[Path]) -> None:
    """Raises ConfigError unless all are checkpoints of one configuration and one tokenizer, naming what differs."""
    first = load_config(paths[0]).to_dict()
    words = load_processor(paths[0]).tokenizer.backend_tokenizer.to_str()
    for path in paths[1:]:
        other = load_config(path).to_dict()
        differ = [k for k in sorted({*first, *other} - NOT_ARCHITECTURE) if first.get(k) != other.get(k)]
        if differ:
            sections = {k for k in differ if isinstance(first.get(k) or other.get(k), dict)}  # too long to show
            shown = "; ".join(k if k in sections else f"{k}: {first.get(k)!r} and {other.get(k)!r}" for k in differ[:4])
            raise ConfigError(
                f"{paths[0]} and {path} are different models ({shown}); only checkpoints of one configuration can be "
                "mixed weight by weight"
            )
        if load_processor(path).tokenizer.backend_tokenizer.to_str() != words:
            raise ConfigError(
                f"{paths[0]} and {path} have different tokenizers, so that a row of one embedding means another token "
                "in the other; train them with one tokenizer (tokenizer.path) to mix them"
            )


def shares_of(weights: Sequence[float] | None, count: int) -> list[float]:
    """Weights as shares of 1; equal ones by default. Raises ConfigError for another number of weights or bad values."""
    weights = [1.0] * count if weights is None else list(weights)
    if len(weights) != count:
        raise ConfigError(f"--weights has {len(weights)} values for {count} checkpoints; give one for each")
    if any(not math.isfinite(w) or w < 0 for w in weights) or sum(weights) <= 0:
        raise ConfigError(f"--weights must be 0 or more and not all 0, not {weights}")
    return [w / sum(weights) for w in weights]


def merge(paths: Sequence[Path], out: Path, weights: Sequence[float] | None = None) -> list[float]:
    """Write the weighted mean of checkpoints to `out`, and return the shares. One model is in memory beside the sum.

    Raises ConfigError for models or tokenizers that differ, CheckpointError for what is no checkpoint.
    """
    if len(paths) < 2:
        raise ConfigError("give at least two checkpoints to merge")
    if out.exists():
        raise ConfigError(f"{out} exists; choose a directory that does not exist yet")
    shares = shares_of(weights, len(paths))
    check_alike(paths)
    model = load_model(paths[0])
    total = {name: share_of(tensor, shares[0]) for name, tensor in model.state_dict().items()}
    for path, share in zip(paths[1:], shares[1:], strict=True):
        for name, tensor in load_model(path).state_dict().items():
            total[name] += share_of(tensor, share)
    model.load_state_dict(total)  # rounds to the checkpoints' own type
    counts = count_params(model.config)
    run = {
        "format_version": 1,
        "name": out.name,
        "family": model.config.family,
        "params": {"total": counts.total, "active": counts.active, "paper": counts.paper},
        "merged": [describe(path) | {"share": share} for path, share in zip(paths, shares, strict=True)],
        "versions": {"nmm-serve": __version__, "torch": torch.__version__},
    }
    save_checkpoint(out, model, load_processor(paths[0]), run)
    return shares


def share_of(tensor: torch.Tensor, share: float) -> torch.Tensor:
    return tensor.double() * share


def describe(path: Path) -> dict[str, Any]:
    """Which checkpoint this is, for the record of what was made from it."""
    run = read_run(path)
    known: dict[str, Any] = {key: run[key] for key in ("name", "steps", "tokens") if key in run}
    return {"path": str(path), "sha256": checkpoint_hash(path), **known}


def training_config(path: Path) -> TrainConfig:
    """The configuration that a checkpoint was trained with. Raises ConfigError when its record holds none."""
    values = read_run(path).get("config")
    if values is None:
        raise ConfigError(f"{path}/run.json names no training configuration; name the data with --data RECIPE.yaml")
    return config_from(values)


def interpolate(
    a: Path,
    b: Path,
    config: TrainConfig,
    points: int = 11,
    progress: Callable[[int, dict[str, float]], None] | None = None,
) -> dict[str, Any]:
    """The validation loss on the straight line from the weights of `a` to those of `b`, at evenly spaced points.

    Args:
        config: whose `data.validation`, `objective`, `context_length` and `rows` are used.
        progress: called after each point with its number, from 1, and its losses.

    Returns:
        A record. `barrier` is by how much the loss rises at most above the straight line between the losses of the
        two ends, in nats a token: 0 where it never does.

    Raises ConfigError for models or tokenizers that differ, or without validation sources; TrainingError for a loss
    that is not finite.
    """
    if points < 2:
        raise ConfigError(f"--points must be at least 2, the two ends, not {points}")
    if not config.data.validation:
        raise ConfigError("data.validation is empty: there is nothing to measure the loss on; name a source there")
    check_alike([a, b])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, processor = load_model(a).float().to(device), load_processor(a)
    if config.context_length > model.config.max_position_embeddings:
        raise ConfigError(
            f"context_length {config.context_length} is over that of {a}, {model.config.max_position_embeddings}"
        )
    validation = Validation(config, processor, device, torch.float32)
    measured = []
    for number, (t, mixed) in enumerate(path_between(model, b, points), 1):
        losses = validation.losses(mixed)
        if bad := {name: loss for name, loss in losses.items() if not math.isfinite(loss)}:
            raise TrainingError(f"the loss at t = {t:g} is not finite: {bad}; one of the two models is damaged")
        measured.append({"t": t, "losses": losses})
        if progress is not None:
            progress(number, losses)
    return {
        "format_version": 1,
        "kind": "interpolation",
        "definitions": {
            "t": "weights = (1 - t) * a + t * b",
            "losses": "cross-entropy in nats a token on the validation documents; loss_avg is the plain mean",
            "barrier": "largest rise of the loss above the straight line between the losses of the ends, at least 0",
        },
        "a": describe(a),
        "b": describe(b),
        "points": measured,
        "barrier": barriers(measured),
        "data": {
            "validation": config.data.validation,
            "documents": config.data.validation_documents,
            "labels": {name: sum(map(count_labels, batches)) for name, batches in validation.batches.items()},
            "objective": config.objective,
        },
        "hardware": {"device": device, "threads": torch.get_num_threads()},
        "versions": {"nmm-serve": __version__, "torch": torch.__version__},
    }


def path_between(
    model: NMMForConditionalGeneration, b: Path, points: int
) -> Iterator[tuple[float, NMMForConditionalGeneration]]:
    """`model`, first as it is and last with the weights of `b`. The same object each time."""
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    end = load_model(b).float().to(model.device).state_dict()
    for index in range(points):
        t = index / (points - 1)
        model.load_state_dict({name: torch.lerp(start[name], end[name], t) for name in start})
        yield t, model


def barriers(measured: Sequence[dict[str, Any]]) -> dict[str, float]:
    """For each loss, the largest rise above the chord between the ends."""
    first, last = measured[0]["losses"], measured[-1]["losses"]
    return {
        name: max(p["losses"][name] - ((1 - p["t"]) * first[name] + p["t"] * last[name]) for p in measured)
        for name in first
    }
