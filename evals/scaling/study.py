"""Every fit of a records file as one JSON document: families by targets, optima, frontier, errors and warnings."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from nmm_serve import __version__
from nmm_serve.errors import DataError
from nmm_serve.evals.scaling.fit import FEWEST, LawFit, describe_law, family_cost, fit_law, identification
from nmm_serve.evals.scaling.frontier import frontier, law_exponent, size_curves
from nmm_serve.evals.scaling.held_out import errors, held_out_error, largest_size_error
from nmm_serve.evals.scaling.law import SAME_BUDGET, Cost, regressed_exponents
from nmm_serve.evals.scaling.optimise import Array
from nmm_serve.evals.scaling.records import MEAN, Records, SweepRecord, all_params, as_runs, targets
from nmm_serve.evals.scaling.resample import resampled_interval
from nmm_serve.evals.scaling.space import Runs
from nmm_serve.evals.scaling.sparsity import fit_sparsity

FORMAT = "nmm-serve/scaling-fits/1"
BOOTSTRAPS = 200
DEFINITIONS = {
    "law": "L = E + A/N^alpha + B/D^beta; L in nats a token, N active parameters, D tokens of all kinds",
    "fit": "least sum of Huber losses (delta 1e-3) of ln L, L-BFGS from 1764 starts, the lowest kept",
    "a, b, d": "closed form: N* ~ C^a, D* ~ C^b, D* ~ N*^d with a = beta/(alpha+beta), b = alpha/(alpha+beta), d = b/a",
    "c": "L ~ K C^c: log-log line through the convex hull of per-size interpolated loss curves",
    "intervals": "95 %: bootstrap over runs, percentiles, widened to the profile of the objective where that is wider; "
    "of c and of sparsity_aware the percentiles alone",
    "mae_pct, r2": "held-out: each run predicted by a fit that did not see it (10-fold cross-validation over runs)",
    "largest_size": "the largest size predicted by a law of the smaller ones",
    "regressed": "for each run's C the best N over a grid of D under the law, then log-log lines",
    "optima": "compute-optimal size, tokens and loss of the law at C FLOPs",
}

_NO_LAW = "no power law holds these runs: "
_LOOK = (
    ". Look for a size or a budget whose losses stand apart from the others', as those of a run that diverged, and fit "
    "without it"
)

Progress = Callable[[str, int, int], None]
"""Called before each fit: what is fitted, how many are done, how many there are."""


def fit_records(
    records: Records, *, bootstraps: int = BOOTSTRAPS, seed: int = 0, progress: Progress = lambda what, done, of: None
) -> dict[str, Any]:
    """Fit each family and target; one that no law holds is null with the reason. Raises DataError where all are."""
    work = [(family, target) for family in records.families() for target in targets(records.of(family))]
    fits = []
    for done, (family, target) in enumerate(work):
        progress(f"{family}, {target}", done, len(work))
        fits.append(fit_target(records.of(family), family, target, bootstraps=bootstraps, seed=seed))
    mixtures = records.mixtures()
    mixed = [f"one law for {len(mixtures)} mixtures of data: {', '.join(mixtures)}"] if len(mixtures) > 1 else []
    if all(fit["E"] is None for fit in fits):
        raise DataError(f"no family can be fitted: {fits[0]['family']}: {fits[0]['warnings'][0]}")
    return {
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "fits": fits,
        "warnings": records.warnings + mixed,
        "records": len(records.runs),
        "bootstraps": bootstraps,
        "seed": seed,
        "definitions": DEFINITIONS,
        "versions": {"nmm-serve": __version__, "numpy": np.__version__},
    }


@np.errstate(over="ignore", invalid="ignore", divide="ignore")  # what is not finite is looked for, and named
def fit_target(
    records: Sequence[SweepRecord], family: str, target: str, *, bootstraps: int, seed: int
) -> dict[str, Any]:
    """One entry of `fits`."""
    runs = as_runs(records, target)
    head = {"family": family, "target": target}

    def nothing(reason: str) -> dict[str, Any]:
        empty = dict.fromkeys(("E", "A", "alpha", "B", "beta", "a", "b", "c", "d", "mae_pct", "r2"))
        return {**head, **empty, "intervals": {}, "n": len(runs), "warnings": [reason]}

    short = _too_little(runs)
    if short:
        return nothing(short)
    try:
        fitted = fit_law(runs, bootstraps=bootstraps, seed=seed)
    except DataError as error:
        return nothing(str(error))
    beyond = _beyond_numbers(fitted)
    if beyond:
        return nothing(beyond)
    law, warnings = fitted.law, identification(fitted)
    sizes, ambiguous = all_params(records)
    if ambiguous:
        warnings.append(ambiguous)
    cost, off = family_cost(runs.n_R, runs.d_R, runs.flops_R)
    if off > 0.02:
        warnings.append(f"FLOPs are not a function of size and tokens alone: C = 6 f N^m D misses some by {off:.0%}")
    if cost.exponent != 1 or cost.factor != 1:
        warnings.append(
            f"C is not 6ND here but 6 * {cost.factor:.4g} * N^{cost.exponent:.4f} * D; optima follow the records' own "
            "FLOPs, a, b and d the closed form for 6ND"
        )
    positive = law.alpha > 0 and law.beta > 0
    if not positive:
        warnings.append(
            "an exponent is not positive: the loss does not fall with it, so there is no optimal split (a, b, d)"
        )
    edge, edge_interval = _frontier(fitted, cost, bootstraps, seed, warnings, positive)
    described = dict(describe_law(law))
    intervals = {name: list(bounds) for name, bounds in fitted.intervals.items()}
    if not positive:
        for name in ("a", "b", "d"):
            described[name] = None
            del intervals[name]
    if edge_interval is not None:
        intervals["c"] = edge_interval
    held_out, largest = held_out_error(fitted, seed=seed), largest_size_error(fitted)
    if held_out["mae_pct"] is None:
        warnings.append("no held-out error: without some of the runs too few are left, or no law holds the others")
    if largest is not None and largest["mae_pct"] is None:
        warnings.append("no error of the largest size: no law holds the smaller ones")
    fit = {
        **head,
        **described,
        "c": edge["c"],
        "intervals": intervals,
        "mae_pct": held_out["mae_pct"],
        "r2": held_out["r2"],
        "n": len(runs),
        "warnings": warnings,
        "frontier": edge,
        "regressed": regressed_exponents(law, runs.flops_R, (runs.d_R.min() / 10, runs.d_R.max() * 10), cost)
        if positive
        else {},
        "optima": optima(fitted, cost) if positive else [],
        "cost": {"factor": cost.factor, "exponent": cost.exponent},
        "all_params": sizes,
        "in_sample": errors(runs.loss_R, law.loss(runs.n_R, runs.d_R)),
        "largest_size": largest,
        "objective": fitted.objective,
        "resamples_redrawn": fitted.redrawn,
        "range": {
            "n_params": [float(runs.n_R.min()), float(runs.n_R.max())],
            "tokens": [float(runs.d_R.min()), float(runs.d_R.max())],
            "flops": [float(runs.flops_R.min()), float(runs.flops_R.max())],
        },
        "resampled": resampled_laws(fitted),
    }
    endless = _not_finite(fit)
    if endless:
        return nothing(f"{_NO_LAW}{endless} is no finite number under the best one{_LOOK}")
    if "moe" in family or "sparse" in family:
        fit["sparsity_aware"] = fit_sparsity(fitted, records, bootstraps=bootstraps, seed=seed)
    return fit


def _too_little(runs: Runs) -> str | None:
    sizes, budgets = len(np.unique(runs.n_R)), len(np.unique(runs.d_R))
    if len(runs) < FEWEST:
        return f"{len(runs)} runs are too few for five parameters; {FEWEST} are the least"
    if sizes < 2 or budgets < 2:
        return f"{sizes} model sizes and {budgets} token budgets: a law needs at least two of each, better five"
    if (runs.loss_R == runs.loss_R[0]).all():
        return (
            f"{_NO_LAW}every one has the loss {runs.loss_R[0]:g}. Look for a loss that was copied, or measured with "
            "the weights of one run"
        )
    return None


def _beyond_numbers(fitted: LawFit) -> str | None:
    """The reason where A or B is too large or too small for a number."""
    law, logs = fitted.law, fitted.space.quantities()
    for exponent, value, scale in (("alpha", law.alpha, "A"), ("beta", law.beta, "B")):
        if not 0 < getattr(law, scale) < math.inf:
            power = float(logs[scale](fitted.theta_P[None])[0])
            return (
                f"{_NO_LAW}the best one has {exponent} = {value:.3g} and {scale} = exp({power:.0f}), which no number "
                f"holds{_LOOK}"
            )
    return None


def _not_finite(value: Any, name: str = "") -> str | None:
    """Where in a document the first number that is not finite stands."""
    if isinstance(value, Mapping):
        inner: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list):
        inner = ((f"[{i}]", item) for i, item in enumerate(value))
    else:
        return name if isinstance(value, float) and not math.isfinite(value) else None
    return next((found for key, item in inner if (found := _not_finite(item, f"{name} {key}".strip()))), None)


def _frontier(
    fitted: LawFit, cost: Cost, bootstraps: int, seed: int, warnings: list[str], positive: bool
) -> tuple[dict[str, Any], list[float] | None]:
    """Measured frontier with an interval: runs redrawn as the law's own plus its residuals, since a resample with
    runs missing has other curves."""
    runs = fitted.runs
    measured = frontier(runs)
    if measured is None:
        own = law_exponent(fitted.law, runs.flops_R.min(), runs.flops_R.max(), cost) if positive else None
        few = len(size_curves(runs)) < 2
        why = "no two sizes have loss curves to draw a frontier from" if few else "the least compute has the least loss"
        taken = "null" if own is None else "that of the law's own optimum"
        if np.log(runs.flops_R.max() / runs.flops_R.min()) <= SAME_BUDGET:
            why = f"every run has the same compute, about {runs.flops_R.mean():.3g} FLOPs (train other budgets, too)"
        warnings.append(f"{why}: c is {taken}")
        return {"c": own, "K": None, "from": None, "to": None, "source": "law"}, None
    rng = np.random.default_rng(seed)
    predicted_R = fitted.law.loss(runs.n_R, runs.d_R)
    residual_R = np.log(runs.loss_R / predicted_R) * np.sqrt(len(runs) / max(1, len(runs) - 5))
    drawn = []
    for _ in range(bootstraps):
        loss_R = predicted_R * np.exp(rng.choice(residual_R, len(runs)))
        again = frontier(type(runs)(runs.n_R, runs.d_R, loss_R, runs.flops_R))
        if again is not None:
            drawn.append(again.c)
    if len(drawn) < bootstraps:
        left = bootstraps - len(drawn)
        warnings.append(f"c: {left} of {bootstraps} resamples have no frontier and are left out of its interval")
    law_c = law_exponent(fitted.law, measured.low, measured.high, cost) if positive else None
    edge = {
        "c": measured.c,
        "K": measured.K,
        "from": measured.low,
        "to": measured.high,
        "source": "hull",
        "law_c": law_c,
    }
    if not drawn:
        return edge, None
    low, high = resampled_interval(np.array(drawn))
    return edge, [min(low, measured.c), max(high, measured.c)]


def optima(fitted: LawFit, cost: Cost, budgets: int = 5) -> list[dict[str, Any]]:
    """Optimal size and tokens at budgets over the runs' range, with intervals of the size."""
    rows = []
    for flops in np.geomspace(fitted.runs.flops_R.min(), fitted.runs.flops_R.max(), budgets):
        n, d = fitted.law.optimum(flops, cost)
        low, high = np.exp(np.clip(fitted.interval(f"N*({flops:.0e})", fitted.space.optimal_size(flops, cost)), 0, 700))
        rows.append({
            "flops": float(flops), "n_params": float(n), "tokens": float(d), "loss": float(fitted.law.loss(n, d)),
            "tokens_per_param": float(d / n),
            "intervals": {
                "n_params": [float(low), float(high)],
                "tokens": [float(cost.tokens(flops, high)), float(cost.tokens(flops, low))],
            },
        })  # fmt: skip
    return rows


def resampled_laws(fitted: LawFit) -> dict[str, list[float]]:
    """The bootstrap's laws, for intervals of anything that `plan` derives. ln A and ln B: A and B may overflow."""
    t: Array = fitted.resampled_SP
    columns = {
        "log_A": t[:, 0] + t[:, 1] * fitted.space.log_n, "alpha": t[:, 1],
        "log_B": t[:, 2] + t[:, 3] * fitted.space.log_d, "beta": t[:, 3], "log_E": t[:, 4],
    }  # fmt: skip
    return {name: [float(f"{v:.7g}") for v in column] for name, column in columns.items()}


def headline(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The fits of the mean loss, one a family."""
    return [fit for fit in document["fits"] if fit["target"] == MEAN and fit["E"] is not None]


def with_runs(document: dict[str, Any], records: Records) -> dict[str, Any]:
    """The document and the runs it was fitted to, which the plots draw."""
    rows = [
        {
            "family": r.family, "n_params": r.n_params, "tokens": r.tokens, "flops": r.flops, "loss": r.losses[MEAN]
        }
        for r in records.runs
    ]  # fmt: skip
    return {**document, "runs": rows}
