"""One law from one set of runs: the paper's grid of starts, intervals, held-out error, and what cannot be identified.

Shape suffixes as in `optimise.py`: S problems, R records, K terms, P parameters.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product

import numpy as np
import numpy.typing as npt

from nmm_serve.errors import DataError, NMMError
from nmm_serve.evals.scaling.law import Cost, Law, log_optimal_size
from nmm_serve.evals.scaling.optimise import DELTA, Array, Design, Pull, lbfgs, objective, polish

GRID = {
    "a": range(0, 31, 5),
    "alpha": (0, 0.5, 2.5),
    "b": range(0, 31, 5),
    "beta": (0, 0.5, 2.5),
    "e": (-1, -0.5, 0.5, 1),
}
"""The paper's starts: a = ln A, b = ln B, e = ln E. 1764 of them."""
PARAMETERS = 5
FEWEST = PARAMETERS + 1
LEVEL = 0.95
_SCOUTS = 96
"""At most so many records, spread over the design, judge the 1764 starts; the best go on with all records."""
_SORTED_AFTER, _PROMISING = 10, 300
_KEPT = 24

_NO_FLOOR = float(np.log(1e-3))
"""An E under a thousandth of the least loss is none; it stays there, where it can still be seen to matter."""

Quantity = Callable[[Array], Array]
"""Maps theta_SP (ln A, alpha, ln B, beta, ln E, centred) to a quantity of each fit."""


@dataclass(frozen=True)
class Runs:
    """Sizes, tokens and losses of the runs of one family and target."""

    n_R: Array
    d_R: Array
    loss_R: Array
    flops_R: Array

    def __len__(self) -> int:
        return len(self.n_R)

    def rows(self, keep_R: npt.NDArray) -> "Runs":
        return Runs(self.n_R[keep_R], self.d_R[keep_R], self.loss_R[keep_R], self.flops_R[keep_R])


@dataclass(frozen=True)
class Space:
    """The fit's coordinates: ln A and ln B are taken at the mean size and mean budget, which unties them from alpha
    and beta. The optimum is that of the paper's own coordinates."""

    log_n: float
    log_d: float

    @classmethod
    def of(cls, runs: Runs) -> "Space":
        return cls(float(np.log(runs.n_R).mean()), float(np.log(runs.d_R).mean()))

    def design(self, runs: Runs) -> Design:
        basis_KRP = np.zeros((3, len(runs), PARAMETERS))
        basis_KRP[0, :, 0] = basis_KRP[1, :, 2] = basis_KRP[2, :, 4] = 1
        basis_KRP[0, :, 1] = self.log_n - np.log(runs.n_R)
        basis_KRP[1, :, 3] = self.log_d - np.log(runs.d_R)
        floor_P = np.full(PARAMETERS, -np.inf)
        floor_P[4] = np.log(runs.loss_R.min()) + _NO_FLOOR
        return Design(basis_KRP, np.log(runs.loss_R), floor_P)

    def starts(self) -> Array:
        theta_SP = np.array(list(product(*(GRID[k] for k in ("a", "alpha", "b", "beta", "e")))), float)
        theta_SP[:, 0] -= theta_SP[:, 1] * self.log_n
        theta_SP[:, 2] -= theta_SP[:, 3] * self.log_d
        return theta_SP

    def law(self, theta_P: Array) -> Law:
        log_A, log_B = theta_P[0] + theta_P[1] * self.log_n, theta_P[2] + theta_P[3] * self.log_d
        return Law(
            E=float(np.exp(theta_P[4])), A=float(np.exp(log_A)), alpha=float(theta_P[1]),
            B=float(np.exp(log_B)), beta=float(theta_P[3]),
        )  # fmt: skip

    def quantities(self) -> dict[str, Quantity]:
        """What gets an interval, on a scale where it may take any value: logs of E, A and B; the split a."""
        return {
            "E": lambda t: t[:, 4],
            "A": lambda t: t[:, 0] + t[:, 1] * self.log_n,
            "alpha": lambda t: t[:, 1],
            "B": lambda t: t[:, 2] + t[:, 3] * self.log_d,
            "beta": lambda t: t[:, 3],
            "a": lambda t: _split(t[:, 1], t[:, 3]),
        }

    def optimal_size(self, flops: float, cost: Cost) -> Quantity:
        def log_n(t: Array) -> Array:
            alpha, beta = np.maximum(t[:, 1], _TINY), np.maximum(t[:, 3], _TINY)
            log_A, log_B = t[:, 0] + t[:, 1] * self.log_n, t[:, 2] + t[:, 3] * self.log_d
            return log_optimal_size(log_A, alpha, log_B, beta, np.log(flops), cost)

        return log_n

    def optimal_loss(self, flops: float, cost: Cost) -> Quantity:
        """ln L at the compute-optimal size."""
        size = self.optimal_size(flops, cost)

        def log_loss(t: Array) -> Array:
            log_n = size(t)
            log_d = np.log(flops / (6 * cost.factor)) - cost.exponent * log_n
            terms = (t[:, 0] + t[:, 1] * (self.log_n - log_n), t[:, 2] + t[:, 3] * (self.log_d - log_d), t[:, 4])
            return np.log(sum(np.exp(np.clip(term, -60, 60)) for term in terms))

        return log_loss


