"""Errors of a law on runs that it was not fitted to."""

import numpy as np
import numpy.typing as npt

from nmm_serve.evals.scaling.fit import FEWEST, LawFit
from nmm_serve.evals.scaling.law import Law
from nmm_serve.evals.scaling.optimise import Array, polish


def refit(fitted: LawFit, keep_R: npt.NDArray) -> Law:
    """The law of some of the runs, started at the law of all of them and at its resamples' extremes."""
    some = fitted.runs.rows(keep_R)
    extremes = fitted.resampled_SP[[*np.argmin(fitted.resampled_SP, 0), *np.argmax(fitted.resampled_SP, 0)]]
    theta_SP, value_S = polish(fitted.space.design(some), np.concatenate([fitted.theta_P[None], extremes]))
    return fitted.space.law(theta_SP[int(np.argmin(value_S))])


def held_out_error(fitted: LawFit, folds: int = 10, seed: int = 0) -> dict[str, float | int | None]:
    """Error on runs that the fit did not see, each predicted once: cross-validation over runs."""
    runs = fitted.runs
    fold_R = np.random.default_rng(seed).permutation(len(runs)) % min(folds, len(runs))
    predicted_R = np.empty(len(runs))
    for fold in np.unique(fold_R):
        out = fold_R == fold
        if len(runs) - out.sum() < FEWEST - 1:
            return {"mae_pct": None, "r2": None, "n": 0}
        predicted_R[out] = refit(fitted, ~out).loss(runs.n_R[out], runs.d_R[out])
    return errors(runs.loss_R, predicted_R)


def largest_size_error(fitted: LawFit) -> dict[str, float | int | None] | None:
    """Error on the largest size by a law of the smaller ones, the paper's extrapolation. None with under four sizes."""
    sizes = np.unique(fitted.runs.n_R)
    largest = fitted.runs.n_R == sizes[-1]
    if len(sizes) < 4 or (~largest).sum() < FEWEST:
        return None
    seen = refit(fitted, ~largest)
    out = fitted.runs.rows(largest)
    return {"n_params": float(sizes[-1]), **errors(out.loss_R, seen.loss(out.n_R, out.d_R))}


def errors(measured_R: Array, predicted_R: Array) -> dict[str, float | int | None]:
    """Mean absolute error in percent of the loss, and R2 of the loss (None where the losses do not vary, or where a law
    too steep for numbers predicts none)."""
    if not np.isfinite(predicted_R).all():
        return {"mae_pct": None, "r2": None, "n": len(measured_R)}
    spread = ((measured_R - measured_R.mean()) ** 2).sum()
    return {
        "mae_pct": float(100 * np.mean(np.abs(predicted_R / measured_R - 1))),
        "r2": float(1 - ((measured_R - predicted_R) ** 2).sum() / spread) if spread > 0 else None,
        "n": len(measured_R),
    }
