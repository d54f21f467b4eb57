"""Models side by side: what is interleaved, the paired ratio, the document and its page."""

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from eval_fakes import failed
from tiny_checkpoint import make_checkpoint

from nmm_serve.cli.eval import main
from nmm_serve.engines.base import Output, Timing
from nmm_serve.errors import DataError
from nmm_serve.evals import stats
from nmm_serve.evals.lab import ledger, partners, versus
from nmm_serve.evals.lab.page import write_page
from nmm_serve.evals.latency import Load
from nmm_serve.sizing import count_params

VISION = {"hidden_size": 64, "num_hidden_layers": 2}


class Fake:
    """Takes `slowness` times what request number n costs anybody: 1 + n % 3 seconds."""

    def __init__(self, name, slowness, log, fails=()):
        self.name, self.slowness, self.log, self.fails = name, slowness, log, fails

    def wave(self, workload, numbers):
        self.log.append((self.name, tuple(numbers)))
        outputs = []
        for n in numbers:
            t = self.slowness * (1 + n % 3)
            timing = Timing(ttft_s=t, e2e_s=3 * t, token_s=(t, 2 * t, 3 * t))
            outputs.append(failed() if n in self.fails else Output(text="", num_tokens=3, timing=timing))
        return outputs, self.slowness


def measure(models, load):
    return versus.interleave(models, versus.cells(load)[0], load, iter(range(100)), sleep=lambda _: None)


def test_models_take_turns_with_the_same_requests():
    log = []
    load = Load(concurrencies=(2,), requests=4, warmup=1, output_tokens=3)
    cell = measure([Fake("a", 1.0, log), Fake("b", 2.0, log)], load)
    waves = [(0, 1), (2, 3), (4, 5)]
    assert log == [(name, wave) for wave in waves for name in "ab"]
    assert [result["n"] for result in cell["results"]] == [4, 4]
    assert [result["warmup"]["requests"] for result in cell["results"]] == [2, 2]


def test_ratio_is_to_the_first_and_paired():
    load = Load(concurrencies=(1,), requests=9, warmup=0, output_tokens=3)
    cell = measure([Fake("a", 1.0, []), Fake("b", 2.0, [])], load)
    assert {(r["model"], r["baseline"]) for r in cell["ratios"]} == {("b", "a")}
    for ratio in cell["ratios"]:
        assert ratio["ratio"] == pytest.approx(2.0)
        # the requests differ threefold, but alike for both: pairing leaves no spread
        assert ratio["interval"]["low"] == pytest.approx(ratio["interval"]["high"]) == pytest.approx(2.0)
        assert ratio["interval"]["unit"] == "round"


def test_only_requests_that_both_answered_make_a_ratio():
    load = Load(concurrencies=(1,), requests=4, warmup=0, output_tokens=3)
    cell = measure([Fake("a", 1.0, [], fails={0}), Fake("b", 2.0, [], fails={1})], load)
    assert {(r["pairs"], r["of"]) for r in cell["ratios"]} == {(2, 4)}
    assert [result["failed"] for result in cell["results"]] == [1, 1]
    nothing = measure([Fake("a", 1.0, [], fails={0}), Fake("b", 2.0, [])], replace(load, requests=1))
    assert {(r["ratio"], r["reason"]) for r in nothing["ratios"]} == {(None, "no request that both answered")}


def test_paired_ratio_of_ragged_rounds():
    a, b, rounds = [2.0, 4.0, 6.0], [1.0, 2.0, 2.0], [0, 0, 1]
    ratio, interval = stats.paired_ratio(a, b, rounds, statistic=np.mean)
    assert ratio == pytest.approx(12 / 5)
    assert 2.0 <= interval.low <= ratio <= interval.high <= 3.0
    assert stats.paired_ratio(a, b, [0, 0, 0]) == (2.0, None)


def test_partners_of_a_preset():
    shapes = partners.shapes("nano", ("total", "flops", "decoder"), moe=True, image_size=112)
    assert [(name, match) for name, match, _ in shapes] == [
        ("early", None), ("late/total", "total"), ("late/flops", "flops"), ("late/decoder", "decoder"),
        ("moe", "active"),
    ]  # fmt: skip
    early, total, _, decoder, moe = (count_params(config) for _, _, config in shapes)
    assert total.total == pytest.approx(early.total, rel=0.05)
    assert decoder.decoder == early.decoder
    assert moe.decoder > early.decoder


