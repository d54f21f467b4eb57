import json

import numpy as np
import pytest
from synthetic_runs import EARLY, grid, lines

from nmm_serve.errors import ConfigError, DataError
from nmm_serve.evals.scaling.plan import (
    families,
    hardware,
    hardware_names,
    load_coefficients,
    make_plan,
    paper_coefficients,
    paper_moe_params,
)  # fmt: skip
from nmm_serve.evals.scaling.records import parse_records
from nmm_serve.evals.scaling.study import fit_records

PAPER = "arXiv 2504.07951"
OWN = {"family": "x", "E": 1.9, "A": 260, "alpha": 0.3, "B": 1900, "beta": 0.33}
DRAWN = {"log_A": [5.0] * 30, "alpha": [0.3] * 30, "log_B": [7.0] * 30, "beta": [0.3] * 30, "log_E": [0.6] * 30}


def plan(document=None, **changes):
    options = {"flops": 1e21, "family": "early", "device": hardware("h100"), "devices": 1, "utilisation": 0.4}
    return make_plan(document or paper_coefficients(), PAPER, **(options | changes))


def test_the_papers_coefficients_give_its_own_optimum():
    made = plan()
    early = made["plan"]
    # figure 1 at 1e21: N/D 0.0167; its frontier line: 29.574 C^-0.0492
    assert early["n_params"] / early["tokens"] == pytest.approx(0.0167, rel=0.03)
    assert early["loss"] == pytest.approx(29.574 * 1e21**-0.0492, rel=0.005)
    others = {row["family"]: row for row in made["others"]}
    assert others["late"]["n_params"] / others["late"]["tokens"] == pytest.approx(0.0212, rel=0.03)
    assert others["moe"]["n_params"] / others["moe"]["tokens"] == pytest.approx(0.0055, rel=0.03)
    assert others["moe"]["loss"] < early["loss"] < others["late"]["loss"]
    assert made["multipliers"]["late"] == pytest.approx(1.04, abs=0.02)
    assert made["multipliers"]["moe"] < 0.6
    assert early["intervals"] is None
    assert any("no intervals" in warning for warning in early["warnings"])
    assert any("not printed" in remark for remark in made["notes"])


def test_cost_follows_from_the_hardware():
    one, many = plan(), plan(devices=16, utilisation=0.2, device=hardware("a100"))
    assert one["plan"]["hours"] == pytest.approx(1e21 / (989e12 * 0.4) / 3600)
    assert many["plan"]["hours"] == pytest.approx(1e21 / (16 * 312e12 * 0.2) / 3600)
    moe = next(row for row in one["others"] if row["family"] == "moe")
    assert not moe["fits_in_memory"]
    assert any("2 are the least" in warning for warning in moe["warnings"])
    assert {"h100", "a100"} <= set(hardware_names())


@pytest.mark.parametrize(("active", "total"), [(0.2748e9, 1.20e9), (3.354e9, 17.5e9)])
def test_moe_totals_are_the_papers(active, total):
    # the SwiGLU width is rounded up to 256 in the real shapes, 8 d / 3 here
    assert paper_moe_params(active) == pytest.approx(total, rel=0.03)


def test_a_fit_brings_intervals_and_warns_of_extrapolation():
    runs = grid(np.geomspace(1e7, 1e10, 5), np.geomspace(1e9, 1e12, 5), EARLY, 0.003)
    document = json.loads(json.dumps(fit_records(parse_records(lines(runs), "r"), bootstraps=40)))
    made = plan(document)["plan"]
    for name, true in (("n_params", 1.67e9), ("tokens", 99.6e9), ("loss", 2.738)):
        low, high = made["intervals"][name]
        assert low < made[name] < high
        assert low < true < high
    assert not any("outside" in warning for warning in made["warnings"])
    assert any("outside the runs' range" in warning for warning in plan(document, flops=1e26)["plan"]["warnings"])


