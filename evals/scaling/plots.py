"""Plots of fits: loss against compute, isoFLOP curves, optimal size and tokens, and differences between families."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nmm_serve.errors import DataError
from nmm_serve.evals.plots import Drawing, colour, drawing
from nmm_serve.evals.scaling.frontier import frontier, size_curves
from nmm_serve.evals.scaling.law import Cost, Law, log_optimal_size
from nmm_serve.evals.scaling.optimise import Array
from nmm_serve.evals.scaling.plan import load_coefficients
from nmm_serve.evals.scaling.resample import FEWEST_RESAMPLES
from nmm_serve.evals.scaling.space import Runs
from nmm_serve.evals.scaling.study import headline

_POINTS = 120
_COMPARED = (("early", "late"), ("moe", "early"), ("late-moe", "late"))


def runs_of(document: dict[str, Any], family: str) -> Runs:
    """The mean-loss runs of a family, from a document that `nmm-train fit -o` wrote."""
    rows = [(r["n_params"], r["tokens"], r["loss"], r["flops"]) for r in document["runs"] if r["family"] == family]
    return Runs(*np.array(rows, float).reshape(-1, 4).T)


def law_of(fit: dict[str, Any]) -> tuple[Law, Cost]:
    return Law(**{name: fit[name] for name in ("E", "A", "alpha", "B", "beta")}), Cost(**fit["cost"])


def loss_against_compute(document: dict[str, Any]) -> Drawing:
    """Each size's curve, the convex hull of all, and the line L = K C^c through it."""
    fits = headline(document)
    with drawing("scaling-loss", 4.6 * len(fits), 3.6, columns=len(fits)) as (drawn, panels):
        for axes, fit in zip(panels, fits, strict=True):
            runs = runs_of(document, fit["family"])
            curves = size_curves(runs)
            for index, (size, (x, y)) in enumerate(curves.items()):
                axes.plot(np.exp(x), np.exp(y), "o-", ms=3, lw=1, color=_shade(index, len(curves)), label=_size(size))
            edge = frontier(runs)
            if edge is not None:
                c = np.exp(edge.log_c_X)
                axes.plot(c, np.exp(edge.log_loss_X), color="#111", lw=1.6)
                axes.plot(c, edge.K * c**edge.c, color="#D55E00", lw=1.4, ls="--", label=f"{edge.K:.3g} C^{edge.c:.3f}")
            _logarithmic(axes.xaxis)
            axes.set_title(fit["family"], fontsize=10)
            axes.set_xlabel("training FLOPs")
            axes.legend(fontsize=7.5)
        panels[0].set_ylabel("validation loss, nats a token")
    return drawn


def isoflop(document: dict[str, Any], budgets: int = 4) -> Drawing:
    """Loss against size at equal compute: measured curves interpolated (points), and the law (lines)."""
    fits = headline(document)
    with drawing("scaling-isoflop", 4.6 * len(fits), 3.6, columns=len(fits)) as (drawn, panels):
        for axes, fit in zip(panels, fits, strict=True):
            runs = runs_of(document, fit["family"])
            law, cost = law_of(fit)
            inner = np.geomspace(runs.flops_R.min(), runs.flops_R.max(), budgets + 2)[1:-1]
            sizes = np.geomspace(runs.n_R.min() / 1.5, runs.n_R.max() * 1.5, _POINTS)
            for index, flops in enumerate(inner):
                shade = _shade(index, budgets)
                measured = [
                    (size, np.exp(np.interp(np.log(flops), x, y)))
                    for size, (x, y) in size_curves(runs).items()
                    if x[0] <= np.log(flops) <= x[-1]
                ]
                if measured:
                    axes.plot(*zip(*measured, strict=True), "o", ms=4, color=shade)
                axes.plot(sizes, law.loss(sizes, cost.tokens(flops, sizes)), color=shade, label=f"{flops:.1e} FLOPs")
            _logarithmic(axes.xaxis)
            axes.set_ylim(0.97 * runs.loss_R.min(), 1.05 * runs.loss_R.max())
            axes.set_title(fit["family"], fontsize=10)
            axes.set_xlabel("active parameters")
            axes.legend(fontsize=7.5)
        panels[0].set_ylabel("loss, nats a token")
    return drawn


