"""The bootstrap over runs: resamples, their fits, and the interval they give. Shape suffixes as in `optimise.py`."""

import numpy as np
import numpy.typing as npt

from nmm_serve.errors import DataError
from nmm_serve.evals.scaling.optimise import DELTA, Array, Design, Pull, coarse, polish
from nmm_serve.evals.scaling.space import PARAMETERS, Runs

LEVEL = 0.95
FEWEST_RESAMPLES = 20
"""Under this many resamples with an optimum, what follows from the optimum has no interval."""


def resampled_interval(value_S: Array) -> tuple[float, float]:
    """Percentiles of the resamples, at ranks that hold their level with a hundred resamples too (Weibull's)."""
    value_S = value_S[np.isfinite(value_S)]
    low, high = np.quantile(value_S, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="weibull")
    return float(low), float(high)


def resample(runs: Runs, times: int, seed: int) -> tuple[Array, int]:
    """How often each run is drawn, count_SR. Draws with too few sizes or budgets to fit anything are drawn again."""
    rng = np.random.default_rng(seed)
    size_R, budget_R = (np.unique(v, return_inverse=True)[1] for v in (runs.n_R, runs.d_R))
    least_n, least_d = min(3, size_R.max() + 1), min(3, budget_R.max() + 1)
    counts: list[npt.NDArray[np.int64]] = []
    redrawn = 0
    while len(counts) < times:
        drawn = rng.integers(0, len(runs), len(runs))
        enough = len(np.unique(size_R[drawn])) >= least_n and len(np.unique(budget_R[drawn])) >= least_d
        if enough and len(np.unique(drawn)) >= PARAMETERS:
            counts.append(np.bincount(drawn, minlength=len(runs)))
        else:
            redrawn += 1
            if redrawn > 100 * times:
                raise DataError(f"{len(runs)} runs are too few to resample; add runs of other sizes and budgets")
    return np.array(counts, float), redrawn


def valley(design: Design, theta_P: Array) -> Array:
    least = float(design.y_R.min())
    target_S = least + np.log([0.002, 0.1, 0.3, 0.5, 0.7, 0.82, 0.9, 0.96])
    pull = Pull(lambda t: t[:, 4], target_S, 1e3 * DELTA * len(design.y_R))
    theta_SP = np.repeat(theta_P[None], len(target_S), 0)
    theta_SP, value_S = coarse(design, theta_SP, pull)
    for shift in (1, -1, 1, -1):  # each from its neighbours' solutions, both ways
        again_SP, again_S = coarse(design, np.roll(theta_SP, shift, 0), pull)
        better = again_S < value_S
        theta_SP[better], value_S[better] = again_SP[better], again_S[better]
    return theta_SP


def fit_resamples(design: Design, count_SR: Array, start_CP: Array, probe: int = 12) -> Array:
    """Fit each resample from the estimate, start_CP[0], and from those of the other starts that ever end lower.

    Which do is found on the first `probe` resamples.
    """

    def fits(start_P: Array, count_SR: Array) -> tuple[Array, Array]:
        return polish(design, np.repeat(start_P[None], len(count_SR), 0), count_SR, iterations=80, tolerance=1e-7)

    theta_SP, value_S = fits(start_CP[0], count_SR)
    some = slice(0, probe)
    for start_P in start_CP[1:]:
        again_SP, again_S = fits(start_P, count_SR[some])
        if (again_S < value_S[some] * (1 - 1e-3)).any():
            again_SP, again_S = fits(start_P, count_SR)
            better = again_S < value_S
            theta_SP[better], value_S[better] = again_SP[better], again_S[better]
    return theta_SP
