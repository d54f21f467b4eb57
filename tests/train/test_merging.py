import json

import pytest
import torch
from tiny_checkpoint import make_checkpoint
from tiny_training import TINY

from nmm_serve.checkpoint import load_model, read_run
from nmm_serve.errors import CheckpointError, ConfigError
from nmm_serve.evals.loss_path import loss_path
from nmm_serve.train.config import config_from
from nmm_serve.train.merging import interpolate, merge, training_config

CONFIG = TINY | {"data": TINY["data"] | {"validation_documents": 2}}


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """Two checkpoints of one architecture, and a third one far away."""
    folder = tmp_path_factory.mktemp("ends")
    paths = [make_checkpoint(folder / name, tie_word_embeddings=True) for name in "abc"]
    for seed, path in enumerate(paths[1:], 1):
        model = load_model(path)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
        model.save_pretrained(path)
    return paths


def weights(path):
    return load_model(path).state_dict()


def test_the_mean_is_the_mean(ends, tmp_path):
    assert merge(ends, tmp_path / "mean") == [pytest.approx(1 / 3)] * 3
    a, b, c, mean = map(weights, [*ends, tmp_path / "mean"])
    for name in mean:
        torch.testing.assert_close(mean[name], (a[name] + b[name] + c[name]) / 3)


def test_weights_are_shares_and_the_record_says_so(ends, tmp_path):
    assert merge(ends[:2], tmp_path / "m", [1, 3]) == [0.25, 0.75]
    a, b, merged = map(weights, [*ends[:2], tmp_path / "m"])
    for name in merged:
        torch.testing.assert_close(merged[name], 0.25 * a[name] + 0.75 * b[name])
    run = read_run(tmp_path / "m")
    assert [(m["path"], m["share"]) for m in run["merged"]] == [(str(ends[0]), 0.25), (str(ends[1]), 0.75)]
    assert all(len(m["sha256"]) == 64 for m in run["merged"])


def test_one_alone_with_all_the_weight_stays_bit_for_bit(ends, tmp_path):
    merge(ends[:2], tmp_path / "m", [0, 1])
    assert all(
        torch.equal(x, y) for x, y in zip(weights(tmp_path / "m").values(), weights(ends[1]).values(), strict=True)
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1], "has 1 values for 2"),
        ([1, -1], "must be 0 or more"),
        ([0, 0], "not all 0"),
        ([1, float("nan")], "0 or more"),
    ],
)
def test_bad_weights(ends, tmp_path, values, message):
    with pytest.raises(ConfigError, match=message):
        merge(ends[:2], tmp_path / "m", values)
    assert not (tmp_path / "m").exists()


def test_other_models_and_tokenizers_are_refused(ends, tmp_path):
    other = make_checkpoint(tmp_path / "other", num_experts=2)
    with pytest.raises(ConfigError, match="are different models .*num_experts: 0 and 2"):
        merge([ends[0], other], tmp_path / "m")
    words = make_checkpoint(tmp_path / "words", tie_word_embeddings=True)
    file = words / "tokenizer.json"
    state = json.loads(file.read_text())
    by_id = {id: token for token, id in state["model"]["vocab"].items()}
    last = max(by_id)
    vocabulary = state["model"]["vocab"]
    vocabulary[by_id[last]], vocabulary[by_id[last - 1]] = last - 1, last
    file.write_text(json.dumps(state))
    with pytest.raises(ConfigError, match="different tokenizers"):
        interpolate(ends[0], words, config_from(CONFIG))
    with pytest.raises(CheckpointError, match="does not exist"):
        merge([ends[0], tmp_path / "none"], tmp_path / "m")
    with pytest.raises(ConfigError, match="exists; choose"):
        merge(ends[:2], ends[2])
    with pytest.raises(ConfigError, match="at least two"):
        merge(ends[:1], tmp_path / "m")


def test_losses_along_the_path(ends, tmp_path):
    config = config_from(CONFIG)
    seen = []
    record = interpolate(ends[0], ends[1], config, 3, lambda number, losses: seen.append(number))
    assert seen == [1, 2, 3]
    assert [p["t"] for p in record["points"]] == [0, 0.5, 1]
    merge(ends[:2], tmp_path / "middle")
    ends_of_it = interpolate(tmp_path / "middle", ends[1], config, 2)["points"]
    assert ends_of_it[0]["losses"]["loss_caption"] == pytest.approx(record["points"][1]["losses"]["loss_caption"])
    assert ends_of_it[1]["losses"] == record["points"][2]["losses"]
    losses = [p["losses"]["loss_avg"] for p in record["points"]]
    assert record["barrier"]["loss_avg"] == pytest.approx(max(0, losses[1] - (losses[0] + losses[2]) / 2))
    assert record["data"]["labels"]["caption"] > 0
    assert loss_path(json.loads(json.dumps(record))).png().startswith(b"\x89PNG")


def test_what_there_is_to_measure_on_must_be_named(ends):
    with pytest.raises(ConfigError, match="validation is empty"):
        interpolate(*ends[:2], config_from(CONFIG | {"data": {"sources": TINY["data"]["sources"]}}))
    with pytest.raises(ConfigError, match="names no training configuration"):
        training_config(ends[0])
    with pytest.raises(ConfigError, match="over that of"):
        interpolate(*ends[:2], config_from(CONFIG | {"context_length": 1024}))
