import pytest

from nmm_serve.evals.scaling.coverage import DESIGNS, coverage


@pytest.mark.parametrize("design", DESIGNS)
def test_a_few_draws_are_held(design):
    # of eight draws, each held with probability 0.95, fewer than six are held once in 170 times; the seeds are fixed
    assert min(coverage(DESIGNS[design], 8, 40).values()) >= 6 / 8
