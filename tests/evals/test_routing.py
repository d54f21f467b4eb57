"""Routing numbers against counts that can be checked by hand, and against a plain loop over a real model's tokens."""

import json
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pytest
import torch
from eval_fakes import write_dataset
from exported import exported
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from tiny_checkpoint import make_checkpoint

from nmm_serve.chat import ImageSlot, Special
from nmm_serve.engines.torch import TorchEngine
from nmm_serve.errors import CheckpointError, DataError
from nmm_serve.evals.routing import check_sparse, from_log, layer_numbers, measure, summarise
from nmm_serve.routing import count_routed, modality_groups
from nmm_serve.train.data.documents import Document
from nmm_serve.train.data.encoding import encode_document


def numbers(image, text):
    values = layer_numbers(np.array([[[image, text]]]))
    return {name: value[0, 0] for name, value in values.items()}


def test_every_expert_has_its_modality():
    got = numbers([10, 10, 0, 0], [0, 0, 5, 5])
    assert got["specialisation"] == 1
    assert got["image_skew"] == got["text_skew"] == 0.25
    assert got["max_over_mean"] == pytest.approx(10 / 7.5)


def test_a_router_that_ignores_modality_is_at_the_floor():
    got = numbers([30, 30, 30], [10, 10, 10])
    entropy = -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25))
    assert got["specialisation"] == pytest.approx(1 - entropy)
    assert (got["image_skew"], got["max_over_mean"], got["load_entropy"]) == pytest.approx((0, 1, 1))
    section = summarise(np.array([[[[30, 30, 30], [10, 10, 10]]]]), unit=None)
    assert section["specialisation_floor"] == pytest.approx(1 - entropy)


def test_an_expert_without_tokens_is_left_out_and_named():
    assert numbers([8, 0], [0, 0])["specialisation"] == 1
    got = numbers([5, 0, 5], [5, 0, 5])
    assert got["specialisation"] == 0
    assert got["max_over_mean"] == pytest.approx(1.5)
    (layer,) = summarise(np.array([[[[5, 0, 5], [5, 0, 5]]]]), unit=None)["layers"]
    assert layer["dead"] == [1]


def test_a_modality_without_tokens_has_no_skew():
    section = summarise(np.array([[[[0, 0], [3, 1]]]]), unit=None)
    assert section["overall"]["image_skew"] == {"value": None, "interval": None}
    assert section["overall"]["text_skew"]["value"] == pytest.approx(0.25)


@given(arrays(np.int64, (5, 2, 2, 4), elements=st.integers(0, 50)).filter(lambda a: a.sum((0, 3)).all()))
def test_numbers_stay_in_their_bounds(counts_CLME):
    section = summarise(counts_CLME, unit="image", seed=1)
    for numbers in (*section["layers"], section["overall"]):
        for name, low, high in (
            ("specialisation", 0, 1), ("image_skew", 0, 0.375), ("text_skew", 0, 0.375), ("max_over_mean", 1, 4),
            ("load_entropy", 0, 1),
        ):  # fmt: skip
            assert low - 1e-9 <= numbers[name]["value"] <= high + 1e-9
            assert numbers[name]["interval"]["low"] <= numbers[name]["interval"]["high"]
    json.dumps(section, allow_nan=False)


def test_the_interval_covers_the_choice_of_images():
    """Clusters that are all alike have no spread; clusters that are not, do."""
    alike = np.tile(np.array([[[[8, 2], [1, 9]]]]), (20, 1, 1, 1))
    interval = summarise(alike, unit="image")["overall"]["specialisation"]["interval"]
    assert interval["low"] == pytest.approx(interval["high"])
    mixed = np.where(np.arange(20)[:, None, None, None] % 2, alike, alike[..., ::-1])
    interval = summarise(mixed, unit="image")["overall"]["specialisation"]["interval"]
    assert interval["high"] - interval["low"] > 0.01
    assert (interval["unit"], interval["clusters"]) == ("image", 20)


@dataclass
class Doc:
    parts: list
    images: list = field(default_factory=list)


