"""Runs drawn from a known law."""

import json
from pathlib import Path

import numpy as np

from nmm_serve.evals.scaling.law import Law
from nmm_serve.evals.scaling.space import Runs

EARLY = Law(E=1.904, A=260.0, alpha=0.3005, B=1900.0, beta=0.3349)
"""Near the paper's early fusion."""
SMALL = Law(E=1.2, A=30.0, alpha=0.35, B=150.0, beta=0.4)
"""A law whose terms matter at sizes and budgets of a laptop."""


def grid(sizes: np.ndarray, budgets: np.ndarray, law: Law, noise: float = 0.0, seed: int = 0) -> Runs:
    """A run of each size and budget, with log-normal noise of relative size `noise`; C = 6ND."""
    n_R, d_R = (v.ravel() for v in np.meshgrid(sizes, budgets))
    loss_R = law.loss(n_R, d_R) * np.exp(noise * np.random.default_rng(seed).standard_normal(n_R.shape))
    return Runs(n_R, d_R, loss_R, 6 * n_R * d_R)


def lines(runs: Runs, family: str = "early", **extra) -> list[str]:
    return [
        json.dumps({"family": family, "n_params": n, "tokens": d, "flops": c, "loss": loss, **extra})
        for n, d, loss, c in zip(runs.n_R, runs.d_R, runs.loss_R, runs.flops_R, strict=True)
    ]


def write_records(path: Path, *groups: list[str]) -> Path:
    path.write_text("\n".join(line for group in groups for line in group) + "\n")
    return path
