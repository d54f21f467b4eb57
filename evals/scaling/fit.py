"""One law from one set of runs: the paper's grid of starts, intervals, and what cannot be identified.

Shape suffixes as in `optimise.py`: S problems, R records, K terms, P parameters.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from nmm_serve.errors import NMMError
from nmm_serve.evals.scaling.law import Cost, Law
from nmm_serve.evals.scaling.optimise import DELTA, Array, Design, Pull, coarse, lbfgs, objective, polish
from nmm_serve.evals.scaling.resample import LEVEL, fit_resamples, resample, resampled_interval, valley
from nmm_serve.evals.scaling.space import PARAMETERS, Quantity, Runs, Space

FEWEST = PARAMETERS + 1
_SCOUTS = 96
"""At most so many records, spread over the design, judge the 1764 starts; the best go on with all records."""
_SORTED_AFTER, _PROMISING = 10, 300
_KEPT = 24

_EXACT = 1e-7
"""Residuals of ln L under this are arithmetic, not noise."""
LOGARITHMIC = ("E", "A", "B")
"""Quantities whose interval is found on the log scale."""


@dataclass
class LawFit:
    """A fitted law. `resampled_SP` are the bootstrap's fits, in the coordinates of `space`."""

    runs: Runs
    space: Space
    theta_P: Array
    objective: float
    valley_SP: Array
    """The best fits at given E, from none to nearly the least loss: the direction in which fits are loosest."""
    resampled_SP: Array
    redrawn: int
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    unbounded: dict[str, list[str]] = field(default_factory=dict)
    """Quantities whose interval ends where the search ended: the data set no bound there."""

    @property
    def law(self) -> Law:
        return self.space.law(self.theta_P)

    def interval(self, name: str, quantity: Quantity) -> tuple[float, float]:
        """A 95 % interval: the bootstrap's, widened to the profile's where that reaches further.

        Where the data hold a parameter well the two nearly agree. Where they hardly do, resamples cluster about the
        estimate even when it is far off, and only the profile of the objective sees how flat it is.
        """
        low, high = resampled_interval(quantity(self.resampled_SP))
        if np.abs(self.space.design(self.runs).residuals(self.theta_P[None])[0]).max() < _EXACT:
            # runs without noise: what is left is rounding, and the profile has nothing to rise from
            centre = float(quantity(self.theta_P[None])[0])
            margin = 1e-5 * max(1.0, abs(centre))
            return min(low, centre - margin), max(high, centre + margin)
        below, above = self.profile(name, quantity, (low, high))
        return min(low, below), max(high, above)

    def profile(self, name: str, quantity: Quantity, about: tuple[float, float]) -> tuple[float, float]:
        """Where the objective, minimised over everything else, has risen significantly: the robust rho-test, inverted.

        2 (Q - Q_min) / tau is F(1, n - 5) for an M-estimator with tau = E psi^2 / E psi' (Ronchetti 1982).
        """
        design = self.space.design(self.runs)
        centre = float(quantity(self.theta_P[None])[0])
        rise = critical_rise(design, self.theta_P)
        half = max((about[1] - about[0]) / 2, 1e-9 * max(1.0, abs(centre)))
        offsets_S = half * np.array([0.4, 0.7, 0.9, 1.1, 1.4, 1.8, 2.5, 3.5, 5.0, 8.0])
        signs_S = np.repeat([-1.0, 1.0], len(offsets_S))
        pull = Pull(quantity, centre + signs_S * np.tile(offsets_S, 2), 400 * rise / half**2)
        known_CP = np.concatenate([self.theta_P[None], self.valley_SP, self.resampled_SP])
        off_SC = quantity(known_CP)[None] - pull.target_S[:, None]
        nearest_S = np.argmin(objective(design, known_CP) + 0.5 * pull.strength * off_SC**2, 1)
        theta_SP, value_S = coarse(design, known_CP[nearest_S], pull)
        # a second pass from the nearer neighbour's solution: far targets are reached step by step
        near_SP = np.roll(theta_SP, 1, 0)
        near_SP[[0, len(offsets_S)]] = self.theta_P
        again_SP, again_S = coarse(design, near_SP, pull)
        theta_SP = np.where((again_S < value_S)[:, None], again_SP, theta_SP)
        off_S = quantity(theta_SP) - centre
        rises_S = np.sqrt(np.maximum(objective(design, theta_SP) - self.objective, 0) / rise)
        ends = []
        for sign, side in ((-1, "below"), (1, "above")):
            here = (signs_S == sign) & (off_S * sign > 0)
            order = np.argsort(np.abs(off_S[here]))
            x_S = np.append(0, np.abs(off_S[here])[order])
            y_S = np.maximum.accumulate(np.append(0, rises_S[here][order]))
            over = np.flatnonzero(y_S > 1)
            if len(over):
                i = over[0]
                distance = x_S[i - 1] + (1 - y_S[i - 1]) / (y_S[i] - y_S[i - 1]) * (x_S[i] - x_S[i - 1])
            else:
                distance = x_S[-1]
                self.unbounded.setdefault(name, []).append(side)
            ends.append(centre + sign * distance)
        return ends[0], ends[1]


