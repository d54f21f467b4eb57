import json
import math

import pytest
from click.testing import CliRunner

pytest.importorskip("onnxruntime")

from nmm_serve.cli.eval import main


def test_every_variant_is_timed_and_no_model_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr("nmm_serve.evals.onnx_speed.BANDWIDTH_BYTES", 2**22)
    (tmp_path / "models").mkdir()
    command = [
        "onnx-speed",
        "--preset",
        "nano",
        "--family",
        "early",
        "--family",
        "moe",
        "--quant",
        "none",
        "--threads",
        "1",
    ]
    command += [
        "--threads",
        "1",
        "--rounds",
        "2",
        "--prompt-tokens",
        "8",
        "--new-tokens",
        "2",
        "--folder",
        str(tmp_path / "models"),
    ]
    result = CliRunner().invoke(main, [*command, "-o", str(tmp_path / "speed.json")])
    assert result.exit_code == 0, result.output
    section = json.loads((tmp_path / "speed.json").read_text())["tasks"]["onnx_speed"]
    rows = {(row["family"], row["variant"]): row for row in section["variants"]}
    assert set(rows) == {(family, kind) for family in ("early", "moe") for kind in ("torch", "none")}
    for row in rows.values():
        assert row["decode_tokens_per_s"]["value"] > 0
        assert row["decode_tokens_per_s"]["n"] == 2
    assert rows["early", "torch"]["decode_x_torch"]["value"] == 1
    ratio = rows["moe", "none"]["x_dense"]
    assert math.isfinite(ratio["value"])
    assert rows["early", "none"]["x_dense"] is None
    assert "nano, 1 threads" in result.stdout
    assert list((tmp_path / "models").iterdir()) == []
