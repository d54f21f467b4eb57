"""Runs, and the coordinates in which a law is fitted to them. Shape suffixes as in `optimise.py`."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

from nmm_serve.evals.scaling.law import Cost, Law, log_optimal_size
from nmm_serve.evals.scaling.optimise import Array, Design

GRID = {
    "a": range(0, 31, 5),
    "alpha": (0, 0.5, 2.5),
    "b": range(0, 31, 5),
    "beta": (0, 0.5, 2.5),
    "e": (-1, -0.5, 0.5, 1),
}
"""The paper's starts: a = ln A, b = ln B, e = ln E. 1764 of them."""
PARAMETERS = 5

_NO_FLOOR = float(np.log(1e-3))
"""An E under a thousandth of the least loss is none; it stays there, where it can still be seen to matter."""

_TINY = 1e-3

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


def _split(alpha: Array, beta: Array) -> Array:
    alpha, beta = np.maximum(alpha, _TINY), np.maximum(beta, _TINY)
    return np.asarray(beta / (alpha + beta))
