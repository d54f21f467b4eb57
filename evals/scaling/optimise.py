"""The paper's fit, many at once: Huber loss on log-sum-exp predictions of log loss, L-BFGS over a grid of starts.

A form is a log-sum-exp of terms that are linear in the parameters:

    ln L_R = log sum_K exp(sum_P basis_KRP * theta_P)

for example ln A - alpha ln N, ln B - beta ln D and ln E for L = E + A/N^alpha + B/D^beta (Hoffmann et al. 2022,
section 3.3). Legend: S problems (starts or resamples) solved side by side, R records, K terms, P parameters.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

DELTA = 1e-3
"""Huber's delta, on log loss."""
_FAR = 60.0
"""Terms are held to exp(+-60): a line search may look far away, and nothing that far is a loss."""


@dataclass(frozen=True)
class Design:
    """What the fits of one data set share: the terms' basis and the measured log losses."""

    basis_KRP: Array
    y_R: Array
    floor_P: Array | None = None
    """Parameters end here: a term that has vanished has no slope left, and would never come back."""

    def clipped(self, theta_SP: Array) -> Array:
        return theta_SP if self.floor_P is None else np.maximum(theta_SP, self.floor_P)

    def rows(self, keep_R: npt.NDArray[np.bool_] | npt.NDArray[np.int64]) -> "Design":
        return Design(self.basis_KRP[:, keep_R], self.y_R[keep_R], self.floor_P)

    def terms(self, theta_SP: Array) -> Array:
        K, R, P = self.basis_KRP.shape
        flat_SX = theta_SP @ self.basis_KRP.reshape(K * R, P).T
        return np.minimum(np.maximum(flat_SX, -_FAR), _FAR).reshape(-1, K, R)

    def predict(self, theta_SP: Array) -> Array:
        """ln L of each problem and record."""
        log_L_SR: Array = np.log(np.exp(self.terms(theta_SP)).sum(1))
        return log_L_SR

    def residuals(self, theta_SP: Array) -> tuple[Array, Array]:
        """r_SR = predicted - measured log loss, and the terms' shares in the prediction, share_SKR."""
        exp_SKR = np.exp(self.terms(theta_SP))
        sum_SR = exp_SKR.sum(1)
        return np.log(sum_SR) - self.y_R, exp_SKR / sum_SR[:, None]

    def jacobian(self, share_SKR: Array) -> Array:
        """d ln L / d theta, shape SRP."""
        return sum(share_SKR[:, k, :, None] * basis_RP for k, basis_RP in enumerate(self.basis_KRP))


def huber(r: Array) -> Array:
    """Huber's loss with DELTA: quadratic inside, linear outside."""
    size = np.abs(r)
    return np.where(size <= DELTA, 0.5 * r * r, DELTA * (size - 0.5 * DELTA))


def objective(design: Design, theta_SP: Array, weight_SR: Array | None = None) -> Array:
    """Weighted sum of Huber losses of each problem."""
    loss_SR = huber(design.predict(theta_SP) - design.y_R)
    total_S: Array = (loss_SR if weight_SR is None else loss_SR * weight_SR).sum(1)
    return total_S


def _value_and_gradient(design: Design, theta_SP: Array) -> tuple[Array, Array]:
    r_SR, share_SKR = design.residuals(theta_SP)
    slope_SKR = share_SKR * np.minimum(np.maximum(r_SR, -DELTA), DELTA)[:, None]
    grad_SP = slope_SKR.reshape(len(theta_SP), -1) @ design.basis_KRP.reshape(-1, theta_SP.shape[1])
    return huber(r_SR).sum(1), grad_SP


def lbfgs(design: Design, start_SP: Array, iterations: int = 40, memory: int = 6) -> tuple[Array, Array]:
    """Batched L-BFGS with backtracking (Nocedal and Wright, algorithms 7.4 and 3.1): theta_SP and its values."""
    theta_SP = start_SP.copy()
    value_S, grad_SP = _value_and_gradient(design, theta_SP)
    steps: list[tuple[Array, Array, Array]] = []
    for _ in range(iterations):
        direction_SP = -_two_loops(grad_SP, steps)
        descent_S = (direction_SP * grad_SP).sum(1)
        uphill_S = descent_S >= 0
        direction_SP[uphill_S] = -grad_SP[uphill_S]
        descent_S = (direction_SP * grad_SP).sum(1)
        length_S = np.minimum(1.0, 2.0 / np.maximum(np.abs(direction_SP).max(1), 1e-30))
        new_SP, new_value_S = theta_SP.copy(), value_S.copy()
        open_S = descent_S < 0
        for _ in range(12):
            index = np.flatnonzero(open_S)
            if not len(index):
                break
            trial_SP = design.clipped(theta_SP[index] + length_S[index, None] * direction_SP[index])
            trial_S = objective(design, trial_SP)
            good = trial_S <= value_S[index] + 1e-4 * length_S[index] * descent_S[index]
            new_SP[index[good]], new_value_S[index[good]] = trial_SP[good], trial_S[good]
            open_S[index[good]] = False
            length_S[index[~good]] *= 0.4
        _, new_grad_SP = _value_and_gradient(design, new_SP)
        steps.append(_curvature_pair(new_SP - theta_SP, new_grad_SP - grad_SP))
        steps = steps[-memory:]
        gain = value_S - new_value_S
        theta_SP, value_S, grad_SP = new_SP, new_value_S, new_grad_SP
        if (gain <= 1e-9 * value_S).all():
            break
    return theta_SP, value_S


