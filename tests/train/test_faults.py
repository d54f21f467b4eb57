"""A full disk, damaged checkpoints, a taken folder, vanished data: one clear line, and the run goes on later."""

import errno
import json
import multiprocessing
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from kills import Moment, command, limited, live, living
from safetensors.torch import load_file
from tiny_sweep import write_plan
from tiny_training import write_recipe

from nmm_serve.cli.train import main
from nmm_serve.errors import ConfigError, TrainingError
from nmm_serve.train.config import load_config
from nmm_serve.train.data.builtin import export
from nmm_serve.train.log import RunLog
from nmm_serve.train.loop import train
from nmm_serve.train.resume import check_point, resume_points
from nmm_serve.train.run_folder import keep_config, locked

pytestmark = pytest.mark.usefixtures("one_thread")

FULL: list[str] = []
"""While a path is named here, opening or making what has it in its name finds the disk full."""


def _full_disk(event: str, args: tuple) -> None:
    if FULL and event in ("open", "os.mkdir") and FULL[0] in str(args[0]) and args[1] not in ("r", "rb", None):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))


@pytest.fixture(scope="module", autouse=True)
def _hook():
    sys.addaudithook(_full_disk)  # stays for good: there is no way to remove one
    yield
    FULL.clear()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "tiny.yaml")


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> Path:
    return train(load_config(recipe), tmp_path_factory.mktemp("whole") / "run")


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def stopped(recipe, tmp_path_factory) -> Path:
    """A run that ended after step 7, with resume checkpoints after steps 3 and 6."""

    def die(event):
        if event["event"] == "train" and event["step"] == 7:
            raise Stop

    out = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(Stop):
        train(load_config(recipe), out, die)
    return out


def run(*args):
    return CliRunner().invoke(main, [str(a) for a in args])


def assert_same_weights(ours: Path, expected: Path) -> None:
    ours_, expected_ = (load_file(folder / "model.safetensors") for folder in (ours, expected))
    assert ours_.keys() == expected_.keys()
    assert all(torch.equal(ours_[name], expected_[name]) for name in expected_)


def assert_one_line(result, message: str) -> None:
    assert result.exit_code == 1, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error:")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in result.stderr


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_at_every_stage_of_a_run(recipe, whole, tmp_path):
    """One folder, one fault after the other: each ends in one line, and the run goes on where it stood."""
    out = tmp_path / "run"
    stages = [
        ("run/.lock", []),
        (".config.yaml.tmp", []),
        ("log.tmp", []),
        ("tensorboard", []),
        ("step-00000003", []),
        ("training/sha256-files.json", []),
        ("step-00000006", [3]),
        (".final.", [3, 6]),
    ]
    for place, kept in stages:
        FULL[:] = [place]
        result = run("run", recipe, "--out", out)
        FULL.clear()
        assert_one_line(result, "disk full")
        points = resume_points(out / "checkpoints")
        assert [int(point.name[-8:]) for point in points] == kept, place
        for point in points:
            check_point(point)
    assert run("run", recipe, "--out", out).exit_code == 0
    assert_same_weights(out / "final", whole)
    assert {path.name for path in out.iterdir()} == {
        ".lock", "config.yaml", "log.jsonl", "tensorboard", "checkpoints", "final"
    }  # fmt: skip


def test_a_disk_that_refuses_the_weights(recipe, stopped, whole, tmp_path):
    out, said = tmp_path / "run", tmp_path / "said.txt"
    shutil.copytree(stopped, out)
    args = ["run", recipe, "--out", str(out)]
    assert live(limited, (1_000_000, args), said) == 1
    assert "Error: file too large" in said.read_text()
    assert "Traceback" not in said.read_text()
    check_point(resume_points(out / "checkpoints")[-1])
    assert run(*args).exit_code == 0
    assert_same_weights(out / "final", whole)


