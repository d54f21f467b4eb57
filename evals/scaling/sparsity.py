"""The sparsity-aware law L = E + A/N^alpha + B/D^beta + C/(1-S)^lambda + d/((1-S)^delta N^gamma) (arXiv 2504.07951,
appendix C; Abnar et al., arXiv 2501.12370), S the share of idle experts, N active parameters."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

from nmm_serve.evals.scaling.fit import LawFit
from nmm_serve.evals.scaling.held_out import errors
from nmm_serve.evals.scaling.optimise import Array, Design, lbfgs, polish
from nmm_serve.evals.scaling.records import SweepRecord
from nmm_serve.evals.scaling.resample import resample, resampled_interval

PARAMETERS = 10
_LEAST_LEVELS = 3
"""E, C and lambda are three unknowns of one curve over S."""
_NAMES = ("A", "alpha", "B", "beta", "C", "lambda", "d", "delta", "gamma", "E")
_LOGARITHMIC = {"A", "B", "C", "d", "E"}


def fit_sparsity(fitted: LawFit, records: Sequence[SweepRecord], *, bootstraps: int, seed: int) -> dict[str, Any]:
    """The sparsity-aware fit of a MoE family, or null with the reason. `fitted` is its plain law."""
    idle = [record.sparsity for record in records]
    if any(s is None for s in idle):
        missing = next(r.line for r, s in zip(records, idle, strict=True) if s is None)
        return {"fit": None, "reason": f"line {missing} tells no sparsity; add sparsity or num_experts to each record"}
    s_R = np.array(idle, float)
    levels = np.unique(s_R)
    if len(levels) == 1:
        return {
            "fit": None,
            "reason": f"every run has sparsity {levels[0]:g}: one level cannot identify how the loss depends on it. "
            "The plain law's E and A already hold its share",
        }
    if len(records) <= PARAMETERS:
        return {"fit": None, "reason": f"{len(records)} runs are too few for {PARAMETERS} parameters"}
    design = _design(fitted, s_R)
    theta_SP, value_S = lbfgs(design, _starts(fitted))
    theta_SP, value_S = polish(design, theta_SP[np.argsort(value_S)[:12]], iterations=300)
    theta_P = theta_SP[int(np.argmin(value_S))]
    count_SR, _ = resample(fitted.runs, bootstraps, seed)
    resampled_SP, _ = polish(design, np.repeat(theta_P[None], bootstraps, 0), count_SR, iterations=60, tolerance=1e-6)
    values, resampled = _values(theta_P[None], fitted)[0], _values(resampled_SP, fitted)
    warnings = []
    if len(levels) < _LEAST_LEVELS:
        warnings.append(
            f"{len(levels)} sparsity levels: C, lambda and E cannot be told apart; use {_LEAST_LEVELS} or more"
        )
    intervals = {name: list(resampled_interval(resampled[:, i])) for i, name in enumerate(_NAMES)}
    warnings += [
        f"{name} is hardly identified: interval [{low:.3g}, {high:.3g}]"
        for name, (low, high) in intervals.items()
        if name not in _LOGARITHMIC and high - low > abs(values[_NAMES.index(name)])
    ]
    measured_R = fitted.runs.loss_R
    return {
        "fit": dict(zip(_NAMES, map(float, values), strict=True)),
        "intervals": intervals,
        "levels": levels.tolist(),
        "in_sample": errors(measured_R, np.exp(design.predict(theta_P[None])[0])),
        "warnings": warnings,
    }


def _design(fitted: LawFit, s_R: Array) -> Design:
    runs, space = fitted.runs, fitted.space
    plain = space.design(runs)
    basis_KRP = np.zeros((5, len(runs), PARAMETERS))
    basis_KRP[:2, :, :4] = plain.basis_KRP[:2, :, :4]
    idle_R, size_R = -np.log(1 - s_R), space.log_n - np.log(runs.n_R)
    basis_KRP[2, :, 4], basis_KRP[2, :, 5] = 1, idle_R
    basis_KRP[3, :, 6], basis_KRP[3, :, 7], basis_KRP[3, :, 8] = 1, idle_R, size_R
    basis_KRP[4, :, 9] = 1
    # a term under a millionth of the loss is none, and where it could still grow again
    floor_P = np.full(PARAMETERS, -np.inf)
    floor_P[[0, 2, 4, 6, 9]] = plain.y_R.min() - 14
    return Design(basis_KRP, plain.y_R, floor_P)


def _starts(fitted: LawFit) -> Array:
    """The plain law, with shares of E and of A's term given to the two terms of S."""
    log_A, alpha, log_B, beta, log_E = fitted.theta_P
    starts = []
    for share, power, share_size, power_size, gamma in product(
        (0.1, 0.5), (-0.5, 0.2, 1.0), (0.1, 0.5), (-0.5, 0.2), (0.5, 1.5)
    ):
        starts.append([
            log_A + np.log(1 - share_size), alpha, log_B, beta, log_E + np.log(share), power,
            log_A + np.log(share_size), power_size, gamma * alpha, log_E + np.log(1 - share),
        ])  # fmt: skip
    return np.array(starts)


def _values(theta_SP: Array, fitted: LawFit) -> Array:
    """The law's constants in _NAMES' order, no longer centred."""
    values_SP = theta_SP.copy()
    values_SP[:, 0] += theta_SP[:, 1] * fitted.space.log_n
    values_SP[:, 2] += theta_SP[:, 3] * fitted.space.log_d
    values_SP[:, 6] += theta_SP[:, 8] * fitted.space.log_n
    for i, name in enumerate(_NAMES):
        if name in _LOGARITHMIC:
            values_SP[:, i] = np.exp(np.clip(values_SP[:, i], -700, 700))
    return values_SP
