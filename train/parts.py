"""The parts of a model that train at rates of their own, or not at all."""

from typing import Any

from torch import nn

from nmm_serve.errors import ConfigError
from nmm_serve.train.config import OptimizerConfig

PARTS = ("vision", "connector", "decoder", "adapters")
ADAPTERS = (".lora_A.", ".lora_B.", ".trainable_tokens_delta.")


def part_of(name: str, late: bool) -> str:
    """Which of `PARTS` the parameter `name` belongs to.

    The patch projection belongs to the encoder where there is one, and leads into the decoder where there is none.
    """
    if any(mark in name for mark in ADAPTERS):
        return "adapters"
    if ".vision." in name:
        return "vision"
    if ".patch_embed." in name:
        return "vision" if late else "connector"
    return "connector" if ".connector." in name else "decoder"


def lr_scale(part: str, config: OptimizerConfig) -> float:
    """The part's rate relative to `optimizer.lr`; 0 is frozen."""
    return 1.0 if part == "adapters" else getattr(config, f"{part}_lr_scale")


def freeze(model: nn.Module, config: OptimizerConfig) -> None:
    """Take the parts with rate 0 out of training, and no others. Raises ConfigError when nothing is left."""
    late = hasattr(model.model, "vision")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(lr_scale(part_of(name, late), config) != 0)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            "optimizer.*_lr_scale is 0 for every part of the model: nothing would be trained; raise one of them"
        )


def describe_parts(model: nn.Module, config: OptimizerConfig) -> dict[str, dict[str, Any]]:
    """Parameters, trained parameters and rate of each part, for the record of a run."""
    late = hasattr(model.model, "vision")
    found: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        part = part_of(name, late)
        entry = found.setdefault(part, {"params": 0, "trained": 0, "lr_scale": lr_scale(part, config)})
        entry["params"] += parameter.numel()
        entry["trained"] += parameter.numel() if parameter.requires_grad else 0
    return {part: found[part] for part in PARTS if part in found}
