import numpy as np
import pytest
from synthetic_runs import EARLY, grid

from nmm_serve.evals.scaling.frontier import frontier, law_exponent, size_curves
from nmm_serve.evals.scaling.law import Cost

SIZES, BUDGETS = np.geomspace(1e8, 1e10, 9), np.geomspace(1e9, 1e12, 12)


def test_frontier_of_dense_curves_is_the_laws_own():
    found = frontier(grid(SIZES, BUDGETS, EARLY))
    assert found.low >= 3e19 * 0.99
    assert found.c == pytest.approx(law_exponent(EARLY, found.low, found.high, Cost()), abs=0.003)
    best = EARLY.best_loss(np.exp(found.log_c_X), Cost())
    assert np.exp(found.log_loss_X) == pytest.approx(best, rel=0.02)


def test_runs_of_a_laptop_start_where_the_second_size_leads():
    found = frontier(grid(SIZES / 1e4, BUDGETS / 1e4, EARLY))
    assert found.low > 6 * 1e4 * 1e5
    assert found.c < 0


def columns(runs):
    return runs.n_R, runs.d_R, runs.loss_R, runs.flops_R


def test_repeated_runs_are_averaged():
    runs = grid(SIZES, BUDGETS, EARLY)
    twice = type(runs)(*(np.concatenate([v, v]) for v in columns(runs)))
    assert len(size_curves(twice)[SIZES[0]][0]) == len(BUDGETS)
    assert frontier(twice).c == pytest.approx(frontier(runs).c)


def test_another_seed_sees_a_few_tokens_more_and_is_a_repetition():
    runs = grid(SIZES, BUDGETS, EARLY)
    more = grid(SIZES, BUDGETS * 1.01, EARLY)
    twice = type(runs)(*(np.concatenate([v, w]) for v, w in zip(columns(runs), columns(more), strict=True)))
    assert len(size_curves(twice)[SIZES[0]][0]) == len(BUDGETS)
    assert frontier(twice).c == pytest.approx(frontier(runs).c, rel=0.01)


def test_budgets_in_small_steps_stay_apart():
    runs = grid(SIZES, np.geomspace(1e9, 1e10, 80), EARLY)  # 3 % apart
    assert all(len(x) >= 40 for x, _ in size_curves(runs).values())


def test_what_costs_more_and_reaches_less_is_on_no_frontier():
    """Large models trained too short: the measured curves end before they meet the small ones' losses."""
    runs = grid(SIZES / 1e4, BUDGETS[:4] / 1e4, EARLY)
    found = frontier(runs)
    assert np.all(np.diff(found.log_loss_X) < 0)
    assert found.high == pytest.approx(runs.flops_R[runs.loss_R.argmin()], rel=0.05)
    assert found.high < runs.flops_R.max()


def test_losses_that_rise_with_compute_have_no_frontier():
    runs = grid(SIZES, BUDGETS, EARLY)
    assert frontier(type(runs)(runs.n_R, runs.d_R, np.log(runs.flops_R), runs.flops_R)) is None


def test_no_curves_no_frontier():
    runs = grid(SIZES, BUDGETS[:1], EARLY)
    assert frontier(runs) is None
