from itertools import product

import numpy as np
import pytest
from scipy.optimize import minimize
from synthetic_runs import EARLY, SMALL, grid

from nmm_serve.evals.scaling.fit import best_theta, critical_rise, family_cost, fit_law, identification
from nmm_serve.evals.scaling.held_out import errors, held_out_error, largest_size_error
from nmm_serve.evals.scaling.law import Cost, Law, regressed_exponents
from nmm_serve.evals.scaling.optimise import DELTA, objective
from nmm_serve.evals.scaling.resample import resample
from nmm_serve.evals.scaling.space import Runs, Space

PAPER_SIZES = np.geomspace(2.75e8, 3.35e9, 6)
PAPER_BUDGETS = np.geomspace(1e9, 6e11, 8)
WIDE = (np.geomspace(1e6, 1e10, 7), np.geomspace(1e8, 1e12, 7))


def scipy_best(runs, starts):
    """The paper's procedure written plainly: its own coordinates, scipy's L-BFGS, one start after the other."""
    x, z, y = np.log(runs.n_R), np.log(runs.d_R), np.log(runs.loss_R)

    def value(theta):
        a, alpha, b, beta, e = theta
        terms = np.stack([a - alpha * x, b - beta * z, np.full_like(x, e)])
        top = terms.max(0)
        total = np.exp(terms - top).sum(0)
        r = top + np.log(total) - y
        size = np.abs(r)
        slope = np.clip(r, -DELTA, DELTA) * (np.exp(terms - top) / total)
        loss = np.where(size <= DELTA, r * r / 2, DELTA * (size - DELTA / 2)).sum()
        return loss * 1e3, 1e3 * np.array(
            [slope[0].sum(), -(slope[0] * x).sum(), slope[1].sum(), -(slope[1] * z).sum(), slope[2].sum()]
        )

    return min(minimize(value, s, jac=True, method="L-BFGS-B", options={"maxiter": 2000}).fun for s in starts) / 1e3


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_ends_at_least_as_low_as_the_plain_procedure(noise):
    runs = grid(PAPER_SIZES[::2], PAPER_BUDGETS[::2], EARLY, noise)
    reference = scipy_best(runs, product((0, 5, 10, 20), (0, 0.5), (0, 5, 10, 20), (0, 0.5), (0.5,)))
    _, value = best_theta(runs, Space.of(runs))
    assert value <= reference * (1 + 1e-6) + 1e-12


@pytest.mark.parametrize("law", [EARLY, Law(2.158, 381773.0, 0.710, 4659.0, 0.372)])
def test_recovers_a_law_without_noise(law):
    fitted = fit_law(grid(PAPER_SIZES, PAPER_BUDGETS, law), bootstraps=20)
    for name in ("E", "alpha", "beta", "a", "b"):
        assert getattr(fitted.law, name) == pytest.approx(getattr(law, name), rel=2e-3)
        low, high = fitted.intervals[name]
        assert low <= getattr(law, name) <= high
    assert pytest.approx(law.A, rel=0.03) == fitted.law.A


def test_the_best_of_many_records_is_found_from_starts_judged_on_some():
    runs = grid(np.geomspace(1e7, 1e10, 14), np.geomspace(1e9, 1e12, 14), EARLY, 0.01)
    space = Space.of(runs)
    theta, value = best_theta(runs, space)
    design = space.design(runs)
    shaken = theta + np.random.default_rng(0).normal(0, 1e-3, (500, 5))
    assert (objective(design, shaken) >= value).all()


def test_intervals_hold_the_law_where_the_data_hold_it_and_say_so_where_not():
    held = fit_law(grid(*WIDE, EARLY, 0.005, seed=1), bootstraps=60)
    assert identification(held) == []
    for name in ("E", "alpha", "beta", "a"):
        low, high = held.intervals[name]
        assert low < getattr(EARLY, name) < high
        assert high - low < 0.4 * getattr(EARLY, name)
    loose = fit_law(grid(PAPER_SIZES, PAPER_BUDGETS, EARLY, 0.02, seed=3), bootstraps=60)
    assert any("alpha" in warning for warning in identification(loose))


def test_two_sizes_are_named_as_not_identifying():
    fitted = fit_law(grid(PAPER_SIZES[:2], PAPER_BUDGETS, EARLY, 0.005), bootstraps=30)
    assert any("2 model sizes" in warning for warning in identification(fitted))


def test_intervals_shrink_with_the_noise():
    widths = []
    for noise in (0.02, 0.002):
        low, high = fit_law(grid(*WIDE, EARLY, noise), bootstraps=50).intervals["alpha"]
        widths.append(high - low)
    assert widths[1] < widths[0] / 4


