"""Do the intervals of a fit hold the law that runs were drawn from? `python -P -m nmm_serve.evals.scaling.coverage`.

Grids that hold the law well, and badly: an interval that is right only where data are plenty misleads where it counts.
"""

import argparse
from collections.abc import Callable

import numpy as np

from nmm_serve.evals.scaling.fit import fit_law
from nmm_serve.evals.scaling.law import Cost, Law
from nmm_serve.evals.scaling.space import Runs

LAW = Law(E=1.904, A=260.0, alpha=0.3005, B=1900.0, beta=0.3349)
"""Near the paper's early fusion."""
NAMES = ("E", "A", "alpha", "B", "beta", "a")
AT = 1e21
"""FLOPs at which the optimal size is asked for."""


def drawn(n_R: np.ndarray, d_R: np.ndarray, noise: float, seed: int) -> Runs:
    loss_R = LAW.loss(n_R, d_R) * np.exp(noise * np.random.default_rng(seed).standard_normal(len(n_R)))
    return Runs(n_R, d_R, loss_R, 6 * n_R * d_R)


def _grid(sizes: np.ndarray, budgets: np.ndarray, noise: float) -> Callable[[int], Runs]:
    n_R, d_R = (v.ravel() for v in np.meshgrid(sizes, budgets))
    return lambda seed: drawn(n_R, d_R, noise, seed)


def _isoflop(noise: float) -> Callable[[int], Runs]:
    """Five budgets, six sizes about the best of each: Chinchilla's design."""
    flops_R = np.repeat(np.geomspace(1e18, 1e21, 5), 6)
    n_R = np.sqrt(flops_R / 120) * np.tile(np.geomspace(0.2, 5, 6), 5)
    return lambda seed: drawn(n_R, flops_R / 6 / n_R, noise, seed)


DESIGNS: dict[str, Callable[[int], Runs]] = {
    "wide: 5 sizes over 3 decades, 6 budgets, 1 % noise": _grid(
        np.geomspace(1e7, 1e10, 5), np.geomspace(1e9, 1e12, 6), 0.01
    ),
    # a factor of 12 between sizes: at 2 % noise that hardly holds alpha, and the intervals must know it
    "paper: 6 sizes 275M to 3.35B, 6 budgets, 2 % noise": _grid(
        np.geomspace(2.75e8, 3.35e9, 6), np.geomspace(2.5e9, 6e11, 6), 0.02
    ),
    "isoflop: 5 budgets, 6 sizes each, 0.5 % noise": _isoflop(0.005),
}


def coverage(draw: Callable[[int], Runs], draws: int, bootstraps: int) -> dict[str, float]:
    """Share of draws whose interval holds the truth, for each parameter and the optimal size N* at AT FLOPs."""
    held = dict.fromkeys((*NAMES, "N*"), 0)
    true_size = np.log(LAW.optimum(AT, Cost())[0])
    for seed in range(draws):
        fitted = fit_law(draw(seed), bootstraps=bootstraps, seed=seed)
        for name in NAMES:
            low, high = fitted.intervals[name]
            held[name] += low <= getattr(LAW, name) <= high
        low, high = fitted.interval("N*", fitted.space.optimal_size(AT, Cost()))
        held["N*"] += bool(low <= true_size <= high)
    return {name: count / draws for name, count in held.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Coverage of the 95 %% intervals on draws from a known law.")
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--bootstraps", type=int, default=100)
    options = parser.parse_args()
    for name, draw in DESIGNS.items():
        found = coverage(draw, options.draws, options.bootstraps)
        print(f"{name}: " + ", ".join(f"{key} {100 * share:.1f} %" for key, share in found.items()), flush=True)


if __name__ == "__main__":
    main()
