import json
import re

import numpy as np
import pytest
from synthetic_runs import EARLY, SMALL, grid, lines

from nmm_serve.errors import DataError
from nmm_serve.evals.scaling.law import Law
from nmm_serve.evals.scaling.records import parse_records
from nmm_serve.evals.scaling.space import Runs
from nmm_serve.evals.scaling.study import fit_records

SIZES, BUDGETS = np.geomspace(1e7, 1e10, 5), np.geomspace(1e9, 1e12, 5)
KEYS = {
    "family",
    "target",
    "E",
    "A",
    "alpha",
    "B",
    "beta",
    "a",
    "b",
    "c",
    "intervals",
    "mae_pct",
    "r2",
    "n",
    "warnings",
}


def test_families_are_fitted_apart_and_the_document_is_json():
    mixed = [
        line
        for pair in zip(
            lines(grid(SIZES, BUDGETS, EARLY, 0.003)), lines(grid(SIZES, BUDGETS, SMALL), "late"), strict=True
        )
        for line in pair
    ]
    document = fit_records(parse_records(mixed, "runs"), bootstraps=30)
    json.dumps(document, allow_nan=False)
    early, late = document["fits"]
    assert (early["family"], late["family"]) == ("early", "late")
    for fit in (early, late):
        assert set(fit) >= KEYS
        assert fit["n"] == 25
        assert fit["a"] + fit["b"] == pytest.approx(1)
        for name in ("E", "A", "alpha", "B", "beta", "a", "b", "c", "d"):
            low, high = fit["intervals"][name]
            assert low <= fit[name] <= high
    assert early["E"] == pytest.approx(EARLY.E, rel=0.05)
    assert late["E"] == pytest.approx(SMALL.E, rel=0.01)
    for row in early["optima"]:
        low, high = row["intervals"]["n_params"]
        assert low <= row["n_params"] <= high


def test_each_data_type_and_the_mean_get_a_fit():
    runs, other = grid(SIZES, BUDGETS, EARLY), grid(SIZES, BUDGETS, SMALL)
    records = [
        json.dumps({"family": "early", "n_params": n, "tokens": d, "flops": c, "losses": {"text": x, "caption": y}})
        for n, d, c, x, y in zip(runs.n_R, runs.d_R, runs.flops_R, runs.loss_R, other.loss_R, strict=True)
    ]
    fits = {fit["target"]: fit for fit in fit_records(parse_records(records, "runs"), bootstraps=20)["fits"]}
    assert list(fits) == ["loss", "text", "caption"]
    assert fits["text"]["E"] == pytest.approx(EARLY.E, rel=0.01)
    assert fits["caption"]["E"] == pytest.approx(SMALL.E, rel=0.01)


def test_a_family_with_too_few_runs_is_null_with_the_reason():
    many, few = lines(grid(SIZES, BUDGETS, EARLY)), lines(grid(SIZES[:2], BUDGETS[:2], EARLY), "late")
    fits = fit_records(parse_records(many + few, "runs"), bootstraps=20)["fits"]
    assert fits[1]["E"] is None
    assert "too few" in fits[1]["warnings"][0]
    with pytest.raises(DataError, match="no family can be fitted"):
        fit_records(parse_records(few, "runs"), bootstraps=20)


def test_a_family_that_no_law_holds_is_null_and_the_others_are_fitted():
    close = grid(np.array([1e9, 1.1e9, 1.2e9]), BUDGETS[:3], EARLY)
    diverged = np.where(close.n_R == 1e9, close.loss_R + 3, close.loss_R)
    late = lines(type(close)(close.n_R, close.d_R, diverged, close.flops_R), "late")
    same = lines(type(close)(close.n_R, close.d_R, np.full(9, 2.5), close.flops_R), "moe")
    huge = lines(type(close)(close.n_R, close.d_R, close.loss_R * 1e200, close.flops_R), "late-moe")
    records = parse_records(lines(grid(SIZES[:3], BUDGETS[:3], EARLY)) + late + same + huge, "runs")
    document = fit_records(records, bootstraps=20)
    json.dumps(document, allow_nan=False)
    early, *broken = document["fits"]
    assert early["E"] == pytest.approx(EARLY.E, rel=0.05)
    for fit, reason in zip(broken, ("alpha = .* run that diverged", "every one has the loss 2.5", "r2"), strict=True):
        assert (fit["E"], fit["alpha"], fit["c"], fit["mae_pct"]) == (None, None, None, None)
        assert re.fullmatch(f"no power law holds these runs: .*{reason}.*", fit["warnings"][0])
    with pytest.raises(DataError, match="no family can be fitted: moe: no power law holds these runs"):
        fit_records(parse_records(same, "runs"), bootstraps=20)


