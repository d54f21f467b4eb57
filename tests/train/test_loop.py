"""A run that is stopped or fed nonsense. Bit for bit: one thread, fp32."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_training import write_recipe

from nmm_serve.checkpoint import load_model, load_processor, read_run
from nmm_serve.errors import CheckpointError, ConfigError, TrainingError
from nmm_serve.presets import PRESETS
from nmm_serve.sizing import count_params
from nmm_serve.train.config import ParallelConfig, load_config
from nmm_serve.train.data.builtin import builtin_images
from nmm_serve.train.distributed import processes
from nmm_serve.train.loop import Trainer, train
from nmm_serve.train.optim import build_optimizer
from nmm_serve.train.resume import load_resume, resume_points
from nmm_serve.train.throughput import count_labels

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "tiny.yaml")


def losses(out: Path) -> list[tuple]:
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(e["event"], e["step"], e.get("loss"), e.get("grad_norm"), e.get("loss_caption")) for e in events]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> Path:
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(load_config(recipe), out)
    return out


def assert_same_run(out: Path, whole: Path) -> None:
    assert losses(out) == losses(whole)
    ours, expected = weights(out / "final"), weights(whole / "final")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[k], expected[k]) for k in expected)


class Stop(Exception):
    """Stands for the moment at which the process dies."""


@pytest.mark.parametrize("moment", [4, 7])
def test_resumed_run_is_the_undisturbed_run(recipe, whole, tmp_path, moment):
    def die(event):
        if event["event"] == "train" and event["step"] == moment:
            raise Stop

    with pytest.raises(Stop):
        train(load_config(recipe), tmp_path / "run", die)
    assert resume_points(tmp_path / "run/checkpoints")
    train(load_config(recipe), tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


def test_sigterm_saves_and_says_how_to_go_on(recipe, whole, tmp_path):
    def term(event):
        if event["event"] == "train" and event["step"] == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingError, match="stopped by SIGTERM after step 5.*run the same command to go on"):
        train(load_config(recipe), tmp_path / "run", term)
    assert resume_points(tmp_path / "run/checkpoints")[-1].name == "step-00000005"
    train(load_config(recipe), tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


def test_the_optimizer_comes_back_to_where_the_model_is(recipe, tmp_path):
    """Its step too, which the fused optimiser reads on a GPU; `meta` stands for one."""
    with processes(ParallelConfig()) as procs:
        trainer = Trainer(load_config(recipe), tmp_path, lambda event: None, procs)
        trainer.train_step()
        point = trainer.save(wait=True)
        model = trainer.model.to("meta")
        optimizer = build_optimizer(model, trainer.config.optimizer, 1e-3)
        load_resume(point, model, optimizer, procs)
        trainer.close()
    state = [value for values in optimizer.state.values() for value in values.values()]
    assert len(state) == 3 * len(list(model.parameters()))
    assert {value.device.type for value in state} == {"meta"}


def test_finished_run_is_left_alone(recipe, whole):
    before = (whole / "final/model.safetensors").stat().st_mtime_ns
    assert train(load_config(recipe), whole) == whole / "final"
    assert (whole / "final/model.safetensors").stat().st_mtime_ns == before


def test_run_record_and_checkpoint(whole):
    run, model = read_run(whole / "final"), load_model(whole / "final")
    assert run["params"]["total"] == count_params(model.config).total == model.num_parameters()
    assert run["steps"] == 8
    assert 0 < run["labels"] < run["tokens"] <= 8 * 2 * 320
    assert [h["step"] for h in run["history"]] == list(range(1, 9))
    assert run["history"][-1]["loss"] < run["history"][0]["loss"]
    assert run["losses"].keys() == {"loss_caption", "loss_avg"}
    assert run["flops"] == pytest.approx(run["paper_flops"], rel=0.25)
    assert load_processor(whole / "final").tokenizer.eos_token == "<|eos|>"


def test_another_configuration_is_refused_with_the_difference(recipe, whole):
    with pytest.raises(ConfigError, match=r"optimizer\.lr: None -> 0\.5"):
        train(load_config(recipe, ["optimizer.lr=0.5"]), whole)


def test_nan_steps_are_skipped_counted_and_end_the_run(recipe, tmp_path):
    events = []
    trainer = Trainer(load_config(recipe, ["max_bad_steps=3"]), tmp_path, events.append)
    trainer.train_step()
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    moments = trainer.optimizer.state[trainer.model.lm_head.weight]["exp_avg"].clone()
    healthy = trainer.model.lm_head.weight.data.clone()
    trainer.model.lm_head.weight.data.fill_(float("nan"))
    trainer.train_step()
    trainer.model.lm_head.weight.data.copy_(healthy)
    assert all(torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())
    assert torch.equal(trainer.optimizer.state[trainer.model.lm_head.weight]["exp_avg"], moments)
    assert trainer.totals["bad_steps"] == 1
    trainer.train_step()
    assert trainer.bad_in_a_row == 0, "a good step in between starts the count anew"
    trainer.model.lm_head.weight.data.fill_(float("nan"))
    trainer.train_step()
    trainer.train_step()
    with pytest.raises(TrainingError, match="3 steps in a row"):
        trainer.train_step()
    assert [e["event"] for e in events].count("bad_step") == 4
    trainer.log.close()


def test_accumulation_weighs_every_token_the_same(recipe, tmp_path):
    """Two rows in one pass or one after the other: one step, the same loss and gradient."""
    norms = []
    for k, shape in enumerate((["rows=2", "accumulate=1"], ["rows=1", "accumulate=2"])):
        folder = tmp_path / str(k)
        folder.mkdir()
        trainer = Trainer(load_config(recipe, shape), folder, lambda event: None)
        metrics = trainer.train_step()
        norms.append((metrics["loss"], metrics["grad_norm"]))
        trainer.log.close()
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_pixels_train_like_patches(recipe, whole, tmp_path, monkeypatch):
    """What a GPU is given, through a data worker."""
    monkeypatch.setattr("nmm_serve.train.opening.takes_raw_pixels", lambda device: True)
    final = train(load_config(recipe, ["data.workers=1"]), tmp_path / "run")
    assert [row[:2] for row in losses(tmp_path / "run")] == [row[:2] for row in losses(whole)]
    for actual, expected in zip(losses(tmp_path / "run"), losses(whole), strict=True):
        assert [x for x in actual[2:] if x] == pytest.approx([x for x in expected[2:] if x], rel=1e-4)
    assert load_processor(final).image_processor.raw_pixels is False


@pytest.mark.parametrize("family", ["late", "moe", "late-moe"])
def test_other_families_learn(recipe, tmp_path, family):
    final = train(load_config(recipe, [f"model.family={family}", "steps=4", "accumulate=1"]), tmp_path)
    run = read_run(final)
    assert run["family"] == load_model(final).config.family == family
    assert run["history"][-1]["loss"] < run["history"][0]["loss"]
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [e for e in events if e["event"] == "train"]
    assert all(("routed" in step) == ("moe" in family) for step in steps)
    if "moe" in family:
        # every token of every logged step went to one expert of each layer
        tokens = {"image": run["image_tokens"], "text": run["tokens"] - run["image_tokens"]}
        for modality, total in tokens.items():
            by_layer = np.array([step["routed"][modality] for step in steps]).sum((0, 2))
            assert by_layer.tolist() == [total] * load_model(final).config.num_hidden_layers


@pytest.mark.parametrize(
    ("options", "losses"),
    [
        (["model.router=modality", "model.num_experts=2"], set()),
        (["model.router_z_loss_coef=0.001"], {"aux_loss", "z_loss"}),
    ],
)
def test_routers_train_and_report_the_losses_they_have(recipe, tmp_path, options, losses):
    options = ["model.family=moe", "steps=4", "accumulate=2", *options]
    trainer = Trainer(load_config(recipe, options), tmp_path, lambda event: None)
    metrics = trainer.train_step()
    assert {name for name in metrics if name.endswith("_loss")} == losses
    assert all(metrics[name] > 0 for name in losses)
    trainer.log.close()


def test_fine_tuning_starts_from_a_checkpoint_and_learns_answers(recipe, whole, tmp_path):
    options = ["objective=sft", f"init_from={whole / 'final'}", "steps=3", "data.sources=[{kind: builtin, which: vqa}]"]
    trainer = Trainer(load_config(recipe, options), tmp_path, lambda event: None)
    assert torch.equal(trainer.model.lm_head.weight, load_model(whole / "final").lm_head.weight)
    batch = next(trainer.loader)
    decoded = trainer.processor.decode(batch["labels"][0][batch["labels"][0] >= 0], skip_special_tokens=False)
    assert "<|user|>" not in decoded
    assert decoded.count("<|eos|>") >= 1
    trainer.log.close()


def test_the_rate_of_a_model_to_go_on_from_is_its_own_preset_s(recipe, whole, tmp_path):
    """Whatever preset stands in the configuration. A run that goes on keeps its rate, also when that model is gone."""
    shutil.copytree(whole / "final", tmp_path / "start")
    options = [f"init_from={tmp_path / 'start'}", "steps=3", "model.preset=small", "data.validation=[]"]
    (tmp_path / "run").mkdir()
    for step in range(2):
        trainer = Trainer(load_config(recipe, options), tmp_path / "run", lambda event: None)
        assert trainer.step == step
        assert trainer.train_step()["lr"] == pytest.approx(PRESETS["nano"].peak_lr * (step + 1) / 2)
        point = trainer.save(wait=True)
        trainer.log.close()
        shutil.rmtree(tmp_path / "start", ignore_errors=True)
    with pytest.raises(ConfigError, match="does not record a preset to take it from.*set optimizer.lr"):
        Trainer(load_config(recipe, [f"init_from={point}"]), tmp_path / "next", lambda event: None)


def test_validation_asks_for_no_logits_but_those_of_labels(recipe, tmp_path, monkeypatch):
    trainer = Trainer(load_config(recipe), tmp_path, lambda event: None)
    asked = []
    trainer.model.lm_head.register_forward_hook(lambda module, args, output: asked.append(output[..., 0].numel()))
    losses = trainer.validation.losses(trainer.model)
    batches = trainer.validation.batches["caption"]
    assert asked == [count for batch in batches for count in (len(batch["input_ids"]), count_labels(batch))]
    forward = trainer.model.forward
    monkeypatch.setattr(trainer.model, "forward", lambda *args, logits_to_keep, **kwargs: forward(*args, **kwargs))
    assert trainer.validation.losses(trainer.model) == losses
    trainer.log.close()


@pytest.mark.slow
def test_compiled_model_trains_alike(recipe, tmp_path):
    results = []
    for compile in ("false", "true"):
        folder = tmp_path / compile
        folder.mkdir()
        trainer = Trainer(load_config(recipe, [f"compile={compile}"]), folder, lambda event: None)
        results.append([trainer.train_step()["loss"] for _ in range(3)])
        trainer.log.close()
    assert results[0] == pytest.approx(results[1], rel=1e-4)


@pytest.mark.parametrize("family", ["early", "late"])
def test_native_resolution_trains_on_the_images_own_patches(recipe, tmp_path, family):
    """Built-in pictures are smaller than `image_size` here: each is a quarter of the patches that it would be scaled
    up to."""
    options = [
        f"model.family={family}",
        "model.native_resolution=true",
        "steps=2",
        "accumulate=1",
        "schedule.warmup_steps=1",
    ]
    options += ["model.image_size=128", "data.validation=[]", "data.sources=[{kind: builtin, which: caption}]"]
    final = train(load_config(recipe, options), tmp_path)
    run, processor = read_run(final), load_processor(final)
    picture = builtin_images("train", 0).image
    assert processor.image_processor.grid(*picture.size) == (picture.height // 8, picture.width // 8)
    per_image = picture.height * picture.width // 64
    assert per_image < load_model(final).config.max_image_tokens / 2
    assert run["image_tokens"] % per_image == 0 < run["image_tokens"]


def test_checkpoint_whose_halves_disagree_on_resolution_is_refused(whole, tmp_path):
    shutil.copytree(whole / "final", tmp_path / "copy")
    config = tmp_path / "copy/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"native_resolution": True}))
    with pytest.raises(CheckpointError, match="native_resolution differs"):
        load_processor(tmp_path / "copy")
