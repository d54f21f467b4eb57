import errno
import json
import shutil

import pytest
import torch
from parity_checkpoint import FAMILIES
from safetensors.torch import load_file, save_file
from tiny_checkpoint import make_checkpoint

from nmm_serve.checkpoint import (
    atomic_directory,
    check_checkpoint,
    checkpoint_hash,
    load_config,
    load_model,
    load_processor,
    read_run,
)
from nmm_serve.config import NMMConfig
from nmm_serve.errors import CheckpointError


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("good") / "ckpt")


@pytest.fixture
def copy(good, tmp_path):
    return shutil.copytree(good, tmp_path / "ckpt")


def edit(path, **changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_loaded(tmp_path, family):
    path = make_checkpoint(tmp_path / "ckpt", **FAMILIES[family])
    first, second = load_model(path), load_model(path)
    ids = torch.arange(10, 30)[None]
    assert torch.equal(first(ids).logits, second(ids).logits)
    assert load_config(path).family == first.config.family == (family if family != "tied" else "early")
    assert read_run(path) == {"tokens": 1000, "loss": 2.5}
    assert not list(path.glob("*.bin")) + list(path.glob("*.pt"))


def test_directories_that_are_no_checkpoint(tmp_path, copy):
    with pytest.raises(CheckpointError, match="does not exist"):
        check_checkpoint(tmp_path / "none")
    with pytest.raises(CheckpointError, match="is a file"):
        check_checkpoint(copy / "config.json")
    with pytest.raises(CheckpointError, match=r"lacks config\.json, tokenizer\.json"):
        check_checkpoint(tmp_path)
    (tmp_path / "run/final").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=f"it is a run's folder: give {tmp_path}/run/final"):
        check_checkpoint(tmp_path / "run")
    edit(copy / "config.json", model_type="llama")
    with pytest.raises(CheckpointError, match="holds a 'llama' model"):
        check_checkpoint(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        check_checkpoint(copy)


def test_shards_of_several_processes_are_named(copy):
    (copy / "model.safetensors").unlink()
    (copy / "training/shards").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"no model\.safetensors: several processes .* in shards"):
        check_checkpoint(copy)


def test_pickles_are_never_loaded(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle"):
        load_model(copy)


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": -64}, {"hidden_size": "big"}, {"num_attention_heads": 3}, {"head_dim": 48}, {"patch_size": 7},
     {"num_experts": 2, "num_experts_per_tok": 3}, {"hidden_size": True},
     {"router": "hash"}, {"router": "modality", "num_experts": 4}],
)  # fmt: skip
def test_impossible_configs_are_one_line(copy, changes):
    edit(copy / "config.json", **changes)
    with pytest.raises(CheckpointError, match=r"config\.json is not valid: \S+") as error:
        load_config(copy)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
        {"rope_scaling": {"type": "yarn", "factor": 2.0}},
    ],
)
def test_rope_settings_that_nobody_reads_are_refused(copy, changes):
    edit(copy / "config.json", **changes)
    with pytest.raises(CheckpointError, match=r"rope_(parameters|scaling) has .* give .* as rope_theta"):
        load_config(copy)


def test_weights_tied_in_the_config_alone_are_refused(copy):
    edit(copy / "config.json", tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings is true, but .* lm_head\.weight; set it to false"):
        load_config(copy)


def test_rope_settings_may_say_the_same(copy):
    edit(copy / "config.json", rope_theta=500.0, rope_scaling=None)
    edit(copy / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    config = load_config(copy)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 500.0}  # as vLLM does
    assert NMMConfig.from_dict(config.to_dict()).rope_theta == 500.0


def test_a_model_may_have_several_ends(copy):
    edit(copy / "config.json", eos_token_id=[7, 2])
    assert load_processor(copy).tokenizer.eos_token_id == 2
    edit(copy / "config.json", eos_token_id=[7, 8])
    with pytest.raises(CheckpointError, match=r"eos_token_id is 2 in the tokenizer but \[7, 8\]"):
        load_processor(copy)


@pytest.mark.parametrize("text", ["{", "[1]", "\x00"])
def test_a_damaged_record_is_named(copy, text):
    (copy / "run.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"run\.json is not a JSON object"):
        read_run(copy)


def test_another_models_tokenizer_is_refused(copy, tmp_path):
    edit(copy / "config.json", eos_token_id=7)
    with pytest.raises(CheckpointError, match="tokenizer and model do not match: eos_token_id is 2"):
        load_processor(copy)


def test_processor_of_other_patches_is_refused(copy):
    values = json.loads((copy / "processor_config.json").read_text())
    values["image_processor"]["patch_size"] = 16
    (copy / "processor_config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="patch_size differs"):
        load_processor(copy)


@pytest.mark.parametrize("damage", ["drop", "add", "shape"])
def test_weights_must_fit_exactly(copy, damage):
    file = copy / "model.safetensors"
    tensors = load_file(file)
    if damage == "drop":
        del tensors["model.norm.weight"]
    elif damage == "add":
        tensors["model.surprise"] = torch.zeros(2)
    else:
        tensors["lm_head.weight"] = torch.zeros(3, 3)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_model(copy)


def test_truncated_weights_are_refused(copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_model(copy)


def test_a_config_cannot_bring_code(copy):
    edit(copy / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"})
    (copy / "evil.py").write_text("raise SystemExit('ran foreign code')")
    load_model(copy)


def half_written(path):
    path.write_text("2")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_directory_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "out"
    with atomic_directory(target) as staging:
        (staging / "a").write_text("1")
        assert not target.exists()
    with pytest.raises(OSError, match="No space"), atomic_directory(target) as staging:
        half_written(staging / "a")
    assert (target / "a").read_text() == "1"
    with atomic_directory(target) as staging:
        (staging / "b").write_text("3")
    assert [p.name for p in target.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "nothing is left behind"


def test_hash_follows_what_the_model_says(copy):
    before = checkpoint_hash(copy)
    (copy / "run.json").write_text("{}")
    assert checkpoint_hash(copy) == before
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert checkpoint_hash(copy) != before


def test_full_disk_is_told_as_one(tmp_path):
    """safetensors reports it as an error of its own, which no handler of OSError would see."""
    with pytest.raises(OSError, match="No space left") as error, atomic_directory(tmp_path / "out"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    assert error.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())