def test_held_out_error_is_that_of_the_noise():
    runs = grid(*WIDE, EARLY, 0.01, seed=2)
    fitted = fit_law(runs, bootstraps=20)
    error = held_out_error(fitted)
    # the mean absolute value of a normal is 0.8 of its deviation
    assert error["mae_pct"] == pytest.approx(0.8, rel=0.35)
    assert error["r2"] > 0.98
    assert error["n"] == len(runs)
    largest = largest_size_error(fitted)
    assert largest["n_params"] == pytest.approx(1e10)
    assert largest["mae_pct"] < 3


def test_errors_without_spread_have_no_r2():
    assert errors(np.ones(3), np.ones(3))["r2"] is None


def test_errors_of_no_prediction_are_null():
    assert errors(np.arange(1.0, 4), np.array([1, 2, np.nan])) == {"mae_pct": None, "r2": None, "n": 3}


def test_outliers_do_not_move_the_fit():
    runs = grid(*WIDE, EARLY, 0.002)
    runs.loss_R[[3, 30]] *= 1.5
    law = fit_law(runs, bootstraps=20).law
    assert law.alpha == pytest.approx(EARLY.alpha, rel=0.1)
    assert law.beta == pytest.approx(EARLY.beta, rel=0.1)


def test_resamples_keep_enough_sizes():
    runs = grid(PAPER_SIZES[:3], PAPER_BUDGETS[:3], EARLY)
    counts, redrawn = resample(runs, 200, 0)
    assert redrawn > 0
    assert (counts.sum(1) == 9).all()
    sizes = [len(np.unique(runs.n_R[row > 0])) for row in counts]
    assert min(sizes) == 3


def test_critical_rise_grows_with_the_noise():
    rises = []
    for noise in (0.001, 0.01):
        runs = grid(*WIDE, EARLY, noise)
        space = Space.of(runs)
        theta, _ = best_theta(runs, space)
        rises.append(critical_rise(space.design(runs), theta))
    assert 0 < rises[0] < rises[1]


def test_optimum_is_where_the_loss_is_least():
    for cost in (Cost(), Cost(factor=2.0, exponent=0.93)):
        n, d = EARLY.optimum(1e21, cost)
        assert cost.flops(n, d) == pytest.approx(1e21)
        for factor in (0.9, 1.1):
            assert EARLY.loss(n * factor, cost.tokens(1e21, n * factor)) > EARLY.loss(n, d)
    assert EARLY.compute_for(float(EARLY.best_loss(1e21, Cost())), Cost()) == pytest.approx(1e21, rel=1e-6)
    assert EARLY.compute_for(EARLY.E, Cost()) == float("inf")


def test_regression_agrees_with_the_closed_form():
    flops = np.geomspace(1e19, 1e22, 10)
    found = regressed_exponents(EARLY, flops, (1e9, 1e13), Cost())
    for name in ("a", "b", "d"):
        assert found[name] == pytest.approx(getattr(EARLY, name), rel=0.01)
    assert found["n_over_d"] == pytest.approx(EARLY.a - EARLY.b, abs=0.005)


def test_cost_of_a_family_comes_from_its_own_flops():
    n, d = np.geomspace(1e6, 1e9, 9), np.full(9, 1e9)
    assert family_cost(n, d, 6 * n * d) == (Cost(), 0.0)
    cost, off = family_cost(n, d, 6 * 0.8 * n**1.02 * d)
    assert (cost.factor, cost.exponent) == pytest.approx((0.8, 1.02))
    assert off < 1e-9
    _, off = family_cost(n, d, 6 * n * d * np.where(np.arange(9) % 2, 1, 2))
    assert off > 0.2


def test_a_small_law_of_few_runs_is_recovered():
    runs = grid(np.geomspace(1e5, 3e6, 5), np.geomspace(1e6, 1e8, 4), SMALL, 0.003, seed=4)
    fitted = fit_law(runs, bootstraps=60)
    for name in ("E", "alpha", "beta", "a"):
        low, high = fitted.intervals[name]
        assert low <= getattr(SMALL, name) <= high


@pytest.mark.parametrize("order", [1, -1])
def test_the_order_of_runs_does_not_matter(order):
    runs = grid(*WIDE, EARLY, 0.01)
    theta, _ = best_theta(Runs(*(v[::order] for v in (runs.n_R, runs.d_R, runs.loss_R, runs.flops_R))), Space.of(runs))
    expected, _ = best_theta(runs, Space.of(runs))
    assert theta == pytest.approx(expected, rel=1e-3)