def test_all_parameters_are_those_of_the_fitted_runs():
    runs = grid(np.geomspace(1e7, 1e10, 4), np.geomspace(1e9, 1e12, 4), EARLY, 0.003)
    told = [json.dumps(r | {"n_params_total": (3 if r["n_params"] < 5e7 else 5) * r["n_params"]})
            for r in map(json.loads, lines(runs, "moe"))]  # fmt: skip
    document = fit_records(parse_records(told, "r"), bootstraps=2)
    assert [total / active for active, total in document["fits"][0]["all_params"]] == pytest.approx([3, 5, 5, 5])
    for flops, share in ((1e16, 3), (1e20, 5)):
        made = plan(json.loads(json.dumps(document)), flops=flops, family="moe")["plan"]
        assert made["n_params_total"] == pytest.approx(share * made["n_params"])
        assert made["weights_bytes"] == 2 * made["n_params_total"]
    document["fits"][0]["all_params"] = "many"
    with pytest.raises(DataError, match="all_params"):
        plan(document, family="moe")
    untold = [json.loads(line) | {"n_params_total": 0} for line in lines(runs)]
    with pytest.raises(DataError, match="n_params_total must be a positive number"):
        parse_records(map(json.dumps, untold), "r")


def test_coefficients_of_ones_own(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("fits: [{family: early, E: 1.9, A: 260, alpha: 0.3, B: 1900, beta: 0.33}]")
    made = plan(load_coefficients(path))
    assert made["others"] == []
    assert made["plan"]["n_params"] > 1e9


def test_a_family_that_cannot_be_planned_for_is_left_out_and_raises_only_when_asked_for():
    document = {"fits": [OWN | {"family": "early"}, OWN | {"family": "late", "alpha": -0.186}], "warnings": ["w"]}
    made = plan(document)
    assert (made["plan"]["family"], made["others"], made["multipliers"]) == ("early", [], {})
    reason = f"{PAPER}: late: alpha must be a positive number, not -0.186"
    assert made["notes"] == ["w", f"left out: {reason}"]
    with pytest.raises(DataError) as error:
        plan(document, family="late")
    assert str(error.value) == reason


def test_sizes_of_ones_own_may_stand_in_any_order():
    sizes = [[1e8, 8e8], [1e10, 2e10]]
    totals = [
        plan({"fits": [OWN | {"all_params": order}]}, family="x")["plan"]["n_params_total"]
        for order in (sizes, sizes[::-1])
    ]
    assert totals[0] == totals[1]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"fits": [{"family": "early", "E": 1.9}]}, "A must be a positive number, not None"),
        ({"fits": [{"E": 1.9}]}, r"fits\[0\] has no family"),
        ({"fits": []}, "holds no fit"),
        ({"fits": [{"family": "x", "E": 1, "A": 1, "alpha": 1, "B": 1, "beta": True}]}, "beta must be"),
        ({"fits": [{"family": "x", "E": 1, "A": 1, "alpha": 1, "B": 1, "beta": 1, "cost": {"y": 1}}]}, "x: cost"),
        ({"fits": [OWN | {"cost": {"factor": "1"}}]}, "x: cost.factor must be a positive number, not '1'"),
        ({"fits": [OWN | {"E": 10**400}]}, "x: E must be a positive number"),
        ({"fits": [OWN | {"resampled": DRAWN | {"log_B": [7.0] * 20}}]}, "30 of alpha, 20 of log_B"),
        ({"fits": [OWN | {"all_params": [[1e9, -1]]}]}, "x: all_params must be pairs of positive numbers"),
        ({"fits": [OWN | {"warnings": "abc"}]}, "x: warnings must be a list of sentences, not 'abc'"),
        ({"fits": [{"family": "x", "E": None, "warnings": ["3 runs are too few"]}]}, "file: x: 3 runs are too few"),
    ],
)
def test_impossible_coefficients_are_named(document, message):
    with pytest.raises(DataError, match=message):
        families(document, "file")


def test_what_a_user_did_wrong(tmp_path):
    with pytest.raises(ConfigError, match="unknown hardware"):
        hardware("h1000")
    with pytest.raises(ConfigError, match="unknown family 'erly'"):
        plan(family="erly")
    for flops in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="--flops"):
            plan(flops=flops)
    with pytest.raises(DataError, match="does not exist"):
        load_coefficients(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        load_coefficients(tmp_path / "bad.json")
    (tmp_path / "digits.json").write_text("1" * 5000)
    with pytest.raises(DataError, match="cannot be read"):
        load_coefficients(tmp_path / "digits.json")
    (tmp_path / "notes.json").write_text('{"fits": [], "notes": "one"}')
    with pytest.raises(DataError, match="notes must be a list of sentences, not 'one'"):
        load_coefficients(tmp_path / "notes.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(DataError, match="no list `fits`"):
        load_coefficients(tmp_path / "list.json")
