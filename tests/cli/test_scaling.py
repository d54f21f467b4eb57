import json
import math

import numpy as np
import pytest
from click.testing import CliRunner
from synthetic_runs import EARLY, SMALL, grid, lines, write_records
from tiny_sweep import write_plan

from nmm_serve.cli.train import main

SIZES, BUDGETS = np.geomspace(1e7, 1e10, 5), np.geomspace(1e9, 1e12, 5)


def test_fit_prints_one_json_document(tmp_path):
    path = write_records(tmp_path / "r.jsonl", lines(grid(SIZES, BUDGETS, EARLY, 0.005)))
    run = CliRunner().invoke(main, ["fit", str(path), "--json", "--bootstraps", "20", "-o", str(tmp_path / "f.json")])
    assert run.exit_code == 0, run.output
    document = json.loads(run.stdout)
    assert document["fits"][0]["family"] == "early"
    assert math.isfinite(document["fits"][0]["c"])
    written = json.loads((tmp_path / "f.json").read_text())
    assert len(written.pop("runs")) == 25
    assert written == document


def test_fit_prints_a_table_and_warnings(tmp_path):
    drawn = map(json.loads, lines(grid(SIZES[:2], BUDGETS, SMALL, 0.005)))
    records = [json.dumps(record | {"losses": {"text": record["loss"]}}) for record in drawn]
    run = CliRunner().invoke(main, ["fit", str(write_records(tmp_path / "r.jsonl", records)), "--bootstraps", "20"])
    assert run.exit_code == 0, run.output
    assert "early, loss" in run.stdout
    (sizes,) = [line for line in run.stderr.splitlines() if "2 model sizes" in line]
    assert sizes.startswith("warning: early, loss, text: "), "of both targets, and said once"


def test_mixtures_are_fitted_apart_when_asked(tmp_path):
    drawn = list(map(json.loads, lines(grid(SIZES, BUDGETS, EARLY, 0.005))))
    records = [json.dumps(record | {"mixture": name}) for name in ("words", "half") for record in drawn]
    path = str(write_records(tmp_path / "r.jsonl", records))
    together = CliRunner().invoke(main, ["fit", path, "--bootstraps", "20", "--json"])
    assert json.loads(together.stdout)["warnings"] == ["one law for 2 mixtures of data: words, half"]
    apart = json.loads(
        CliRunner().invoke(main, ["fit", path, "--bootstraps", "20", "--json", "--mixture", "half"]).stdout
    )
    assert (apart["records"], apart["warnings"]) == (len(drawn), [])
    wrong = CliRunner().invoke(main, ["fit", path, "--mixture", "halv"])
    assert (wrong.exit_code, "Did you mean 'half'" in wrong.stderr) == (1, True)


def test_fit_draws_the_plots_there_are_and_names_what_it_leaves_out(tmp_path):
    runs = grid(SIZES[:3], BUDGETS[:3], EARLY)
    rising = type(runs)(runs.n_R, runs.d_R, 1 + 0.1 * np.log(runs.n_R), runs.flops_R)
    path = str(write_records(tmp_path / "r.jsonl", lines(rising)))
    run = CliRunner().invoke(main, ["fit", path, "--bootstraps", "20", "--plots", str(tmp_path / "plots")])
    assert run.exit_code == 0, run.output
    assert sorted(file.name for file in (tmp_path / "plots").iterdir()) == ["isoflop.png", "loss.png"]
    assert "optima leaves out early, whose loss does not fall with both size and tokens" in run.stderr


@pytest.mark.parametrize("text", ['{"family": "early"}\n', ""])
def test_fit_of_a_bad_file_is_one_line_and_exit_1(tmp_path, text):
    (tmp_path / "r.jsonl").write_text(text)
    run = CliRunner().invoke(main, ["fit", str(tmp_path / "r.jsonl")])
    assert run.exit_code == 1
    assert run.stderr.startswith("Error: ")
    assert "Traceback" not in run.stderr


def test_plan_from_the_papers_coefficients():
    run = CliRunner().invoke(main, ["plan", "--flops", "1e21", "--family", "early", "--json"])
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["plan"]["n_params"] == pytest.approx(1.67e9, rel=0.03)
    table = CliRunner().invoke(main, ["plan", "--flops", "1e21"])
    assert "late" in table.stdout
    assert "note: A and B of the dense models are not printed" in table.stderr


def test_plan_says_what_the_fit_it_makes_warned_of(tmp_path):
    drawn = list(map(json.loads, lines(grid(SIZES[:3], BUDGETS[:3], EARLY))))
    records = [json.dumps({k: v for k, v in record.items() if k != "flops"}) for record in drawn]
    path = str(write_records(tmp_path / "r.jsonl", records))
    run = CliRunner().invoke(main, ["plan", "--flops", "1e20", "--records", path])
    assert run.exit_code == 0, run.output
    assert "note: early: flops missing in 9 records" in run.stderr


def test_plan_refuses_two_sources(tmp_path):
    run = CliRunner().invoke(main, ["plan", "--flops", "1e21", "--records", "a", "--coefficients", "b"])
    assert run.exit_code == 2


def test_an_estimate_touches_nothing_and_refuses_what_the_sweep_would(tmp_path, monkeypatch):
    monkeypatch.setattr("nmm_serve.cli.scaling._tell_cost", lambda study: None)  # times the machine
    out = tmp_path / "out"
    out.mkdir()
    command = ["sweep", write_plan(tmp_path / "p.yaml"), "--out", str(out), "--estimate"]
    assert CliRunner().invoke(main, command).exit_code == 0
    assert list(out.iterdir()) == []
    (out / "tokenizer").mkdir()
    refused = CliRunner().invoke(main, command)
    assert refused.exit_code == 1
    assert "was not made by a sweep" in refused.output
    assert list(out.iterdir()) == [out / "tokenizer"]