@dataclass
class Read:
    name: str
    read: object
    source: str = "vqa"


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    path = make_checkpoint(tmp_path_factory.mktemp("moe") / "ckpt", num_experts=4, num_experts_per_tok=2)
    return TorchEngine(str(path))


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    docs = []
    for i in range(5):
        path = folder / f"{i}.png"
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 30 + 20 * i, 3), dtype=np.uint8)).save(path)
        parts = [("system", Special("<|bos|>")), ("user", ImageSlot()), ("user", "what is the colour ?" * (i + 1))]
        docs.append(Read(f"doc{i}", partial(Doc, parts, [path])))
    docs.append(Read("plain", partial(Doc, [("assistant", "describe the image .")]), "text"))
    return docs


@pytest.mark.parametrize("batch_size", [1, 4])
def test_counts_are_those_of_a_loop_over_tokens(engine, documents, batch_size):
    section = measure(engine, documents, batch_size=batch_size)
    expected = np.zeros((2, 2, 4), dtype=int)
    for reading in documents:
        document = reading.read()
        prompt, _ = engine.processor.encode_parts(
            [part for _, part in document.parts], [Image.open(p) for p in document.images]
        )
        with torch.no_grad():
            output = engine.network(**engine.processor.collate([prompt]), output_router_logits=True)
        for layer, logits_NE in enumerate(output.router_logits):
            for token, logits_E in zip(prompt.input_ids, logits_NE, strict=True):
                modality = 0 if token == engine.network.config.image_token_id else 1
                for expert in logits_E.topk(2).indices.tolist():
                    expected[layer, modality, expert] += 1
    assert [[layer["image_tokens"], layer["text_tokens"]] for layer in section["layers"]] == expected.tolist()
    assert section["n"] == 6
    assert section["images"] == 5
    assert section["by_source"]["text"]["documents"] == 1
    assert section["overall"]["specialisation"]["interval"]["clusters"] == 6
    assert section["complete"]
    assert not measure(engine, documents[:2], total=6)["complete"]


def test_chats_about_one_image_are_drawn_together_within_a_source_too(engine, documents):
    section = measure(engine, [*documents[:3], *documents[:3]])
    interval = section["by_source"]["vqa"]["specialisation"]["interval"]
    assert (section["by_source"]["vqa"]["documents"], interval["clusters"], interval["unit"]) == (6, 3, "image")


def test_a_document_that_fails_is_named_and_gives_no_numbers(engine, documents):
    def broken():
        raise DataError("its line is not JSON")

    read = documents[0].read()
    too_long = Read("long", partial(Doc, [*read.parts, ("assistant", "red " * 2000)], read.images))
    section = measure(engine, [*documents, Read("bad:7", broken), too_long])
    assert section["failed"] == 2
    assert section["errors"][0] == {"id": "bad:7", "error": "its line is not JSON"}
    assert "over the model's context of 512" in section["errors"][1]["error"]
    assert section["layers"] is None
    assert section["overall"] is None
    assert section["answered_only"]["n"] == 6


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_a_text_longer_than_the_context_is_read_in_pieces_as_in_training(engine, documents, batch_size):
    long = [("assistant", "red green " * 700)]
    document = Document(long, "text", "long")
    pieces = encode_document(document, engine.processor, objective="pretrain", context_length=engine.context_length)
    assert len(pieces) > 2
    told = []
    readings = [documents[0], Read("long", partial(Doc, long), "text"), *documents[1:]]
    section = measure(engine, readings, batch_size=batch_size, progress=told.append)
    alone = measure(engine, documents)
    for layer, without in zip(section["layers"], alone["layers"], strict=True):
        assert layer["image_tokens"] == without["image_tokens"]
        assert sum(layer["text_tokens"]) - sum(without["text_tokens"]) == 2 * sum(map(len, pieces))
    assert (section["failed"], section["by_source"]["text"]["documents"]) == (0, 2)
    assert section["overall"]["specialisation"]["interval"]["clusters"] == 7
    assert sum(told) == 7