def test_code_lines_leave_out_what_is_no_code(tmp_path, monkeypatch):
    (tmp_path / "counted_by_ledger.py").write_text(
        '"""Doc."""\n\n# why\nX = (\n    1,\n)\n\n\ndef f():\n    """Doc\n    doc."""\n    return """a\n    b"""\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert ledger.code_lines("counted_by_ledger") == 3 + 3
    assert ledger.code_lines("counted_by_ledger", "f") == 3


@pytest.mark.parametrize("engine", sorted(ledger.SOURCES))
def test_late_fusion_and_experts_need_code_of_their_own(engine):
    for definitions in (ledger.LATE_ONLY, ledger.MOE_ONLY):
        assert all(ledger.code_lines(module, name) > 0 for module, name in definitions[engine])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    return make_checkpoint(folder / "early"), make_checkpoint(folder / "late", vision_config=VISION)


def test_models_with_other_image_tokens_are_refused(checkpoints, tmp_path):
    other = make_checkpoint(tmp_path / "other", image_size=32)
    with pytest.raises(DataError, match="image size"):
        versus.check_equal(versus.contenders([checkpoints[0], other]))
    with pytest.raises(DataError, match="two of the models"):
        versus.contenders([checkpoints[0], checkpoints[0]])


def test_a_comparison_of_two_checkpoints(checkpoints, tmp_path):
    """Two real engines in processes of their own; the document is JSON and makes a page."""
    out = tmp_path / "r.json"
    arguments = ["latency", "--compare", *map(str, checkpoints), "--engine", "onnx", "-o", str(out), "--json"]
    quick = ["--concurrency", "1", "--requests", "2", "--warmup", "1", "--output-tokens", "2"]
    result = CliRunner().invoke(main, [*arguments, *quick, "--sweep", "resolution=32", "--slo", "ttft=60000"])
    assert result.exit_code == 0, result.stderr
    document = versus.load_comparison(out)
    assert document == json.loads(result.stdout)
    assert document["final"]
    (run,) = document["runs"]
    assert [(cell["varies"], cell["workload"]["resolution"]) for cell in run["cells"]] == [
        (None, None), ("resolution", 32),
    ]  # fmt: skip
    for cell in run["cells"]:
        for found in cell["results"]:
            assert (found["n"], found["failed"], found["short"]) == (2, 0, 0)
            assert found["goodput_share"] == 1.0
            assert all(part["mean"] >= 0 for part in found["parts"].values())
    full, small = (cell["results"][0]["prompt_tokens"]["max"] for cell in run["cells"])
    assert small < full
    for cost in run["models"]:
        assert cost["memory"]["peak_rss_bytes"] > 0
        assert cost["artefact"]["weights_bytes"] < cost["artefact"]["bytes"]
        assert cost["ledger"]["operator_calls"]["prefill"] is None
        assert cost["ledger"]["graphs"]["count"] == 2
    early, late = (cost["ledger"] for cost in run["models"])
    assert late["graphs"]["nodes"]["image"] > early["graphs"]["nodes"]["image"]
    assert late["knobs"]["model_fields"] > early["knobs"]["model_fields"]
    assert late["family_lines"] > early["family_lines"] == 0
    quality = {
        "model": {"hash": document["groups"][0]["models"][1]["hash"]},
        "tasks": {"vqa": {"accuracy": 50.0, "interval": None}},
    }
    page = write_page(document, [quality], tmp_path / "page")
    assert sorted(path.name for path in page.parent.iterdir()) == [
        "latency.md", "pareto.svg", "parts.svg", "ratios.svg",
    ]  # fmt: skip
    assert "resolution 32" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compare"], "either MODELS or --preset"),
        (["--compare", "a"], "at least two"),
        (["--compare", "a", "b", "--model", "c"], "without --model"),
        (["--compare", "a", "b", "--rate", "2"], "open loop"),
        (["--compare", "a", "b", "--engine", "openai"], "takes engines"),
        (["a", "--model", "b"], "belong to --compare"),
        ([], "--model"),
        (["--model", "a", "--sweep", "images=x"], "NAME=NUMBER"),
        (["--model", "a", "--slo", "ttft"], "NAME=MILLISECONDS"),
    ],
)
def test_usage(arguments, message):
    result = CliRunner().invoke(main, ["latency", *arguments])
    assert result.exit_code == 2
    assert message in result.output


def test_a_broken_engine_is_named_and_the_exit_code_says_so(checkpoints, tmp_path, monkeypatch):
    def broken(*_args):
        raise versus.EngineError("it does not open")

    monkeypatch.setattr(versus, "for_engine", broken)
    result = CliRunner().invoke(
        main, ["latency", "--compare", *map(str, checkpoints), "--engine", "torch", "-o", str(tmp_path / "r.json")]
    )
    assert result.exit_code == 1
    assert "checkpoints torch: it does not open" in result.output
    assert versus.load_comparison(tmp_path / "r.json")["failures"][0]["engine"] == "torch"