def test_sparsity_needs_levels():
    def moe(sparsity):
        extra = {"sparsity": sparsity}
        law = Law(1.5 + 0.4 * (1 - sparsity) ** 0.3, EARLY.A, EARLY.alpha, EARLY.B, EARLY.beta)
        return lines(grid(SIZES, BUDGETS, law), "moe", **extra)

    one = fit_records(parse_records(moe(0.875), "runs"), bootstraps=20)["fits"][0]["sparsity_aware"]
    assert one["fit"] is None
    assert "one level" in one["reason"]
    unknown = fit_records(parse_records(lines(grid(SIZES, BUDGETS, EARLY), "moe"), "runs"), bootstraps=20)
    assert "tells no sparsity" in unknown["fits"][0]["sparsity_aware"]["reason"]
    three = fit_records(parse_records(moe(0.5) + moe(0.75) + moe(0.9375), "runs"), bootstraps=20)["fits"][0]
    found = three["sparsity_aware"]
    assert found["in_sample"]["mae_pct"] < 0.2 < three["in_sample"]["mae_pct"]
    assert set(found["fit"]) == {"A", "alpha", "B", "beta", "C", "lambda", "d", "delta", "gamma", "E"}


def test_isoflop_runs_without_curves_still_fit():
    flops = np.repeat(np.geomspace(1e18, 1e21, 5), 6)
    n = np.sqrt(flops / 120) * np.tile(np.geomspace(0.2, 5, 6), 5) * np.linspace(0.99, 1.01, 30)
    d = flops / 6 / n
    runs = type(grid(SIZES, BUDGETS, EARLY))(n, d, EARLY.loss(n, d), flops)
    fit = fit_records(parse_records(lines(runs), "runs"), bootstraps=20)["fits"][0]
    assert fit["alpha"] == pytest.approx(EARLY.alpha, rel=0.02)
    assert fit["frontier"]["source"] == "law"
    assert -0.1 < fit["c"] < 0


def test_losses_that_rise_with_size_have_no_optimum():
    runs = grid(SIZES, BUDGETS, EARLY, 0.002)
    rising = type(runs)(runs.n_R, runs.d_R, 1 + 0.1 * np.log(runs.n_R), runs.flops_R)
    fit = fit_records(parse_records(lines(rising), "runs"), bootstraps=20)["fits"][0]
    assert (fit["a"], fit["b"], fit["d"], fit["optima"]) == (None, None, None, [])
    assert "a" not in fit["intervals"]
    assert (fit["c"], "c" in fit["intervals"]) == (None, False)
    assert "the least compute has the least loss: c is null" in fit["warnings"]
    assert any("no optimal split" in warning for warning in fit["warnings"])


def test_runs_without_noise_have_narrow_intervals_that_hold():
    fit = fit_records(parse_records(lines(grid(SIZES, BUDGETS, EARLY)), "runs"), bootstraps=20)["fits"][0]
    assert fit["warnings"] == []
    for name in ("E", "alpha", "beta", "a"):
        low, high = fit["intervals"][name]
        assert low < getattr(EARLY, name) < high
        assert high - low < 1e-4


def test_runs_of_one_budget_have_no_exponents_of_compute():
    """One isoFLOP curve, its budgets alike but for rounding and for another seed's packing."""
    n_R = np.geomspace(1e8, 4e9, 12)
    d_R = 1e20 / (6 * n_R) * np.where(np.arange(12) % 2, 1.0, 1.001)
    loss_R = EARLY.loss(n_R, d_R) * np.exp(0.003 * np.random.default_rng(1).standard_normal(12))
    (fit,) = fit_records(parse_records(lines(Runs(n_R, d_R, loss_R, 6 * n_R * d_R)), "r"), bootstraps=20)["fits"]
    assert fit["E"] is not None
    assert fit["c"] is None
    assert fit["regressed"] == {}
    assert "c" not in fit["intervals"]
    assert [w for w in fit["warnings"] if w.endswith("c is null")] == [
        "every run has the same compute, about 1e+20 FLOPs (train other budgets, too): c is null"
    ]
