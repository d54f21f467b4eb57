"""The speed measurement compares the same work, and reckons its ratios right. Nothing here asserts a time."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from nmm_serve.cli.train import main
from nmm_serve.errors import ConfigError, TrainingError
from nmm_serve.train import speed
from nmm_serve.train.build import build
from nmm_serve.train.data.loader import PackedLoader
from nmm_serve.train.data.mixture import parse_mixture
from nmm_serve.train.speed_variants import documents_of, hugging_face_steps, our_steps, pad, speed_config, tensors_of

SIZE = {"preset": "atto", "rows": 2, "context_length": 512}


class Parent:
    """A pipe's other end that asks for two steps."""

    def __init__(self):
        self.turns, self.answers = iter(["step", "step", "end"]), []

    def recv(self):
        return next(self.turns)

    def send(self, answer):
        self.answers.append(answer)


@pytest.fixture(scope="module")
def first_batch():
    config = speed_config(**SIZE, variant="dense")
    mixture = parse_mixture({"sources": config.data.sources})
    torch.manual_seed(0)
    model, processor = build(config, mixture)
    loader = PackedLoader(
        mixture, processor, context_length=512, rows=2, objective="pretrain", seed=0
    )  # fmt: skip
    return model, processor, next(loader)


def test_padded_documents_are_the_packed_batch(first_batch):
    model, processor, batch = first_batch
    documents = documents_of(batch, model.config)
    padded = pad(documents, processor.tokenizer.pad_token_id)
    assert len(documents) == int(batch["document_ids"].max(1).values.sum()) > 2
    assert padded["attention_mask"].sum() == (batch["document_ids"] > 0).sum()
    assert torch.equal(padded["pixel_values"], batch["pixel_values"])
    assert torch.equal(padded["image_grid"], batch["image_grid"])
    model.train()
    packed_loss, padded_loss = (model(**tensors).loss for tensors in (tensors_of(batch), padded))
    assert padded_loss.item() == pytest.approx(packed_loss.item(), rel=1e-5)
    packed_grad, padded_grad = (torch.autograd.grad(x, model.lm_head.weight)[0] for x in (packed_loss, padded_loss))
    torch.testing.assert_close(padded_grad, packed_grad, rtol=1e-4, atol=1e-6)


def test_every_variant_takes_the_same_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr("nmm_serve.train.speed_variants.gemm_rate", lambda device, dtype: 1e9)
    monkeypatch.setattr("nmm_serve.train.loop.gemm_rate", lambda device, dtype: 1e9)
    parents = {name: Parent() for name in ("dense", "hf_padded", "hf_packed")}
    config = speed_config(**SIZE, variant="dense")
    our_steps(parents["dense"], config, tmp_path)
    for name in ("hf_padded", "hf_packed"):
        hugging_face_steps(parents[name], config, tmp_path / name, 2, padded=name == "hf_padded")
    about, *_ = zip(*(p.answers for p in parents.values()), strict=True)
    assert len({(a["parameters"], a["active"]) for a in about}) == 1
    for number in (1, 2):
        steps = {name: p.answers[number] for name, p in parents.items()}
        assert len({(s["tokens"], s["flops"]) for s in steps.values()}) == 1
        assert steps["hf_packed"]["padding"] == steps["dense"]["padding"] < steps["hf_padded"]["padding"]
        assert all(s["seconds"] > 0 and s["gemm_flops"] > 0 for s in steps.values())
    speed.check_losses({name: p.answers[1]["loss"] for name, p in parents.items()})


def test_variants_that_differ_are_refused():
    with pytest.raises(TrainingError, match=r"do not compute the same.*'hf_padded': 2\.1"):
        speed.check_losses({"dense": 2.0, "hf_padded": 2.1})
    speed.check_losses({"dense": 2.0, "moe": 2.1})


def step(seconds, tokens=100, flops=1000, rate=100.0):
    return {"seconds": seconds, "tokens": tokens, "flops": flops, "gemm_flops": rate}


