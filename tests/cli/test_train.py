"""nmm-train as a user types it."""

import json

import pytest
from click.testing import CliRunner
from tiny_training import write_recipe

from nmm_serve.checkpoint import check_checkpoint
from nmm_serve.cli.train import main


@pytest.fixture
def recipe(tmp_path):
    return write_recipe(tmp_path / "tiny.yaml")


def run(*args):
    return CliRunner().invoke(main, [str(a) for a in args])


def test_run_trains_and_says_where(tmp_path, recipe):
    result = run("run", recipe, "--out", tmp_path / "run", "--set", "steps=3", "--set", "eval_every=3")
    assert result.exit_code == 0, result.output
    assert "early: 0.92M parameters" in result.stderr
    assert "step 3: loss" in result.stderr
    assert "validation loss: caption" in result.stderr
    assert f"checkpoint: {tmp_path}" in result.stderr.replace("\n", "")
    check_checkpoint(tmp_path / "run/final")
    assert list((tmp_path / "run/tensorboard").iterdir())
    again = run("run", recipe, "--out", tmp_path / "run", "--set", "steps=3", "--set", "eval_every=3")
    assert again.exit_code == 0
    assert "step 3" not in again.stderr
    watched = run("watch", tmp_path / "run")
    assert watched.exit_code == 0
    assert "step 3 of 3" in watched.stderr


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["run", "dmo", "--out", "x"], 1, "unknown recipe 'dmo'. Did you mean 'demo'?"),
        (["run", "none.yaml", "--out", "x"], 1, "config file none.yaml does not exist"),
        (["run", "demo", "--out", "x", "--set", "stepz=1"], 1, "Did you mean steps?"),
        (["run", "demo", "--out", "x", "--set", "steps=[1"], 1, "'[1' is not valid YAML"),
        (
            ["run", "demo", "--out", "x", "--set", "model.family=moe", "--set", "model.num_experts=0"],
            1,
            "8 in the paper",
        ),
        (["sweep", "compact"], 2, "--out"),
        (["run", "demo", "--out", "x", "--set", "init_from=nowhere"], 1, "checkpoint directory nowhere does not exist"),
        (["run", "photo-grid", "--out", "x", "--set", "data.root=nowhere"], 1, "nowhere/captions_train.json"),
        (["run", "demo"], 2, "Missing option"),
        (["run", "demo", "--uot", "x"], 2, "--out"),
        (["rnu", "demo"], 2, "Did you mean 'run'?"),
    ],
)
def test_mistakes_are_one_clear_line(tmp_path, monkeypatch, args, code, message):
    monkeypatch.chdir(tmp_path)
    result = run(*args)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_mistake_does_not_take_the_folder(tmp_path, recipe):
    """The command that has it right goes into the same one."""
    assert run("run", recipe, "--out", tmp_path / "run", "--set", "model.preset=nanoo").exit_code == 1
    result = run("run", recipe, "--out", tmp_path / "run", "--set", "steps=3")
    assert result.exit_code == 0, result.output
    changed = run("run", recipe, "--out", tmp_path / "run", "--set", "steps=4")
    assert changed.exit_code == 1
    assert "holds a run with another configuration (steps: 3 -> 4)" in changed.stderr


def test_bad_images_end_the_run_by_name(tmp_path, recipe):
    images = tmp_path / "images"
    images.mkdir()
    entries = [{"id": i, "file_name": f"{i}.png", "width": 8, "height": 8} for i in range(200)]
    captions = [{"id": i, "image_id": i, "caption": "a cat"} for i in range(200)]
    (tmp_path / "captions.json").write_text(json.dumps({"images": entries, "annotations": captions}))
    for i in range(200):
        (images / f"{i}.png").write_bytes(b"no image")
    source = f"data.sources=[{{kind: coco_captions, annotations: {tmp_path}/captions.json, images: {images}}}]"
    result = run("run", recipe, "--out", tmp_path / "run", "--set", source, "--set", "data.validation=[]")
    assert result.exit_code == 1
    assert "documents of source 'coco_captions' are bad" in result.stderr
    assert ".png" in result.stderr


def test_recipes_are_listed():
    result = run("recipes")
    assert result.exit_code == 0
    assert {"demo", "demo-sft", "photo-grid", "photo-grid-sft"} <= set(result.stdout.split())
    assert "demo-sft: Fine-tuning after demo" in result.stdout


def test_built_in_data_is_written_in_the_known_layout(tmp_path):
    result = run("data", "builtin", tmp_path / "d", "--split", "val", "--images", "3")
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "d/images/val").iterdir())) == 3
    questions = json.loads((tmp_path / "d/vqa_val_questions.json").read_text())["questions"]
    assert {"question_id", "image_id", "question"} <= questions[0].keys()
    assert run("data", "builtin", tmp_path / "d", "--split", "val", "--images", "3").exit_code == 1
