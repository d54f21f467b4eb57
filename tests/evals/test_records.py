"""What a record says of a model, without loading it."""

import hashlib
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from nmm_serve.errors import CheckpointError
from nmm_serve.evals.records import count_parameters, describe_model, without_password


@pytest.fixture
def checkpoint(tmp_path):
    """The files of a checkpoint, as far as a record looks into them."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "nmm", "hidden_size": 64}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "processor_config.json").write_text("{}")
    save_file({"a": np.zeros((3, 4), np.float32), "b": np.zeros(5, np.float16)}, folder / "model.safetensors")
    return folder


def test_a_checkpoint(checkpoint):
    history = [{"step": i, "tokens": i, "loss": 1.0} for i in range(1001)]
    (checkpoint / "run.json").write_text(json.dumps({"family": "early", "history": history}))
    found = describe_model(str(checkpoint))
    assert found["name"] == "tiny"
    assert found["parameters"] == 17
    assert found["config"]["hidden_size"] == 64
    assert len(found["run"]["history"]) <= 400
    assert found["run"]["history"][-1]["step"] == 1000


def test_the_hash_covers_weights_config_and_tokenizer(checkpoint):
    hashes = {describe_model(str(checkpoint))["hash"]}
    assert all(len(digest) == hashlib.sha256().digest_size * 2 for digest in hashes)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        path = checkpoint / name
        before = path.read_bytes()
        path.write_bytes(before + b" " if name != "config.json" else before.replace(b"64", b"32"))
        if name == "model.safetensors":
            save_file({"a": np.ones((3, 4), np.float32), "b": np.zeros(5, np.float16)}, path)
        hashes.add(describe_model(str(checkpoint))["hash"])
    assert len(hashes) == 4


def test_parameters_of_several_shards(checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00002.safetensors")
    save_file({"c": np.zeros((2, 2), np.float32)}, checkpoint / "model-00002-of-00002.safetensors")
    assert count_parameters(checkpoint) == 21


def test_a_directory_that_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        describe_model(str(tmp_path))


def test_a_url_has_no_hash_and_says_why():
    found = describe_model("http://me:secret@host:8000/v1", "mine")
    assert found["hash"] is None
    assert "URL" in found["hash_reason"]
    assert found["source"] == "http://host:8000/v1"
    assert found["name"] == "mine"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:pw@host/v1", "https://host/v1"),
        ("http://host/a@b", "http://host/a@b"),
        ("plain/path", "plain/path"),
    ],
)
def test_passwords_do_not_reach_a_record(text, shown):
    assert without_password(text) == shown