def critical_rise(design: Design, theta_P: Array) -> float:
    """How far the objective may rise before a value is outside the 95 % interval."""
    try:
        from scipy.special import stdtrit  # scipy.stats would take a second to load
    except ImportError:
        raise NMMError("fits need scipy; pip install 'nmm-serve[evals]'") from None

    r_R = design.residuals(theta_P[None])[0][0]
    freedom = max(1, len(r_R) - PARAMETERS)
    psi_squared = (np.clip(r_R, -DELTA, DELTA) ** 2).sum() / freedom
    spread = np.sqrt((r_R**2).sum() / freedom)
    width = max(1.06 * spread * len(r_R) ** -0.2, DELTA / 2)
    density = np.exp(-0.5 * (r_R / width) ** 2).mean() / (width * np.sqrt(2 * np.pi))
    inside = max(min(1.0, 2 * DELTA * density), (np.abs(r_R) <= DELTA).mean() if spread < DELTA else 0.0)
    tau = psi_squared / inside
    quantile = float(stdtrit(freedom, (1 + LEVEL) / 2))
    return float(0.5 * tau * quantile**2) + 1e-14 * len(r_R)


def best_theta(runs: Runs, space: Space) -> tuple[Array, float]:
    """L-BFGS from every start of the paper's grid; after a few steps the most promising go on; the lowest is kept."""
    design = space.design(runs)
    scouts = design if len(runs) <= _SCOUTS else design.rows(_spread(runs, _SCOUTS))
    theta_SP, value_S = lbfgs(scouts, space.starts(), iterations=_SORTED_AFTER)
    theta_SP, value_S = lbfgs(scouts, theta_SP[np.argsort(value_S)[:_PROMISING]])
    chosen_SP = theta_SP[_distinct(theta_SP, value_S)]
    theta_SP, value_S = polish(design, chosen_SP)
    best = theta_SP[int(np.argmin(value_S))][None]
    theta_SP, value_S = polish(design, best, iterations=2000, tolerance=1e-14)
    return theta_SP[0], float(value_S[0])


def _distinct(theta_SP: Array, value_S: Array) -> npt.NDArray[np.int64]:
    """The best starts that ended in different places."""
    seen: dict[tuple[int, ...], int] = {}
    for index in np.argsort(value_S):
        if not np.isfinite(value_S[index]):
            continue
        seen.setdefault(tuple(np.round(theta_SP[index] * 20).astype(int)), int(index))
        if len(seen) == _KEPT:
            break
    return np.array(list(seen.values()))


def _spread(runs: Runs, count: int) -> npt.NDArray[np.int64]:
    """Evenly chosen runs in order of size and budget, the ends among them."""
    order = np.lexsort((runs.d_R, runs.n_R))
    return order[np.unique(np.round(np.linspace(0, len(order) - 1, count)).astype(int))]