def optima(document: dict[str, Any]) -> Drawing | None:
    """Compute-optimal parameters and tokens against compute, with 95 % bands. None where no family has an optimum."""
    fits = [(index, fit) for index, fit in enumerate(headline(document)) if fit["optima"]]
    if not fits:
        return None
    with drawing("scaling-optima", 9.2, 3.6, columns=2) as (drawn, panels):
        for index, fit in fits:
            rows = fit["optima"]
            flops = [row["flops"] for row in rows]
            for axes, key in zip(panels, ("n_params", "tokens"), strict=True):
                axes.plot(flops, [row[key] for row in rows], color=colour(index), label=fit["family"])
                low, high = zip(*(row["intervals"][key] for row in rows), strict=True)
                axes.fill_between(flops, low, high, color=colour(index), alpha=0.15, lw=0)
        for axes, title in zip(panels, ("optimal active parameters", "optimal tokens"), strict=True):
            _logarithmic(axes.xaxis)
            _logarithmic(axes.yaxis)
            axes.set_title(title, fontsize=10)
            axes.set_xlabel("training FLOPs")
        # a size that is not identified has a band over everything; the lines still want to be seen
        for axes, key in zip(panels, ("n_params", "tokens"), strict=True):
            values = [row[key] for _, fit in fits for row in fit["optima"]]
            axes.set_ylim(min(values) / 30, max(values) * 30)
        panels[0].legend(fontsize=8)
    return drawn


def differences(document: dict[str, Any]) -> Drawing | None:
    """Early minus late and MoE minus dense at the optimum, with 95 % bands. None without such pairs or budgets."""
    pairs, _ = _pairs(document)
    if not pairs:
        return None
    with drawing("scaling-differences", 4.6 * len(pairs), 3.4, columns=len(pairs)) as (drawn, panels):
        for axes, (one, other, low, high) in zip(panels, pairs, strict=True):
            flops = np.geomspace(low, high, _POINTS)
            a, b = law_of(one), law_of(other)
            axes.plot(flops, a[0].best_loss(flops, a[1]) - b[0].best_loss(flops, b[1]), color="#0072B2")
            drawn_SX = _resampled_losses(one, flops) - _resampled_losses(other, flops)
            drawn_SX = drawn_SX[np.isfinite(drawn_SX).all(1)]
            if len(drawn_SX) < FEWEST_RESAMPLES:
                text = f"no band: {len(drawn_SX)} resamples with an optimum"
                axes.annotate(text, (0.03, 0.03), xycoords="axes fraction", fontsize=8)
            else:
                lower, upper = np.quantile(drawn_SX, [0.025, 0.975], axis=0)
                axes.fill_between(flops, lower, upper, color="#0072B2", alpha=0.15, lw=0)
            axes.axhline(0, color="#555", lw=0.8)
            _logarithmic(axes.xaxis)
            axes.set_title(f"{one['family']} minus {other['family']}", fontsize=10)
            axes.set_xlabel("training FLOPs")
        panels[0].set_ylabel("difference in optimal loss, nats")
    return drawn


def _pairs(document: dict[str, Any]) -> tuple[list[tuple[dict[str, Any], dict[str, Any], float, float]], list[str]]:
    """Pairs of fits to compare and the FLOPs from and to which both have runs, and why other pairs are left out."""
    fits = {fit["family"]: fit for fit in headline(document) if fit["optima"]}
    found, apart = [], []
    for one, other in _COMPARED:
        if one in fits and other in fits:
            ranges = [fits[name]["range"]["flops"] for name in (one, other)]
            low, high = max(r[0] for r in ranges), min(r[1] for r in ranges)
            if low < high:
                found.append((fits[one], fits[other], low, high))
            else:
                spans = " and ".join(f"{r[0]:.2g} to {r[1]:.2g}" for r in ranges)
                apart.append(f"{one} minus {other}, whose runs have no budgets in common ({spans} FLOPs)")
    return found, apart


