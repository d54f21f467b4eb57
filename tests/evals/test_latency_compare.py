"""Models side by side: what is interleaved, the paired ratio, the document and its page."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from eval_fakes import failed
from tiny_checkpoint import make_checkpoint

from nmm_serve.cli.eval import main
from nmm_serve.engines.base import Output, Timing
from nmm_serve.errors import DataError, EngineError
from nmm_serve.evals import stats
from nmm_serve.evals.lab import contenders, document, interleave, ledger, partners, plots, training, versus
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
    return interleave.interleave(
        models, interleave.cells(load, 64)[0], load, iter(range(100)), baseline="a", image_size=64, sleep=lambda _: None
    )


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


class Fragile(Fake):
    """Its process ends when it is asked for request `last`."""

    alive = True

    def __init__(self, name, slowness, log, last):
        super().__init__(name, slowness, log)
        self.last = last

    def wave(self, workload, numbers):
        if self.last in numbers:
            self.alive = False
        if not self.alive:
            raise EngineError("its process is gone")
        return super().wave(workload, numbers)


def test_a_model_that_breaks_off_is_named_and_the_others_go_on():
    load = Load(concurrencies=(1,), requests=4, warmup=1, output_tokens=3)
    cell = measure([Fake("a", 1.0, []), Fragile("b", 2.0, [], last=3), Fake("c", 3.0, [])], load)
    assert cell["failures"] == [{"model": "b", "error": "its process is gone"}]
    assert [(result["model"], result["n"]) for result in cell["results"]] == [("a", 4), ("c", 4)]
    assert {ratio["model"] for ratio in cell["ratios"]} == {"c"}
    cell = measure([Fragile("a", 1.0, [], last=3), Fake("b", 2.0, [])], load)
    assert [result["model"] for result in cell["results"]] == ["b"]
    assert cell["ratios"] == [], "nothing takes the place of the model that all are compared with"


class Opened(Fragile):
    """As a `Worker` in a comparison."""

    engine, about, model, startup_s = "torch", {}, None, 1.0

    def close(self):
        pass


@pytest.fixture
def compare(checkpoints, tmp_path, monkeypatch):
    """Compare two checkpoints with fakes; those `broken` break off at request `last`. Gives the document."""
    out, log = tmp_path / "r.json", []
    monkeypatch.setattr(interleave, "SETTLE_S", 0)
    monkeypatch.setattr(versus, "measured_costs", lambda contender, *_: {"model": contender.name})

    def run(last=None, broken=("late",), **options):
        def start(name, *_args, **_kwargs):
            return Opened(name, 1.0 if name == "early" else 2.0, log, last if name in broken else None)

        monkeypatch.setattr(versus, "Worker", start)
        load = Load(concurrencies=(1, 2), requests=2, warmup=1, output_tokens=3, sweep=(("resolution", (32,)),))
        group = contenders.Group("tiny", contenders.contenders(checkpoints))
        return versus.compare([group], ["torch"], load, out, tmp_path, training=False, **options)

    run.out, run.log = out, log
    return run


def test_finished_cells_outlive_a_broken_one(compare):
    found = compare(last=4)
    (failure,) = found["failures"]
    assert failure == {
        "group": "tiny", "engine": "torch", "model": "late", "cell": "64 px, concurrency 2",
        "error": "its process is gone",
    }  # fmt: skip
    assert [[r["model"] for r in cell["results"]] for cell in found["runs"][0]["cells"]] == [
        ["early", "late"], ["early"], ["early"],
    ]  # fmt: skip
    assert document.failed(found) == ["tiny torch late, 64 px, concurrency 2: its process is gone"]


@pytest.mark.parametrize(("last", "measured"), [(0, 0), (4, 1)])
def test_what_no_model_was_left_for_is_measured_on_resume(compare, tmp_path, last, measured):
    whole = compare()
    left = compare(last, broken=("early", "late"))
    assert (left["final"], left["runs"][0]["final"], len(left["runs"][0]["cells"])) == (False, False, measured)
    assert [failure["model"] for failure in left["failures"]] == ["early", "late"]
    assert document.load_comparison(compare.out) == left
    assert "**Not final" in write_page(left, [], tmp_path / "page").read_text()
    resumed = compare(resume=True)
    assert resumed["final"]
    assert resumed["failures"] == []
    assert [cell["ratios"] for cell in resumed["runs"][0]["cells"]] == [
        cell["ratios"] for cell in whole["runs"][0]["cells"]
    ]


def test_a_cell_that_always_ends_all_models_does_not_hold_up_the_rest(compare):
    """As one does that needs more memory than there is: on --resume it ended them again, for ever."""
    both = ("early", "late")
    compare(4, broken=both)
    found = compare(4, broken=both, resume=True)
    assert found["final"]
    (run,) = found["runs"]
    assert [[r["model"] for r in cell["results"]] for cell in run["cells"]] == [[*both], [], [*both]]
    assert [model["model"] for model in run["models"]] == [*both]
    named = [f"tiny torch {name}, 64 px, concurrency 2: its process is gone" for name in both]
    assert document.failed(found) == named
    assert "64 px, x2" in plots.ratios(found), "a place of its own, and no point there"
    again = compare(4, broken=both, resume=True)
    assert (again["runs"], again["failures"]) == (found["runs"], found["failures"])


def test_an_interrupted_comparison_is_taken_up(compare, monkeypatch):
    whole = compare()

    def interrupt(name, *_args, **_kwargs):
        raise KeyboardInterrupt

    wave = Opened.wave
    monkeypatch.setattr(
        Opened, "wave", lambda self, w, numbers: interrupt(w) if 4 in numbers else wave(self, w, numbers)
    )
    with pytest.raises(KeyboardInterrupt):
        compare()
    left = document.load_comparison(compare.out)
    assert (left["final"], len(left["runs"][0]["cells"])) == (False, 1)
    monkeypatch.setattr(Opened, "wave", wave)
    compare.log.clear()
    resumed = compare(resume=True)
    assert resumed["created"] == left["created"]
    assert min(min(numbers) for _, numbers in compare.log) == 3, "the first cell is not measured again"
    assert resumed["final"]
    assert [cell["ratios"] for cell in resumed["runs"][0]["cells"]] == [
        cell["ratios"] for cell in whole["runs"][0]["cells"]
    ]


class FakeSteps:
    def __init__(self, name, slowness, fails_at=None):
        self.name, self.slowness, self.fails_at, self.seen = name, slowness, fails_at, []

    def step(self, resolution, numbers):
        if self.fails_at in numbers:
            raise EngineError("no memory left")
        self.seen.append(tuple(numbers))
        return self.slowness * (1 + numbers[0] % 5), 10


@pytest.mark.parametrize("wait_s", [0.25, -0.25])
def test_a_part_below_zero_has_no_bar_and_the_plot_says_so(wait_s):
    medians = {name: {"p50": 1.0} for name in plots.PARTS} | {"wait_s": {"p50": wait_s}}
    cell = {"results": [{"model": "early", "parts": medians}]}
    drawn = plots.parts({"runs": [{"group": "nano", "engine": "torch", "cells": [cell]}]})
    assert drawn is not None
    assert ("not drawn where below 0: wait)" in drawn) == (wait_s < 0)


def test_training_steps_are_paired_on_the_same_samples():
    models = [FakeSteps("a", 1.0), FakeSteps("b", 1.5), FakeSteps("c", 2.0, fails_at=5)]
    cell = training.measure_steps(
        models, None, 6, 1, iter(range(100)), baseline="a", image_size=64, sleep=lambda _: None
    )
    assert models[0].seen == models[1].seen == [(i, i + 1) for i in range(0, 14, 2)]
    assert [result["model"] for result in cell["results"]] == ["a", "b"]
    assert cell["failures"] == [{"model": "c", "error": "no memory left"}]
    ratio = document.ratio_of(cell, "b", "step_s")
    assert (ratio["ratio"], ratio["interval"]["low"], ratio["interval"]["high"]) == pytest.approx((1.5, 1.5, 1.5))
    seconds = sum(1 + n[0] % 5 for n in models[0].seen[1:])
    assert cell["results"][0]["samples_per_s"] == pytest.approx(6 * training.BATCH / seconds)


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


def test_a_package_counts_with_all_its_modules(tmp_path, monkeypatch):
    package = tmp_path / "package_of_ledger"
    package.mkdir()
    for name in ("__init__", "one", "other"):
        (package / f"{name}.py").write_text("X = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert sum(map(ledger.code_lines, ledger.modules("package_of_ledger"))) == 3
    assert ledger.modules("package_of_ledger.one") == ["package_of_ledger.one"]


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
        contenders.check_equal(contenders.contenders([checkpoints[0], other]))
    with pytest.raises(DataError, match="given twice"):
        contenders.contenders([checkpoints[0], checkpoints[0]])


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["a/early", "a/late"], ["early", "late"]),
        (["runs/early/sft/final", "runs/late/sft/final"], ["early", "late"]),
        (["runs/early/final", "runs/late/step-10"], ["final", "step-10"]),
        (["a/x", "a/y", "b/x"], ["a/x", "a/y", "b/x"]),
        (["a-b/x", "a/b-x", "a/x"], ["a-b/x", "a/b-x", "a/x"]),
    ],
)
def test_models_are_named_by_what_tells_them_apart(paths, names):
    assert [c.name for c in contenders.contenders([Path("/runs", path) for path in paths])] == names


@pytest.mark.parametrize("gpu", [False, True])
def test_encoders_are_compiled_in_a_comparison(gpu, monkeypatch):
    monkeypatch.setattr(versus, "on_gpu", lambda: gpu)
    load = Load(concurrencies=(4,), requests=1, warmup=0, output_tokens=1)
    assert versus.settings("torch", load, 3)["compile_encoder"]
    vllm = versus.settings("vllm", load, 3)
    assert vllm["enforce_eager"] is False
    assert vllm.get("compilation_config") == ({"cudagraph_mm_encoder": True} if gpu else None)
    assert vllm.get("fitted_cache", False) == gpu


def test_a_comparison_of_two_checkpoints(checkpoints, tmp_path):
    """Two real engines in processes of their own; the document is JSON and makes a page."""
    out = tmp_path / "r.json"
    arguments = ["latency", "--compare", *map(str, checkpoints), "--engine", "onnx", "-o", str(out), "--json"]
    quick = ["--concurrency", "1", "--requests", "2", "--warmup", "1", "--output-tokens", "2"]
    result = CliRunner().invoke(main, [*arguments, *quick, "--sweep", "resolution=32,64", "--slo", "ttft=60000"])
    assert result.exit_code == 0, result.stderr
    found = document.load_comparison(out)
    assert found == json.loads(result.stdout)
    assert found["final"]
    (run,) = found["runs"]
    assert [(cell["varies"], cell["workload"]["resolution"]) for cell in run["cells"]] == [
        (None, None), ("resolution", 32),
    ], "64 is the models' own size: no cell beside the first"  # fmt: skip
    for cell in run["cells"]:
        for answered in cell["results"]:
            assert (answered["n"], answered["failed"], answered["short"]) == (2, 0, 0)
            assert answered["goodput_share"] == 1.0
            # but for `wait_s`: a difference of clocks read in several places, around 0 where nobody waits
            assert all(part["mean"] >= 0 for name, part in answered["parts"].items() if name != "wait_s"), answered
    (steps,) = found["training"]
    assert [cell["resolution"] for cell in steps["cells"]] == [64, 32]
    for cell in steps["cells"]:
        assert [result["n"] for result in cell["results"]] == [2, 2]
        assert {(r["model"], r["pairs"]) for r in cell["ratios"]} == {("late", 2)}
    assert steps["cells"][1]["tokens_per_step"] < steps["cells"][0]["tokens_per_step"]
    full, small = (cell["results"][0]["prompt_tokens"]["max"] for cell in run["cells"])
    assert small < full
    for cost in run["models"]:
        assert cost["memory"]["peak_rss_bytes"] > 0
        assert cost["artefact"]["weights_bytes"] < cost["artefact"]["bytes"]
        assert cost["ledger"]["operator_calls"]["prefill"] is None
        assert cost["ledger"]["compiled"] == []
        assert cost["ledger"]["graphs"]["count"] == 2
    early, late = (cost["ledger"] for cost in run["models"])
    assert late["graphs"]["nodes"]["image"] > early["graphs"]["nodes"]["image"]
    assert late["knobs"]["model_fields"] > early["knobs"]["model_fields"]
    assert late["family_lines"] > early["family_lines"] == 0
    late_model = {"hash": found["groups"][0]["models"][1]["hash"], "name": "late"}
    quality = [
        {"model": late_model, "tasks": {"vqa": {"accuracy": 50.0, "interval": None}}},
        {"model": late_model, "tasks": {"caption": {"metrics": {"CIDEr": 0.5}}}},
    ]
    page = write_page(found, quality, tmp_path / "page")
    drawn = (page.parent / "pareto.svg").read_text()
    assert "VQA accuracy" in drawn
    assert "CIDEr" in drawn
    assert sorted(path.name for path in page.parent.iterdir()) == [
        "latency.md", "pareto.svg", "parts.svg", "ratios.svg", "training.svg",
    ]  # fmt: skip
    assert "resolution 32" in page.read_text()
    with pytest.raises(DataError, match="is of checkpoint abc, which is none of the compared ones: early"):
        write_page(found, [quality[0] | {"model": {"hash": "abc", "name": "x"}}], tmp_path / "page")
    with pytest.raises(DataError, match="neither VQA accuracy nor CIDEr"):
        write_page(found, [quality[0] | {"tasks": {}}], tmp_path / "page")
    resumed = CliRunner().invoke(
        main, [*arguments, *quick, "--sweep", "resolution=32,64", "--slo", "ttft=60000", "--resume"]
    )
    assert json.loads(resumed.stdout) == found, "all was measured already"
    other = CliRunner().invoke(main, [*arguments, *quick, "--resume"])
    assert other.exit_code == 1
    assert "its load differ from what would be measured now" in other.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compare"], "either MODELS or --preset"),
        (["--compare", "a"], "at least two"),
        (["--compare", "a", "b", "--model", "c"], "without --model"),
        (["--compare", "a", "b", "--rate", "2"], "open loop"),
        (["--compare", "a", "b", "--engine", "openai"], "takes engines"),
        (["a", "--model", "b"], "belong to --compare"),
        (["--resume", "--model", "b"], "belong to --compare"),
        (["--model", "b", "--no-training"], "--training belongs to --compare"),
        (["--model", "b", "--limit", "2"], "--limit is of items to score"),
        (["--compare", "a", "b", "--batch-size", "4"], "--batch-size is not for --compare"),
        (["--compare", "a", "b", "--match", "flops"], "--match is of models made of --preset"),
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
        raise EngineError("it does not open")

    monkeypatch.setattr(versus, "for_engine", broken)
    result = CliRunner().invoke(
        main,
        [
            "latency",
            "--compare",
            *map(str, checkpoints),
            "--engine",
            "torch",
            "--no-training",
            "-o",
            str(tmp_path / "r.json"),
        ],
    )
    assert result.exit_code == 1
    assert "checkpoints torch late: it does not open" in result.output
    found = document.load_comparison(tmp_path / "r.json")
    assert [failure["model"] for failure in found["failures"]] == ["early", "late"]
    assert found["runs"] == []