def fit_law(runs: Runs, *, bootstraps: int, seed: int = 0) -> LawFit:
    """Fit the law and its resamples. Needs FEWEST runs of two sizes and two budgets."""
    space = Space.of(runs)
    theta_P, value = best_theta(runs, space)
    count_SR, redrawn = resample(runs, bootstraps, seed)
    design = space.design(runs)
    valley_SP = valley(design, theta_P)
    resampled_SP = fit_resamples(design, count_SR, np.concatenate([theta_P[None], valley_SP]))
    fitted = LawFit(runs, space, theta_P, value, valley_SP, resampled_SP, redrawn)
    for name, quantity in space.quantities().items():
        low, high = fitted.interval(name, quantity)
        fitted.intervals[name] = (_exp(low), _exp(high)) if name in LOGARITHMIC else (low, high)
    low, high = fitted.intervals["a"]
    fitted.intervals["b"] = (1 - high, 1 - low)
    fitted.intervals["d"] = ((1 - high) / high, (1 - low) / low)
    return fitted


def _exp(value: float) -> float:
    return float(np.exp(min(value, 700.0)))


def identification(fitted: LawFit) -> list[str]:
    """Plain warnings where the runs cannot hold a parameter."""
    runs, law, found = fitted.runs, fitted.law, []
    for values, what, exponent, scale in (
        (runs.n_R, "model sizes", "alpha", "A"),
        (runs.d_R, "token budgets", "beta", "B"),
    ):
        count, ratio = len(np.unique(values)), float(values.max() / values.min())
        if count < 3:
            found.append(
                f"{count} {what}: {scale}, {exponent} and E cannot be told apart; three are the least, use five"
            )
        elif ratio < 4:
            found.append(f"{what} span a factor of {ratio:.1f} only: {exponent} and E are hardly identified")
    for name in ("alpha", "beta"):
        low, high = fitted.intervals[name]
        value = getattr(law, name)
        if low <= 0:
            found.append(f"{name}: the interval [{low:.3f}, {high:.3f}] reaches zero; these runs do not identify it")
        elif high - low > value:
            found.append(f"{name} = {value:.3f} is hardly identified: interval [{low:.3f}, {high:.3f}]")
    low, high = fitted.intervals["E"]
    if low < 0.2 * law.E:
        found.append(f"E = {law.E:.3f} is not bounded from below by these runs: interval [{low:.2g}, {high:.3f}]")
    for name in ("alpha", "beta", "a"):
        if name in fitted.unbounded:
            found.append(f"{name}: the search found no bound {' or '.join(fitted.unbounded[name])} the interval given")
    return found


def family_cost(n_R: Array, d_R: Array, flops_R: Array) -> tuple[Cost, float]:
    """C = 6 f N^m D from the runs' own FLOPs, and the largest relative error of that; m = 1, f = 1 where C is 6ND."""
    ratio_R = np.log(flops_R / (6 * n_R * d_R))
    if np.abs(ratio_R).max() < 0.02:
        return Cost(), float(np.abs(np.expm1(ratio_R)).max())
    x_R = np.log(n_R) - np.log(n_R).mean()
    slope = float((x_R * ratio_R).sum() / (x_R * x_R).sum()) if (x_R != 0).any() else 0.0
    level = float(ratio_R.mean() - slope * np.log(n_R).mean())
    left_R = ratio_R - level - slope * np.log(n_R)
    return Cost(factor=float(np.exp(level)), exponent=1 + slope), float(np.abs(np.expm1(left_R)).max())


def describe_law(law: Law) -> Mapping[str, float | None]:
    return {
        "E": law.E, "A": law.A, "alpha": law.alpha, "B": law.B, "beta": law.beta, "a": law.a, "b": law.b, "d": law.d,
    }  # fmt: skip