def test_ratios_are_of_a_round_and_held_against_their_bars():
    steps = {
        "dense": [step(10.0), step(20.0), step(40.0)],
        "hf_padded": [step(20.0), step(40.0), step(80.0)],
        "moe": [step(13.0), step(26.0), step(52.0)],
    }
    found = {row["name"]: row for row in speed.comparisons(steps)}
    assert found.keys() == {"x_hf_padded", "gemm_share", "moe_x_dense"}
    assert found["x_hf_padded"]["value"] == 2.0
    assert found["x_hf_padded"]["interval"]["low"] == found["x_hf_padded"]["interval"]["high"] == 2.0
    assert found["x_hf_padded"]["reached"] is True
    assert found["gemm_share"]["value"] == pytest.approx(0.5)
    assert found["gemm_share"]["reached"] is False
    assert found["moe_x_dense"]["value"] == pytest.approx(1.3)
    assert found["moe_x_dense"]["reached"] is False


def test_interval_of_the_median_is_the_bootstraps():
    values = np.random.default_rng(1).normal(10, 1, 40)
    found = speed.summary(values)
    draws = np.median(np.random.default_rng(5).choice(values, (20000, 40)), axis=1)
    assert found["value"] == np.median(values)
    bounds = [found["interval"]["low"], found["interval"]["high"]]
    assert bounds == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=0.1)
    assert speed.summary([3.0])["interval"] is None


def test_unknown_preset_starts_no_process(monkeypatch):
    monkeypatch.setattr(speed, "_Child", None)
    with pytest.raises(ConfigError, match="unknown model preset 'smal'"):
        speed.measure("smal", threads=1, rows=1, context_length=64, rounds=1)


class Child:
    """A variant's process, without one: what `receive` gives has come from "ready" or a turn."""

    def __init__(self, name, setup):
        self.answers = [{"parameters": 1, "active": 1}]

    def receive(self):
        assert self.answers, "nothing was sent: a process would be waited for without end"
        return self.answers.pop()

    def ask(self, turn):
        self.answers.append(step(1.0) | {"loss": 1.0, "padding": 0, "data_wait": None} if turn == "step" else {})
        return self.receive()

    def end(self):
        pass


def test_a_variant_named_twice_is_timed_once(monkeypatch):
    monkeypatch.setattr(speed, "_Child", Child)
    monkeypatch.setattr(speed, "SETTLE_S", 0)
    taken = []
    found = speed.measure(
        "atto", ("dense", "moe", "dense"), threads=1, rows=1, context_length=64, rounds=2, progress=taken.append
    )
    assert [row["variant"] for row in found["variants"]] == ["dense", "moe"]
    assert len(taken) == 3 * 2


@pytest.mark.parametrize("padded", [True, False])
def test_without_accelerate_the_extra_to_install_is_named(tmp_path, monkeypatch, padded):
    monkeypatch.setattr("transformers.utils.is_accelerate_available", lambda: False)
    parent = Parent()
    with pytest.raises(TrainingError, match=r"accelerate; run pip install 'nmm-serve\[train\]'"):
        hugging_face_steps(parent, speed_config(**SIZE, variant="hf_padded"), tmp_path, 2, padded=padded)
    assert parent.answers == []


@pytest.mark.slow
def test_command_writes_a_record(tmp_path):
    path = tmp_path / "speed.json"
    options = ["--preset", "atto", "--rows", "2", "--rounds", "2", "--threads", "1", "-o", str(path)]
    options += ["--variant", "dense", "--variant", "hf_padded"]
    result = CliRunner().invoke(main, ["speed", *options])
    assert result.exit_code == 0, result.output
    section = json.loads(path.read_text())["tasks"]["train_speed"]
    assert [row["variant"] for row in section["variants"]] == ["dense", "hf_padded"]
    assert all(row["peak_bytes"] > row["libraries_bytes"] > 0 for row in section["variants"])
    assert {row["name"] for row in section["comparisons"]} == {"x_hf_padded", "gemm_share"}
    assert "x_hf_padded" in result.output