def test_padding_is_not_counted():
    groups = modality_groups(torch.tensor([[True, False, False]]), torch.tensor([[1, 1, 0]]))
    assert groups.tolist() == [0, 1, -1]
    logits = torch.tensor([[3.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    assert count_routed([logits], groups, 2, 1).tolist() == [[[1, 0], [0, 1]]]


def test_a_dense_checkpoint_is_told(tmp_path):
    with pytest.raises(CheckpointError, match="dense model .family 'early'., so it routes nothing"):
        check_sparse(str(make_checkpoint(tmp_path / "dense")))


def log_event(step, image, text):
    return json.dumps({"event": "train", "step": step, "tokens": 10 * step, "routed": {"image": image, "text": text}})


def test_a_training_log(tmp_path):
    lines = [log_event(step, [[step, 0]], [[0, step]]) for step in range(1, 16)]
    lines.insert(3, json.dumps({"event": "validation", "step": 3}))
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + '\n{"event": "tr')
    section = from_log(tmp_path)
    assert section["n"] == 15
    assert section["pooled_steps"] == list(range(6, 16))
    assert section["overall"]["specialisation"] == {"value": 1.0, "interval": None}
    assert section["layers"][0]["image_tokens"] == [sum(range(6, 16)), 0]
    assert [h["step"] for h in section["history"]] == list(range(1, 16))
    assert section["history"][0]["specialisation"] == [1.0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ('{"event": "train", "step": 1}\n', "tells nothing of experts"),
        ("a\nb\n", "line 1 is not JSON"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_log_that_cannot_be_used(tmp_path, content, message):
    if content is not None:
        (tmp_path / "log.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        from_log(tmp_path)


def test_from_the_command_line(engine, tmp_path, monkeypatch):
    from click.testing import CliRunner

    from nmm_serve.cli.eval import main

    monkeypatch.chdir(tmp_path)
    data = write_dataset(tmp_path / "data", images=3)

    def run(*args):
        return CliRunner().invoke(main, ["routing", *map(str, args)])

    done = run("--model", engine.model, "--data", data, "--json")
    assert done.exit_code == 0, done.stderr
    section = json.loads(done.stdout)["tasks"]["routing"]
    assert set(section["by_source"]) == {"caption", "vqa"}
    assert section["n"] == 6
    table = run("--model", engine.model, "--data", data, "--limit", 1)
    assert "specialisation" in table.stdout
    assert "not final" in table.stderr
    (tmp_path / "t.jsonl").write_text('{"text": "the red circle"}\n{"text": 3}\n')
    broken = run("--model", engine.model, "--data", "t.jsonl", "-o", "t.json")
    assert broken.exit_code == 1
    assert "t.jsonl:t.jsonl:2: expected an object with text under 'text'" in broken.stderr
    (tmp_path / "log.jsonl").write_text(log_event(1, [[1, 0]], [[0, 1]]) + "\n")
    assert run("--log", "log.jsonl", "--name", "run").exit_code == 0
    assert run("--model", engine.model).exit_code == 2
    assert "holds no data of split 'test'" in run("--model", engine.model, "--data", data, "--split", "test").stderr


def test_all_measures_routing_too_and_only_of_experts(engine, tmp_path, monkeypatch):
    pytest.importorskip("pycocoevalcap", reason="needs the extra `evals`")
    from click.testing import CliRunner

    from nmm_serve.cli.eval import main
    from nmm_serve.evals import caption
    from nmm_serve.evals.tokenizer import FallbackTokenizer

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(caption, "open_tokenizer", FallbackTokenizer)
    data = write_dataset(tmp_path / "data", images=3)
    dense = make_checkpoint(tmp_path / "dense")
    quick = ["--requests", 1, "--warmup", 0, "--concurrency", 1, "--output-tokens", 2, "--json", "--limit", 2]
    tasks, said = {}, {}
    for model in (engine.model, dense, exported("moe")):
        done = CliRunner().invoke(main, ["all", "--model", str(model), "--data", str(data), *map(str, quick)])
        assert done.exit_code == 0, done.stderr
        tasks[str(model)], said[str(model)] = json.loads(done.stdout)["tasks"], done.stderr
    assert tasks[engine.model]["routing"]["by_source"].keys() == {"caption", "vqa"}
    assert tasks[engine.model]["routing"]["n"] == 4
    assert not tasks[engine.model]["routing"]["complete"]
    assert set(tasks[engine.model]) - set(tasks[str(dense)]) == {"routing"}
    assert set(tasks[str(dense)]) == set(tasks[str(exported("moe"))])
    assert "routing is left out: an exported model" in said[str(exported("moe"))]
    assert "routing" not in said[str(dense)]
