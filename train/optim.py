"""Optimiser and schedule of arXiv 2504.07951, appendix A."""

import torch
from torch import nn

from nmm_serve.train.config import OptimizerConfig, ScheduleConfig
from nmm_serve.train.parts import lr_scale, part_of

POSITIONS = ("row_embed.weight", "col_embed.weight", "position_embedding.weight")
"""Position tables: our own two, and that of CLIP's and SigLIP's encoders."""


def lr_factor(step: int, steps: int, schedule: ScheduleConfig) -> float:
    """Rate of `step` (from 0) relative to the peak."""
    cooldown = round(schedule.cooldown * steps)
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if step < steps - cooldown:
        return 1.0
    return 1.0 - ((step + 1 - (steps - cooldown)) / (cooldown + 1)) ** 0.5


def build_optimizer(model: nn.Module, config: OptimizerConfig, peak_lr: float) -> torch.optim.AdamW:
    """AdamW over groups of one rate, decayed or not. Each group carries its peak as `peak_lr`.

    Norm gains and position tables are not decayed. torch multiplies decay by the current rate; dividing by the peak
    here makes it p <- p * (1 - weight_decay * lr / peak), the paper's fully decoupled form.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = lr_scale(part_of(name, hasattr(model.model, "vision")), config)
        decayed = parameter.ndim >= 2 and not name.endswith(POSITIONS)
        groups.setdefault((scale, decayed), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "peak_lr": (peak := peak_lr * scale),
                "lr": peak,
                "weight_decay": config.weight_decay / peak if decayed and peak else 0.0,
            }
            for (scale, decayed), parameters in sorted(groups.items())
        ],
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
