import json

import numpy as np
import pytest
from synthetic_runs import EARLY, grid, lines

from nmm_serve.errors import DataError
from nmm_serve.evals.scaling.law import Law
from nmm_serve.evals.scaling.plots import PLOTS, differences, report_plots
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


def test_the_report_takes_a_fits_file_with_its_runs(document, tmp_path):
    path = tmp_path / "fits.json"
    path.write_text(json.dumps(document))
    assert next(plot["title"] for plot in report_plots(path)) == "Scaling: Loss against compute"
    path.write_text(json.dumps({k: v for k, v in document.items() if k != "runs"}))
    with pytest.raises(DataError, match="does not hold the runs"):
        report_plots(path)