def _curvature_pair(s_SP: Array, y_SP: Array) -> tuple[Array, Array, Array]:
    """A step, its change of gradient, and 1 / (s . y); 0 where the pair has no positive curvature and is skipped."""
    sy_S = (s_SP * y_SP).sum(1)
    usable = sy_S > 1e-12 * (y_SP * y_SP).sum(1)
    return s_SP, y_SP, np.where(usable, 1.0 / np.where(usable, sy_S, 1.0), 0.0)


def _two_loops(grad_SP: Array, steps: list[tuple[Array, Array, Array]]) -> Array:
    q_SP, alphas = grad_SP.copy(), []
    for s_SP, y_SP, rho_S in reversed(steps):
        alphas.append(rho_S * (s_SP * q_SP).sum(1))
        q_SP -= alphas[-1][:, None] * y_SP
    scale_S = np.full(len(grad_SP), np.nan)
    for s_SP, y_SP, rho_S in reversed(steps):
        last = np.isnan(scale_S) & (rho_S > 0)
        scale_S[last] = ((s_SP * y_SP).sum(1) / np.maximum((y_SP * y_SP).sum(1), 1e-300))[last]
    # without curvature yet: a first step of length one
    first_S = 1.0 / np.maximum(np.linalg.norm(grad_SP, axis=1), 1e-30)
    q_SP *= np.where(np.isnan(scale_S), first_S, scale_S)[:, None]
    for (s_SP, y_SP, rho_S), alpha_S in zip(steps, reversed(alphas), strict=True):
        q_SP += (alpha_S - rho_S * (y_SP * q_SP).sum(1))[:, None] * s_SP
    return q_SP


@dataclass(frozen=True)
class Pull:
    """Draws a quantity of the fit towards a target: adds strength / 2 * (quantity(theta_SP) - target_S)^2."""

    quantity: Callable[[Array], Array]
    target_S: Array
    strength: float

    def miss(self, theta_SP: Array, index: npt.NDArray[np.int64]) -> Array:
        return self.quantity(theta_SP) - self.target_S[index]

    def slope(self, theta_SP: Array) -> Array:
        step, columns = 1e-5, []
        for p in range(theta_SP.shape[1]):
            shift_P = np.zeros(theta_SP.shape[1])
            shift_P[p] = step
            columns.append((self.quantity(theta_SP + shift_P) - self.quantity(theta_SP - shift_P)) / (2 * step))
        return np.stack(columns, 1)


def polish(
    design: Design,
    start_SP: Array,
    weight_SR: Array | None = None,
    pull: Pull | None = None,
    iterations: int = 150,
    tolerance: float = 1e-10,
) -> tuple[Array, Array]:
    """Levenberg-Marquardt on Huber's reweighted squares, down to the kinks where L-BFGS stalls.

    `weight_SR` counts each record (a resample) and `pull` adds its term, per problem. Returns theta_SP and the
    objectives reached, the pull's term included.
    """
    theta_SP = start_SP.copy()

    def value(trial_SP: Array, index: npt.NDArray[np.int64]) -> Array:
        total_S = objective(design, trial_SP, None if weight_SR is None else weight_SR[index])
        return total_S if pull is None else total_S + 0.5 * pull.strength * pull.miss(trial_SP, index) ** 2

    active = np.arange(len(theta_SP))
    value_S = value(theta_SP, active)
    damping_S = np.full(len(theta_SP), 1e-3)
    quiet_S = np.zeros(len(theta_SP), dtype=int)
    eye = np.arange(theta_SP.shape[1])
    for _ in range(iterations):
        r_SR, share_SKR = design.residuals(theta_SP[active])
        jac_SRP = design.jacobian(share_SKR)
        reweight_SR = DELTA / np.maximum(np.abs(r_SR), DELTA)
        if weight_SR is not None:
            reweight_SR = reweight_SR * weight_SR[active]
        weighted_SRP = jac_SRP * reweight_SR[..., None]
        hess_SPP = np.matmul(weighted_SRP.transpose(0, 2, 1), jac_SRP)
        grad_SP = np.matmul(weighted_SRP.transpose(0, 2, 1), r_SR[..., None])[..., 0]
        if pull is not None:
            slope_SP = pull.slope(theta_SP[active])
            hess_SPP = hess_SPP + pull.strength * slope_SP[:, :, None] * slope_SP[:, None, :]
            grad_SP = grad_SP + pull.strength * pull.miss(theta_SP[active], active)[:, None] * slope_SP
        diagonal_SP = hess_SPP[:, eye, eye]
        floor_S1 = 1e-12 * diagonal_SP.max(1)[:, None] + 1e-300
        hess_SPP[:, eye, eye] += damping_S[active][:, None] * diagonal_SP + floor_S1
        step_SP = -np.linalg.solve(hess_SPP, grad_SP[..., None])[..., 0]
        step_SP *= np.minimum(1.0, 3.0 / np.maximum(np.abs(step_SP).max(1), 1e-30))[:, None]
        trial_SP = design.clipped(theta_SP[active] + step_SP)
        trial_S = value(trial_SP, active)
        better = trial_S < value_S[active]
        gain_S = np.where(better, value_S[active] - trial_S, 0.0)
        quiet_S[active] = np.where(gain_S <= tolerance * value_S[active], quiet_S[active] + 1, 0)
        moved = active[better]
        theta_SP[moved], value_S[moved] = trial_SP[better], trial_S[better]
        damping_S[active] = np.clip(damping_S[active] * np.where(better, 0.2, 8.0), 1e-9, 1e9)
        active = active[quiet_S[active] < 4]
        if not len(active):
            break
    return theta_SP, value_S


def coarse(design: Design, start_SP: Array, pull: Pull) -> tuple[Array, Array]:
    return polish(design, start_SP, pull=pull, iterations=40, tolerance=1e-5)