_TINY = 1e-3
_EXACT = 1e-7
"""Residuals of ln L under this are arithmetic, not noise."""
LOGARITHMIC = ("E", "A", "B")
"""Quantities whose interval is found on the log scale."""


def _split(alpha: Array, beta: Array) -> Array:
    alpha, beta = np.maximum(alpha, _TINY), np.maximum(beta, _TINY)
    return np.asarray(beta / (alpha + beta))


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
        theta_SP, value_S = _coarse(design, known_CP[nearest_S], pull)
        # a second pass from the nearer neighbour's solution: far targets are reached step by step
        near_SP = np.roll(theta_SP, 1, 0)
        near_SP[[0, len(offsets_S)]] = self.theta_P
        again_SP, again_S = _coarse(design, near_SP, pull)
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


def _coarse(design: Design, start_SP: Array, pull: Pull) -> tuple[Array, Array]:
    return polish(design, start_SP, pull=pull, iterations=40, tolerance=1e-5)


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


def resampled_interval(value_S: Array) -> tuple[float, float]:
    """Percentiles of the resamples, at ranks that hold their level with a hundred resamples too (Weibull's)."""
    value_S = value_S[np.isfinite(value_S)]
    low, high = np.quantile(value_S, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="weibull")
    return float(low), float(high)


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


def valley(design: Design, theta_P: Array) -> Array:
    least = float(design.y_R.min())
    target_S = least + np.log([0.002, 0.1, 0.3, 0.5, 0.7, 0.82, 0.9, 0.96])
    pull = Pull(lambda t: t[:, 4], target_S, 1e3 * DELTA * len(design.y_R))
    theta_SP = np.repeat(theta_P[None], len(target_S), 0)
    theta_SP, value_S = _coarse(design, theta_SP, pull)
    for shift in (1, -1, 1, -1):  # each from its neighbours' solutions, both ways
        again_SP, again_S = _coarse(design, np.roll(theta_SP, shift, 0), pull)
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


def _exp(value: float) -> float:
    return float(np.exp(min(value, 700.0)))


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
    """Mean absolute error in percent of the loss, and R2 of the loss (None where the losses do not vary)."""
    spread = ((measured_R - measured_R.mean()) ** 2).sum()
    return {
        "mae_pct": float(100 * np.mean(np.abs(predicted_R / measured_R - 1))),
        "r2": float(1 - ((measured_R - predicted_R) ** 2).sum() / spread) if spread > 0 else None,
        "n": len(measured_R),
    }


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
