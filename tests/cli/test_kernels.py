import json

import pytest
import torch
from click.testing import CliRunner

from nmm_serve.cli import kernels as command
from nmm_serve.cli.serve import main
from nmm_serve.kernels.bench import plan, roofline
from nmm_serve.vllm_plugin import moe_choice


def main_exit(capsys, *args):
    with pytest.raises(SystemExit) as ended:
        main(["kernels", "bench", *map(str, args)])
    return ended.value.code, capsys.readouterr()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_and_exit_1(capsys):
    code, said = main_exit(capsys)
    assert code == 1
    assert said.err.startswith("Error: no GPU")
    assert len(said.err.splitlines()) == 1
    assert "--device cpu" in said.err


def test_usage_errors_exit_2(capsys, tmp_path):
    code, said = main_exit(capsys, "--device", "cpu", "--shapes", "A,Q")
    assert code == 2
    assert "'Q' is none of A, B" in said.err
    assert main_exit(capsys, "--regime", "sleep")[0] == 2
    assert main_exit(capsys, "--minutes", "0")[0] == 2
    assert main_exit(capsys, "--tune", "--device", "cpu")[0] == 2
    code, said = main_exit(capsys, "--device", "cpu", "-o", tmp_path)
    assert code == 1
    assert "is a folder" in said.err


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """Two cells measured on this CPU."""
    path = tmp_path_factory.mktemp("bench") / "record.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "TINY_REGIMES", {"decode": (2,), "train": (8,)})
        patch.setattr(plan, "ROUTINGS", ("multinomial",))
        patch.setattr(roofline, "measure", lambda device, dtype: roofline.Roofline(1e9, 1e10))
        result = CliRunner().invoke(
            main, ["kernels", "bench", "--device", "cpu", "--shapes", "A", "-o", str(path)], catch_exceptions=False
        )
    assert result.exit_code == 0, result.output
    return json.loads(path.read_text()), result.stdout


def test_an_interrupted_run_leaves_its_record(monkeypatch, tmp_path):
    def interrupted(*args, keep, **options):
        keep({"finished": False, "cells": ["first"]})
        raise KeyboardInterrupt

    monkeypatch.setattr("nmm_serve.kernels.bench.run.run", interrupted)
    CliRunner().invoke(main, ["kernels", "bench", "--device", "cpu", "-o", str(tmp_path / "record.json")])
    document = json.loads((tmp_path / "record.json").read_text())
    assert (document["format"], document["finished"], document["cells"]) == (command.FORMAT, False, ["first"])


def test_no_memory_even_for_the_roofline_is_an_error(monkeypatch, capsys):
    def full(device, dtype):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(roofline, "measure", full)
    code, said = main_exit(capsys, "--device", "cpu")
    assert code == 1
    assert "has too little free memory to be measured" in said.err


def test_record_has_what_a_reader_needs(record):
    document, _ = record
    assert document["finished"] is True
    assert document["format"] == command.FORMAT
    assert document["device"]["kind"] == "cpu"
    assert document["environment"]["packages"]["torch"]
    assert {(c["regime"], c["tokens"], c["top_k"]) for c in document["cells"]} == {
        ("decode", 2, 1), ("decode", 2, 2), ("train", 8, 1), ("train", 8, 2),
    }  # fmt: skip
    assert document["not_measured"] == []
    for cell in document["cells"]:
        states = {result["peer"]: result["reason"] for result in cell["results"]}
        assert states["nmm-serve"] is states["loop"] is states["grouped_mm"] is None
        assert states["Liger"] == "needs a GPU"
        mine = cell["results"][0]
        assert mine["error"] < 1e-5
        low, high = mine["eager"]["quartiles_s"]
        assert 0 < low <= mine["eager"]["median_s"] <= high
        assert cell["ratio_to_best_peer"] > 0
    assert document["peers"]["DeepGEMM"] == "needs a GPU"
    assert document["geometric_mean"]["all"] > 0
    assert {"seconds", "of_roofline", "cold", "check"} <= document["definitions"].keys()


def test_table_shows_every_cell_and_names_who_is_absent(record):
    _, shown = record
    for label in ("A decode T=2 k=2 multinomial", "A train T=8 k=1 multinomial", "geometric mean", "SonicMoE: needs a"):
        assert label in shown


