"""nmm-train merge and interpolate as a user types them."""

import json

import pytest
import yaml
from click.testing import CliRunner
from tiny_checkpoint import make_checkpoint
from tiny_training import TINY

from nmm_serve.checkpoint import check_checkpoint
from nmm_serve.cli.train import main


def run(*args):
    return CliRunner().invoke(main, [str(a) for a in args])


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("merging") / "a")


def test_merge_writes_a_checkpoint(ckpt, tmp_path):
    result = run("merge", ckpt, ckpt, "--weights", "1,3", "-o", tmp_path / "m")
    assert result.exit_code == 0, result.output
    assert "75.0%" in result.stderr
    check_checkpoint(tmp_path / "m")


def test_interpolate_writes_record_and_plot(ckpt, tmp_path):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(TINY))
    files = ["-o", tmp_path / "path.json", "--plot", tmp_path / "path.png"]
    options = ["--points", 2, "--data", recipe, "--set", "data.validation_documents=1"]
    result = run("interpolate", ckpt, ckpt, *options, *files, "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert json.loads((tmp_path / "path.json").read_text()) == record
    assert record["points"][0]["losses"] == record["points"][1]["losses"]
    assert (tmp_path / "path.png").read_bytes().startswith(b"\x89PNG")
    table = run("interpolate", ckpt, ckpt, *options)
    assert "barrier" in table.stdout


def test_interpolate_says_before_it_measures_that_it_cannot_write(ckpt, tmp_path):
    (tmp_path / "file").write_text("")
    for option, place in (
        ("-o", tmp_path),
        ("-o", tmp_path / "file/path.json"),
        ("--plot", tmp_path / "file/path.png"),
    ):
        result = run("interpolate", ckpt, "nowhere", "--data", "demo", option, place)
        assert result.exit_code == 1
        assert str(tmp_path) in result.stderr
        assert "nowhere" not in result.stderr


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["merge", "a", "b"], 2, "Missing option"),
        (["merge", "a", "b", "-o", "m", "--weights", "1;2"], 2, "not a list of numbers"),
        (["merge", "a", "b", "-o", "m"], 1, "checkpoint directory a does not exist"),
        (["interpolate", "a", "b", "--set", "rows=1"], 2, "--set overrides keys of --data"),
        (["interpolate", "a", "b"], 1, "a/run.json names no training configuration"),
    ],
)
def test_mistakes_are_one_clear_line(tmp_path, monkeypatch, args, code, message):
    monkeypatch.chdir(tmp_path)
    result = run(*args)
    assert result.exit_code == code, result.output
    assert message in result.stderr
