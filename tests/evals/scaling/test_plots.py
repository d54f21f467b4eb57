import json

import numpy as np
import pytest
from synthetic_runs import EARLY, grid, lines

from nmm_serve.errors import DataError
from nmm_serve.evals.scaling import plots
from nmm_serve.evals.scaling.law import Law
from nmm_serve.evals.scaling.plots import PLOTS, differences, left_out, optima, report_plots
from nmm_serve.evals.scaling.records import parse_records
from nmm_serve.evals.scaling.study import fit_records, with_runs

SIZES, BUDGETS = np.geomspace(1e7, 1e10, 4), np.geomspace(1e9, 1e12, 5)
MOE = Law(2.1, 3e4, 0.6, 4659.0, 0.372)


@pytest.fixture(scope="module")
def document():
    records = parse_records(
        lines(grid(SIZES, BUDGETS, EARLY, 0.002))
        + lines(grid(SIZES, BUDGETS, EARLY, 0.002, 1), "late")
        + lines(grid(SIZES, BUDGETS, MOE, 0.002, 2), "moe"),
        "runs",
    )
    return with_runs(fit_records(records, bootstraps=20), records)


@pytest.mark.parametrize("draw", [plot[3] for plot in PLOTS])
def test_plots_are_svg_and_png_with_plain_labels(document, draw):
    drawn = draw(document)
    assert drawn.svg.startswith("<svg")
    assert "mathdefault" not in drawn.svg
    assert drawn.png().startswith(b"\x89PNG")


def test_panels_name_the_pairs(document):
    assert "early minus late" in differences(document).svg
    assert "moe minus early" in differences(document).svg
    only = {**document, "fits": [fit for fit in document["fits"] if fit["family"] == "early"]}
    assert differences(only) is None


def changed(document, family, **fields):
    fits = [fit | fields if fit["family"] == family else fit for fit in document["fits"]]
    return {**document, "fits": fits}


def test_families_without_an_optimum_are_left_out_and_named(document, tmp_path, monkeypatch):
    assert left_out(document) == {}
    one = changed(document, "late", optima=[])
    assert ">late<" not in optima(one).svg
    assert left_out(one) == {"optima": "late, whose loss does not fall with both size and tokens"}
    none = changed(changed(one, "early", optima=[]), "moe", optima=[])
    assert (optima(none), differences(none)) == (None, None)
    (tmp_path / "fits.json").write_text(json.dumps(none))
    monkeypatch.setattr(plots, "PLOTS", PLOTS[2:])
    (told,) = report_plots(tmp_path / "fits.json")
    assert (told["svg"], "Left out: early, late, moe, whose" in told["note"]) == ("", True)


def test_families_without_common_budgets_are_not_compared(document):
    fits = {fit["family"]: fit for fit in document["fits"]}
    far = {"flops": [1e30, 1e32]}
    apart = changed(document, "late", range=fits["late"]["range"] | far)
    svg = differences(apart).svg
    assert ("early minus late" in svg, "moe minus early" in svg) == (False, True)
    assert left_out(apart)["differences"].startswith("early minus late, whose runs have no budgets in common (")
    assert differences(changed(apart, "moe", range=fits["moe"]["range"] | {"flops": [1e5, 1e6]})) is None


def test_resamples_without_an_optimum_are_in_no_band(document):
    (early,) = [fit for fit in document["fits"] if fit["family"] == "early"]
    rising = early["resampled"] | {"alpha": [-0.1, *early["resampled"]["alpha"][1:]]}
    assert "no band: 19 resamples with an optimum" in differences(changed(document, "early", resampled=rising)).svg


def test_the_report_takes_a_fits_file_with_its_runs(document, tmp_path):
    path = tmp_path / "fits.json"
    path.write_text(json.dumps(document))
    assert next(plot["title"] for plot in report_plots(path)) == "Scaling: Loss against compute"
    path.write_text(json.dumps({k: v for k, v in document.items() if k != "runs"}))
    with pytest.raises(DataError, match="does not hold the runs"):
        report_plots(path)
