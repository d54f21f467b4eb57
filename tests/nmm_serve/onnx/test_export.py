import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from exported import checkpoint_of, exported
from tiny_checkpoint import make_checkpoint

pytest.importorskip("onnxruntime")

import onnx

from nmm_serve.checkpoint import checkpoint_hash
from nmm_serve.cli.serve import main
from nmm_serve.engines import open_engine
from nmm_serve.errors import CheckpointError, ConfigError, EngineError
from nmm_serve.evals.records import describe_model
from nmm_serve.onnx import decoder
from nmm_serve.onnx.export import export
from nmm_serve.onnx.manifest import read_manifest
from nmm_serve.onnx.quantize import BLOCK, per_block, per_channel_int8


def test_manifest_says_what_was_exported():
    manifest = read_manifest(exported("late-moe"))
    assert (manifest.family, manifest.quantization) == ("late-moe", "none")
    assert manifest.checkpoint_sha256 == checkpoint_hash(checkpoint_of("late-moe"))
    assert manifest.check["greedy_equal"] == manifest.check["positions"] == 16 * manifest.check["prompts"]
    assert manifest.check["images"] >= 4
    assert manifest.check["max_logprob_diff"] < 1e-3


def test_a_model_that_differs_is_not_written(tmp_path, monkeypatch):
    right = decoder.rope
    monkeypatch.setattr(decoder, "rope", lambda config: tuple(np.roll(table, 1, axis=0) for table in right(config)))
    with pytest.raises(EngineError, match="differs from torch: greedy tokens equal at"):
        export(checkpoint_of("early"), tmp_path / "out")
    monkeypatch.setattr(
        "nmm_serve.onnx.graph.per_block", lambda w, bits: (per_block(w, bits)[0][:, ::-1], per_block(w, bits)[1])
    )
    with pytest.raises(EngineError, match="int4 model differs from torch"):
        export(checkpoint_of("early"), tmp_path / "out", "int4")
    assert list(tmp_path.iterdir()) == []


def test_images_of_their_own_size_are_refused(tmp_path):
    checkpoint = make_checkpoint(tmp_path / "native", native_resolution=True)
    with pytest.raises(EngineError, match="native_resolution.*serve it with vllm or torch"):
        export(checkpoint, tmp_path / "out", "none")


def test_only_an_earlier_export_is_replaced(tmp_path):
    (tmp_path / "precious").mkdir()
    with pytest.raises(ConfigError, match="is not an exported model; choose a directory"):
        export(checkpoint_of("early"), tmp_path / "precious")
    with pytest.raises(ConfigError, match="unknown quantisation 'int3'"):
        export(checkpoint_of("early"), tmp_path / "out", "int3")
    with pytest.raises(CheckpointError, match="is an exported model, not a checkpoint"):
        export(exported("early"), tmp_path / "out")


def test_engines_by_directory():
    path = str(exported("early"))
    with pytest.raises(EngineError, match="which engine 'torch' cannot read; use engine 'onnx'"):
        open_engine(path, "torch")
    with pytest.raises(CheckpointError, match=r"lacks onnx.json; make one with: nmm-serve export"):
        open_engine(str(checkpoint_of("early")), "onnx")


@pytest.fixture
def broken(tmp_path):
    return shutil.copytree(exported("early"), tmp_path / "broken")


def test_damaged_directories_are_named(broken):
    def edit(**changes):
        manifest = json.loads((exported("early") / "onnx.json").read_text()) | changes
        (broken / "onnx.json").write_text(json.dumps({k: v for k, v in manifest.items() if v != "gone"}))

    for changes, told in (
        ({"num_layers": 10**12}, "num_layers must be a positive number"),
        ({"head_dim": True}, "head_dim must be a positive number"),
        ({"format": 99}, "export format 99, this version reads 1"),
        ({"family": "gone"}, "missing or unknown entries: family"),
    ):
        edit(**changes)
        with pytest.raises(CheckpointError, match=told):
            open_engine(str(broken))
    edit()
    (broken / "decoder.onnx").write_bytes((broken / "decoder.onnx").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"decoder.onnx cannot be loaded"):
        open_engine(str(broken))
    (broken / "image.onnx").unlink()
    with pytest.raises(CheckpointError, match=r"lacks image.onnx"):
        open_engine(str(broken))


def test_weights_outside_the_directory_are_refused(broken):
    secret = broken.parent / "secret.data"
    shutil.copy(broken / "decoder.onnx.data", secret)
    model = onnx.load(broken / "decoder.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../secret.data"
    (broken / "decoder.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        open_engine(str(broken))


def test_records_name_an_exported_model():
    found = describe_model(str(exported("early")))
    assert found["parameters"] == read_manifest(exported("early")).parameters
    assert found["hash"] not in (None, describe_model(str(exported("early", "int8")))["hash"])


def test_command(tmp_path):
    result = CliRunner().invoke(
        main, ["export", str(checkpoint_of("early")), "--onnx", str(tmp_path / "out"), "--quant", "int8"]
    )
    assert result.exit_code == 0, result.output
    assert "(early, " in result.stdout
    assert (tmp_path / "out/run.json").is_file()
    answer = CliRunner().invoke(main, ["generate", str(tmp_path / "out"), "--prompt", "what", "--json"])
    assert json.loads(answer.stdout)["engine"]["dtype"] == "int8"


@pytest.mark.parametrize(("rows", "columns"), [(3, 32), (5, 70)])
def test_quantised_weights_are_within_half_a_step(rows, columns):
    weight_OI = np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32)
    weight_OI[1] = 0
    code_IO, scale_O = per_channel_int8(weight_OI)
    assert np.abs(code_IO.T * scale_O[:, None] - weight_OI).max() <= scale_O.max() / 2 + 1e-6
    codes, scale_ON = per_block(weight_OI, 4)
    code_ONB = np.stack((codes & 15, codes >> 4), -1).reshape(rows, -1, BLOCK).astype(int) - 8
    back_OI = (code_ONB * scale_ON[..., None]).reshape(rows, -1)[:, :columns]
    step = np.abs(scale_ON).max()
    # the end of the range that is not the largest weight's is one step short
    assert np.abs(back_OI - weight_OI).max() <= step + 1e-6
    assert np.abs(back_OI - weight_OI).mean() < step / 3
