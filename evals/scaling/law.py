"""The law L = E + A/N^alpha + B/D^beta (arXiv 2504.07951, equation 1) and what is optimal under it."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

SAME_BUDGET = 0.05
"""In ln C: budgets as near as this are one."""


@dataclass(frozen=True)
class Cost:
    """Training FLOPs C = 6 * factor * N^exponent * D of a family.

    The paper's conventions: 6ND for early fusion and MoE (N active). For late fusion C = 6(N_v D_v + N D): against the
    whole model's 6ND it is less, since text tokens skip the encoder, and the share depends on size.
    """

    factor: float = 1.0
    exponent: float = 1.0

    def tokens(self, flops: Array | float, n_params: Array | float) -> Array:
        return np.asarray(flops / (6 * self.factor * np.asarray(n_params, float) ** self.exponent))

    def flops(self, n_params: Array | float, tokens: Array | float) -> Array:
        return np.asarray(6 * self.factor * np.asarray(n_params, float) ** self.exponent * tokens)


@dataclass(frozen=True)
class Law:
    """L = E + A/N^alpha + B/D^beta; L in nats a token, N in parameters, D in tokens."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def loss(self, n_params: Array | float, tokens: Array | float) -> Array:
        n, d = np.asarray(n_params, float), np.asarray(tokens, float)
        return np.asarray(self.E + self.A * n**-self.alpha + self.B * d**-self.beta)

    @property
    def a(self) -> float:
        """N* ~ C^a."""
        return self.beta / (self.alpha + self.beta)

    @property
    def b(self) -> float:
        """D* ~ C^b."""
        return self.alpha / (self.alpha + self.beta)

    @property
    def d(self) -> float:
        """D* ~ N*^d."""
        return self.alpha / self.beta

    def optimum(self, flops: Array | float, cost: Cost) -> tuple[Array, Array]:
        """Compute-optimal parameters and tokens, in closed form."""
        log_n = log_optimal_size(
            np.log(self.A), self.alpha, np.log(self.B), self.beta, np.log(np.asarray(flops, float)), cost
        )
        n_params = np.exp(log_n)
        return n_params, cost.tokens(flops, n_params)

    def best_loss(self, flops: Array | float, cost: Cost) -> Array:
        return self.loss(*self.optimum(flops, cost))

    def compute_for(self, loss: float, cost: Cost) -> float:
        """FLOPs at which the compute-optimal loss is `loss`; infinite at or under E."""
        if loss <= self.E:
            return float("inf")
        low, high = 0.0, 80 * np.log(10)
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if self.best_loss(np.exp(middle), cost) > loss else (low, middle)
        return float(np.exp(high))


def log_optimal_size(
    log_A: Array | float,
    alpha: Array | float,
    log_B: Array | float,
    beta: Array | float,
    log_flops: Array | float,
    cost: Cost,
) -> Array:
    """ln N* under C = 6 f N^m D, where the derivative of A/N^alpha + B/D(N)^beta is zero. Arguments broadcast."""
    m = cost.exponent
    budget = log_flops - np.log(6 * cost.factor)
    ratio = np.log(alpha) + log_A - np.log(beta * m) - log_B
    return np.asarray((ratio + beta * budget) / (alpha + beta * m))


def regressed_exponents(law: Law, flops: Array, tokens_range: tuple[float, float], cost: Cost) -> dict[str, float]:
    """a, b and d as the paper regresses them: for each run's C the best N over a grid of D, then log-log lines. Empty
    where the runs are of one C."""
    tokens_D = np.geomspace(*tokens_range, 2000)
    best_n, best_d = [], []
    for budget in np.unique(flops):
        n_D = (budget / (6 * cost.factor * tokens_D)) ** (1 / cost.exponent)
        best = int(np.argmin(law.loss(n_D, tokens_D)))
        if 0 < best < len(tokens_D) - 1:  # at the edge the grid, not the law, chose
            best_n.append(n_D[best])
            best_d.append(tokens_D[best])
    if len(best_n) < 2:
        return {}
    used = np.log([float(cost.flops(n, d)) for n, d in zip(best_n, best_d, strict=True)])
    if np.ptp(used) <= SAME_BUDGET:
        return {}
    log_n, log_d = np.log(best_n), np.log(best_d)
    return {
        "a": _slope(used, log_n),
        "b": _slope(used, log_d),
        "d": _slope(log_n, log_d),
        "n_over_d": _slope(used, log_n - log_d),
        "runs": len(best_n),
    }


def _slope(x: Array, y: Array) -> float:
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / (x * x).sum())