def test_table_of_a_gpu_record_shows_misses(capsys):
    """Figures made up for the test."""
    timed = {"n": 9, "median_s": 2e-5, "quartiles_s": [1.9e-5, 2.5e-5], "of_roofline": 0.25, "tflop_per_s": 1.0,
             "gb_per_s": 1.0}  # fmt: skip
    common = {"is_bound": False, "error": 1e-3, "peak_bytes": 5}
    cell = {
        "shape": "A", "regime": "decode", "tokens": 1, "top_k": 2, "routing": "multinomial",
        "roofline": {"seconds": 5e-6}, "best_peer": "Liger", "ratio_to_best_peer": 0.5,
        "results": [
            {"peer": "nmm-serve", "reason": None, "graph": timed, **common},
            {"peer": "Liger", "reason": None, "graph": timed | {"median_s": 1e-5}, **common},
            {"peer": "SonicMoE", "reason": "wrong: relative error of output 9.0e-01 is over 2e-02", **common},
        ],
    }  # fmt: skip
    command.show(
        {
            "device": {"name": "a GPU"}, "dtype": "bfloat16", "roofline": {"bandwidth": 4e12, "flop_rate": 7e14},
            "cells": [cell], "geometric_mean": {"decode": 0.5, "all": 0.5}, "peers": {"loop": "absent (ImportError)"},
            "not_measured": ["D train T=65536"],
        }
    )  # fmt: skip
    shown = capsys.readouterr().out
    for part in ("a GPU, bfloat16: 4 TB/s and 700 TFLOP/s measured", "20 [19, 25]", "25.0%", "Liger", "10", "0.5",
                 "SonicMoE wrong: relative error", "loop: absent", "Not measured, 1: D train T=65536"):  # fmt: skip
        assert part in shown


def choose(monkeypatch, tmp_path, *documents):
    """Run `kernels choose` on a table of its own."""
    table = tmp_path / "table.json"
    table.write_text('{"rows": []}')
    monkeypatch.setattr(moe_choice, "TABLE", table)
    paths = []
    for index, document in enumerate(documents):
        paths.append(str(tmp_path / f"{index}.json"))
        (tmp_path / f"{index}.json").write_text(json.dumps(document))
    return CliRunner().invoke(main, ["kernels", "choose", *paths]), json.loads(table.read_text())["rows"]


def test_choose_writes_the_table_that_vllm_reads(monkeypatch, tmp_path):
    """Figures made up for the test."""
    cell = {
        "regime": "decode", "hidden": 512, "intermediate": 1024, "experts": 8, "top_k": 2,
        "results": [{"peer": moe_choice.OURS, "graph": {"median_s": 1e-5}},
                    {"peer": moe_choice.THEIRS, "graph": {"median_s": 3e-5}}],
    }  # fmt: skip
    document = {"format": command.FORMAT, "device": {"name": "GPU X"}, "dtype": "bfloat16", "created": "2026-01-01",
                "cells": [cell]}  # fmt: skip
    prefill = document | {"cells": [cell | {"regime": "prefill"}]}  # measured on another day
    result, rows = choose(monkeypatch, tmp_path, document, prefill)
    assert result.exit_code == 0, result.output
    assert "GPU X bfloat16 512 1024 8 2" in result.stdout
    layer = moe_choice.ExpertsLayer("GPU X", "bfloat16", 512, 1024, 8, 2)
    assert [row["faster"] for row in rows] == [True]
    assert moe_choice.choose(layer, table=tmp_path / "table.json") == "nmm-serve"


@pytest.mark.parametrize(
    ("document", "told"),
    [
        ({"format": "other"}, "is no record of `nmm-serve kernels bench -o`"),
        ({"format": command.FORMAT, "cells": [{}]}, "is a damaged record"),
        ({"format": command.FORMAT, "cells": []}, "has no cell that nmm-serve and vLLM fused_moe were both timed in"),
    ],
)
def test_choose_refuses_what_says_nothing(monkeypatch, tmp_path, document, told):
    result, rows = choose(monkeypatch, tmp_path, document)
    assert result.exit_code == 1
    assert told in result.stderr
    assert rows == []
