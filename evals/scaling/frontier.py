"""The compute frontier of measured losses: convex hull of per-size curves, and its exponent L ~ K C^c."""

from dataclasses import dataclass

import numpy as np

from nmm_serve.evals.scaling.law import SAME_BUDGET, Cost, Law
from nmm_serve.evals.scaling.optimise import Array
from nmm_serve.evals.scaling.space import Runs

PAPER_FROM = 3e19
"""The paper's line starts here; runs under ten times this size start theirs where the second size takes the lead."""
_POINTS = 200


@dataclass(frozen=True)
class Frontier:
    """L = K C^c through the hull between `low` and `high` FLOPs."""

    K: float
    c: float
    low: float
    high: float
    log_c_X: Array
    log_loss_X: Array
    """The hull itself, at the FLOPs exp(log_c_X)."""


def size_curves(runs: Runs) -> dict[float, tuple[Array, Array]]:
    """ln C and ln L of each size with at least two budgets, in order of C. Repeated runs are averaged: budgets within
    `SAME_BUDGET`, since another seed packs other documents and so sees a few tokens more or less."""
    curves = {}
    for size in np.unique(runs.n_R):
        of_size = runs.rows(runs.n_R == size)
        order = np.argsort(of_size.flops_R)
        x_R, y_R = np.log(of_size.flops_R[order]), np.log(of_size.loss_R[order])
        starts = [0]
        for i in range(len(x_R)):
            # from the first of a group: budgets in small steps must not chain
            if x_R[i] - x_R[starts[-1]] > SAME_BUDGET:
                starts.append(i)
        if len(starts) > 1:
            x, y = (np.array([group.mean() for group in np.split(v_R, starts[1:])]) for v_R in (x_R, y_R))
            curves[float(size)] = x, y
    return curves


def frontier(runs: Runs) -> Frontier | None:
    """Up to the lowest loss. None where fewer than two sizes have curves, or the least compute has the least loss."""
    curves = size_curves(runs)
    if len(curves) < 2:
        return None
    low = min(x[0] for x, _ in curves.values())
    high = max(x[-1] for x, _ in curves.values())
    x_X = np.linspace(low, high, _POINTS)
    values_NX = np.array([np.interp(x_X, x, y, left=np.inf, right=np.inf) for x, y in curves.values()])
    best_X = values_NX.min(0)
    covered = np.isfinite(best_X)
    covered &= x_X <= x_X[best_X.argmin()]  # what costs more and reaches less is on no frontier
    if covered.sum() < 2:
        return None
    hull_X = _lower_hull(x_X[covered], best_X[covered])
    x_X, leader_X = x_X[covered], values_NX.argmin(0)[covered]
    start = np.log(PAPER_FROM) if high > np.log(10 * PAPER_FROM) else x_X[np.argmax(leader_X > leader_X[0])]
    use = x_X >= start
    if use.sum() < 10 or len(np.unique(leader_X[use])) < 2:
        use = np.isfinite(x_X)
    c, log_K = np.polyfit(x_X[use], hull_X[use], 1)
    return Frontier(
        K=float(np.exp(log_K)), c=float(c), low=float(np.exp(x_X[use][0])), high=float(np.exp(x_X[use][-1])),
        log_c_X=x_X[use], log_loss_X=hull_X[use],
    )  # fmt: skip


def _lower_hull(x_X: Array, y_X: Array) -> Array:
    """The lower convex hull of the points, at every x (Andrew's monotone chain)."""
    hull: list[int] = []
    for i in range(len(x_X)):
        while len(hull) > 1:
            j, k = hull[-2:]
            if (y_X[k] - y_X[j]) * (x_X[i] - x_X[j]) < (y_X[i] - y_X[j]) * (x_X[k] - x_X[j]):
                break
            hull.pop()
        hull.append(i)
    return np.interp(x_X, x_X[hull], y_X[hull])


def law_exponent(law: Law, low: float, high: float, cost: Cost) -> float | None:
    """c of the law's own optimum between two budgets. None where they are one: a point has no slope."""
    if np.log(high / low) <= SAME_BUDGET:
        return None
    flops = np.geomspace(low, high, 50)
    return float(np.polyfit(np.log(flops), np.log(law.best_loss(flops, cost)), 1)[0])
