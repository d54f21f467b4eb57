"""Latency: the formulas on known times, and what failures and missing timings do to them."""

import hashlib

import pytest
from eval_fakes import FakeEngine, failed, says
from PIL import Image

from nmm_serve.engines.base import Output, Timing
from nmm_serve.errors import ConfigError
from nmm_serve.evals.lab.workload import Pictures
from nmm_serve.evals.latency import Load, measure, summarise


def timed(ttft: float, e2e: float, tokens: int) -> Output:
    return Output(text="x", num_tokens=tokens, timing=Timing(ttft_s=ttft, e2e_s=e2e))


@pytest.fixture
def images(tmp_path):
    paths = []
    for i in range(3):
        paths.append(tmp_path / f"{i}.png")
        Image.new("RGB", (4, 4), (i, 10, 20)).save(paths[-1])
    return paths


def test_formulas():
    level = summarise([timed(1.0, 3.0, 5), timed(2.0, 4.0, 3)], wall_s=4.0, output_tokens=5)
    assert level["ttft_s"]["mean"] == 1.5
    assert level["tpot_s"]["mean"] == pytest.approx((0.5 + 1.0) / 2)
    assert level["e2e_s"]["p50"] == 3.5
    assert level["output_tokens_per_s"] == 2.0
    assert level["requests_per_s"] == 0.5
    assert level["short"] == 1


def test_one_token_has_no_time_per_output_token():
    level = summarise([timed(1.0, 1.0, 1), timed(1.0, 2.0, 2)], wall_s=1.0, output_tokens=2)
    assert level["tpot_s"]["n"] == 1
    assert level["tpot_s"]["mean"] == 1.0


def test_intervals_draw_whole_waves():
    """What was handed over together waits for each other: four requests in two waves are two observations."""
    outputs = [timed(1.0, 3.0, 3), failed(), timed(2.0, 5.0, 1), timed(2.5, 5.0, 3)]
    level = summarise(outputs, 1.0, 3, wave=2)
    assert level["e2e_s"]["values"] == [3.0, 5.0, 5.0]
    assert level["e2e_s"]["waves"] == [0, 1, 1]
    assert level["tpot_s"]["waves"] == [0, 1]
    interval = level["e2e_s"]["p50_interval"]
    assert (interval["clusters"], interval["unit"]) == (2, "wave")
    single = summarise([timed(1.0, 3.0, 3), timed(2.0, 5.0, 3)], 1.0, 3)["e2e_s"]["p50_interval"]
    assert (single["clusters"], single["unit"]) == (2, "request")


def test_gaps_between_tokens():
    output = Output(text="x", num_tokens=3, timing=Timing(ttft_s=1.0, e2e_s=1.7, token_s=(1.0, 1.2, 1.7)))
    assert summarise([output], 1.0, 3)["itl_s"]["mean"] == pytest.approx(0.35)


def test_failures_are_counted_and_enter_no_average():
    level = summarise([timed(1.0, 2.0, 2), failed("boom"), failed("boom")], wall_s=1.0, output_tokens=2)
    assert (level["n"], level["failed"], level["errors"]) == (3, 2, ["boom"])
    assert level["ttft_s"]["n"] == 1
    assert level["output_tokens_per_s"] == 2.0


def test_all_failed_gives_null_not_zero():
    level = summarise([failed()], wall_s=1.0, output_tokens=2)
    assert level["output_tokens_per_s"] is None
    assert level["ttft_s"] == {"n": 0, "mean": None, "reason": "no successful request"}


def test_an_engine_that_cannot_time_gives_null_with_a_reason():
    level = summarise([Output(text="x", num_tokens=2, timing=Timing(e2e_s=1.0))], wall_s=1.0, output_tokens=2)
    assert level["ttft_s"]["mean"] is None
    assert "timed 0 of 1" in level["ttft_s"]["reason"]
    assert level["e2e_s"]["mean"] == 1.0


def test_waves_warmup_and_fixed_length(images):
    engine = FakeEngine(lambda request: says("x", request.sampling.max_tokens))
    done = []
    load = Load(concurrencies=(1, 4), requests=6, warmup=2, output_tokens=5)
    found = measure(engine, images, load, progress=done.append)
    assert engine.batches == [1] * 8 + [4] * 4  # 2 + 6 waves of one, 2 + 2 waves of four
    assert sum(done) == load.total == 24
    assert [(level["concurrency"], level["n"]) for level in found["levels"]] == [(1, 6), (4, 8)]
    assert all(level["short"] == 0 for level in found["levels"])


def test_no_two_requests_share_an_image(images):
    seen = []

    def answer(request):
        assert request.sampling.ignore_eos
        seen.append(hashlib.sha256(request.images[0].tobytes()).hexdigest())
        return says("x", 2)

    measure(FakeEngine(answer), images, Load(concurrencies=(2,), requests=10, warmup=1, output_tokens=2))
    assert len(seen) == 12 > len(images)
    assert len(set(seen)) == len(seen)


def test_cells_of_several_images_leave_theirs_to_no_other_cell(monkeypatch):
    seen = []
    monkeypatch.setattr(Pictures, "picture", lambda _, index: seen.append(index) or index)
    load = Load(concurrencies=(2,), requests=4, warmup=1, output_tokens=2, sweep=(("images", (3, 0)), ("output", (4,))))
    measure(FakeEngine(lambda _: says("x", 2)), [], load)
    assert len(seen) == 6 + 18 + 6
    assert len(set(seen)) == len(seen)


def test_pictures_are_told_apart_by_their_files(tmp_path):
    for folder, size in (("a", 8), ("b", 9)):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (size, 8)).save(tmp_path / folder / "x.bmp")
    a, b = (Pictures([tmp_path / folder / "x.bmp"]).describe() for folder in "ab")
    assert a != b
    assert a == Pictures([tmp_path / "a/x.bmp"]).describe()


@pytest.mark.parametrize(
    "wrong", [{"requests": 0}, {"output_tokens": 0}, {"concurrencies": ()}, {"concurrencies": (0,)}]
)
def test_a_load_that_makes_no_sense(wrong):
    with pytest.raises(ConfigError, match="expected"):
        Load(**wrong)