def left_out(document: dict[str, Any]) -> dict[str, str]:
    """What the plots leave out and why, by the plot's file stem."""
    without = [fit["family"] for fit in headline(document) if not fit["optima"]]
    _, apart = _pairs(document)
    reasons = {
        "optima": [f"{', '.join(without)}, whose loss does not fall with both size and tokens"] if without else []
    }
    reasons["differences"] = apart
    return {stem: "; ".join(found) for stem, found in reasons.items() if found}


@np.errstate(over="ignore", invalid="ignore", divide="ignore")
def _resampled_losses(fit: dict[str, Any], flops: Array) -> Array:
    """Optimal loss of each resample at each budget; not finite where a resample has no optimum."""
    _, cost = law_of(fit)
    columns = {name: np.array(values)[:, None] for name, values in fit["resampled"].items()}
    falls_S1 = (columns["alpha"] > 0) & (columns["beta"] > 0)
    columns = {name: np.where(falls_S1, column, np.nan) for name, column in columns.items()}
    log_n = log_optimal_size(
        columns["log_A"], columns["alpha"], columns["log_B"], columns["beta"], np.log(flops)[None], cost
    )
    log_d = np.log(flops / (6 * cost.factor))[None] - cost.exponent * log_n
    terms = (columns["log_A"] - columns["alpha"] * log_n, columns["log_B"] - columns["beta"] * log_d)
    loss_SX: Array = np.exp(columns["log_E"]) + sum(np.exp(term) for term in terms)
    return loss_SX


PLOTS: Sequence[tuple[str, str, str, Callable[[dict[str, Any]], Drawing | None]]] = (
    (
        "loss", "Loss against compute", "Black: convex hull of the sizes' curves. Dashed: its log-log line.",
        loss_against_compute,
    ),
    ("isoflop", "Loss against size at equal compute", "Points: measured curves interpolated. Lines: the law.", isoflop),
    ("optima", "Optimal size and tokens", "Under the fitted law. Bands: 95 %.", optima),
    ("differences", "Families at equal compute", "Optimal loss under each law. Bands: 95 %, resamples.", differences),
)  # fmt: skip
"""File stem, title, note and function of each plot."""


def report_plots(path: Path) -> list[dict[str, str]]:
    """Title, note and SVG of each plot of a fits file, for the HTML report. Raises DataError without the runs in it."""
    document = load_coefficients(path)
    if "runs" not in document:
        raise DataError(
            f"{path} does not hold the runs behind its fits; write it with `nmm-train fit RECORDS -o {path}`"
        )
    missing, found = left_out(document), []
    for stem, title, note, draw in PLOTS:
        drawn = draw(document)
        if drawn or stem in missing:
            told = f"{note} Left out: {missing[stem]}." if stem in missing else note
            found.append({"title": f"Scaling: {title}", "note": told, "svg": drawn.svg if drawn else ""})
    return found


def _logarithmic(axis: Any) -> None:
    """A log axis whose labels are plain text, like all text here: 1e+18, at most five of them."""
    from matplotlib.ticker import LogLocator, NullLocator

    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    axis.set_major_locator(LogLocator(numticks=5))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, position: f"{value:.0e}".replace("e+0", "e").replace("e+", "e"))


def _size(size: float) -> str:
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size >= unit:
            return f"{size / unit:.3g}{letter}"
    return f"{size:.3g}"


def _shade(index: int, count: int) -> tuple[float, float, float]:
    """From light to dark blue: small to large."""
    share = index / max(1, count - 1)
    return 0.62 * (1 - share), 0.78 - 0.48 * share, 0.92 - 0.3 * share