def _truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _emptied(file: Path) -> None:
    file.write_text("{}")


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("model.safetensors", _truncated, "is damaged"),
        ("training/optimizer.safetensors", _flipped, "is damaged"),
        ("training/state.json", _flipped, "is damaged"),
        ("training/state.json", Path.unlink, "is missing"),
        ("training/sha256-files.json", _truncated, "is damaged"),
        ("training/sha256-files.json", _emptied, "is damaged"),
        ("training/sha256-files.json", Path.unlink, "is missing"),
        ("tokenizer.json", _flipped, "is damaged"),
        ("config.json", Path.unlink, "is missing"),
    ],
)
def test_a_damaged_checkpoint_is_named_with_the_way_out(recipe, stopped, whole, tmp_path, name, damage, message):
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    before, last = resume_points(out / "checkpoints")
    damage(last / name)
    result = run("run", recipe, "--out", out)
    assert_one_line(result, f"{last / name} {message}")
    assert_one_line(result, f"Delete {last} to go on from the one before it, step-00000003")
    check_point(before)
    if name == "config.json":  # one stands for all: it goes on as told
        shutil.rmtree(last)
        assert run("run", recipe, "--out", out).exit_code == 0
        assert_same_weights(out / "final", whole)


def test_the_only_checkpoint_damaged(recipe, stopped, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    before, last = resume_points(out / "checkpoints")
    shutil.rmtree(before)
    _flipped(last / "model.safetensors")
    told = f"Delete {last} to go on from the beginning: there is none before it"
    assert_one_line(run("run", recipe, "--out", out), told)


def test_a_damaged_log_or_configuration_is_named(recipe, stopped, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    lines = (out / "log.jsonl").read_bytes().splitlines()
    (out / "log.jsonl").write_bytes(b"\n".join([*lines[:2], b"\xff{", *lines[2:]]))
    with pytest.raises(TrainingError, match=r"log.jsonl is damaged: line 3 is not JSON"):
        RunLog(out, 6)
    (out / "log.jsonl").write_bytes(b"\n".join(lines) + b'\n{"event": "tr')
    log = RunLog(out, 6)
    log.close()
    assert len(log.events) == len([line for line in lines if json.loads(line)["step"] <= 6]), "a torn last line is none"
    (out / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match="config.yaml is damaged"):
        keep_config(out, load_config(recipe))


def test_a_second_run_or_sweep_in_the_folder_is_refused(recipe, stopped, tmp_path):
    plan = write_plan(tmp_path / "p.yaml")
    for folder, args in ((stopped, ("run", recipe)), (tmp_path / "sweep", ("sweep", plan))):
        with locked(folder):
            before = sorted(folder.rglob("*"))
            assert_one_line(run(*args, "--out", folder), f"another run is training in {folder}")
            assert sorted(folder.rglob("*")) == before, "nothing is touched"
    check_point(resume_points(stopped / "checkpoints")[-1])


def _child(connection) -> None:
    connection.send("here")
    connection.recv()


def test_a_child_that_outlives_a_run_does_not_hold_its_folder(tmp_path):
    """Data workers notice only seconds later that their run was killed."""
    ours, theirs = multiprocessing.Pipe()
    with locked(tmp_path):
        child = multiprocessing.get_context("fork").Process(target=_child, args=(theirs,), daemon=True)
        child.start()
        assert ours.recv() == "here"
    with locked(tmp_path):
        assert child.is_alive()
    ours.send("go")
    child.join()


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_vanish_in_the_middle(recipe, tmp_path, workers):
    data, said, out = tmp_path / "data", tmp_path / "said.txt", tmp_path / "run"
    export(data, "train", 40, seed=0)
    source = f"{{kind: coco_captions, annotations: {data}/captions_train.json, images: {data}/images/train}}"
    changes = [f"data.sources=[{source}]", f"data.workers={workers}", "steps=300", "save_every=2", "eval_every=300"]
    args = ["run", recipe, "--out", str(out), *(word for change in changes for word in ("--set", change))]
    gone = tmp_path / "gone"

    def vanish() -> bool:
        if not gone.exists() and resume_points(out / "checkpoints"):
            data.rename(gone)
        return False

    assert live(command, (args,), said, Moment(after=vanish)) == 1, said.read_text()
    assert "Error: " in said.read_text()
    assert "Traceback" not in said.read_text()
    assert str(data) in said.read_text().splitlines()[-1]
    last = resume_points(out / "checkpoints")[-1]
    check_point(last)
    assert live(command, (args,), said) == 1
    assert f"{data}/captions_train.json does not exist" in said.read_text().splitlines()[-1]
    gone.rename(data)
    log = len((out / "log.jsonl").read_text().splitlines())

    def goes_on() -> bool:
        return len((out / "log.jsonl").read_text().splitlines()) > log + 2

    assert live(command, (args,), said, Moment(after=goes_on)) == -9
    deadline = time.monotonic() + 30
    while living(said) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not living(said), "data workers end with a run that was killed"
