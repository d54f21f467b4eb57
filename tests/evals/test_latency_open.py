"""Open loop, goodput and sweeps: an artificially slow engine on a clock of our own."""

from types import SimpleNamespace

import pytest
from eval_fakes import FakeEngine, failed, says
from PIL import Image

from nmm_serve.engines.base import Output, Timing
from nmm_serve.errors import ConfigError
from nmm_serve.evals.lab.arrivals import drive_in_batches, drive_in_parallel, poisson
from nmm_serve.evals.lab.resources import artefact
from nmm_serve.evals.lab.workload import Pictures, Workload, set_resolution
from nmm_serve.evals.latency import Load, cells, measure, summarise


class SlowEngine:
    """Takes `seconds` for a batch, on a clock that only it and sleeping move."""

    name = "fake"

    def __init__(self, seconds: float) -> None:
        self.now, self.seconds = 100.0, seconds
        self.batches: list[int] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def generate(self, requests, progress=None):
        self.batches.append(len(requests))
        self.now += self.seconds
        timing = Timing(ttft_s=self.seconds / 2, e2e_s=self.seconds, token_s=(self.seconds / 2, self.seconds))
        return [Output(text="x", num_tokens=2, timing=timing) for _ in requests]


def drive(engine, arrivals, at_once=1):
    requests = [object()] * len(arrivals)
    return drive_in_batches(engine, requests, arrivals, at_once, clock=engine.clock, sleep=engine.sleep)


def test_times_count_from_the_intended_arrival():
    """Arrivals every second, two seconds each: the waiting grows by one second a request."""
    engine = SlowEngine(2.0)
    driven = drive(engine, [1.0, 2.0, 3.0, 4.0])
    assert driven.delays_s == pytest.approx([0, 1, 2, 3])
    assert [o.timing.ttft_s for o in driven.outputs] == pytest.approx([1, 2, 3, 4])
    assert [o.timing.e2e_s for o in driven.outputs] == pytest.approx([2, 3, 4, 5])
    assert [o.timing.token_s for o in driven.outputs][1] == pytest.approx((2, 3))
    assert driven.wall_s == pytest.approx(9.0)


def test_a_free_engine_takes_all_that_have_arrived():
    engine = SlowEngine(2.0)
    driven = drive(engine, [0.0, 0.5, 1.0, 1.5, 10.0], at_once=2)
    assert engine.batches == [1, 2, 1, 1]
    assert driven.delays_s == pytest.approx([0, 1.5, 1.0, 2.5, 0])


def test_a_server_is_asked_at_each_arrival():
    engine = FakeEngine(lambda _: says("x", 2))
    requests = [Workload(images=0).request(Pictures(), number) for number in range(5)]
    driven = drive_in_parallel(engine, requests, [0.0, 0.001, 0.002, 0.003, 0.004])
    assert engine.batches == [1] * 5
    assert len(driven.outputs) == len(driven.delays_s) == 5
    assert all(delay >= 0 for delay in driven.delays_s)


def test_poisson_gaps():
    arrivals = poisson(4.0, 20000, seed=3)
    assert arrivals == poisson(4.0, 20000, seed=3) == sorted(arrivals)
    gaps = [b - a for a, b in zip([0.0, *arrivals], arrivals, strict=False)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.25, rel=0.03)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.06)


def timed(ttft: float, e2e: float, tokens: int) -> Output:
    return Output(text="x", num_tokens=tokens, timing=Timing(ttft_s=ttft, e2e_s=e2e))


def test_goodput_counts_requests_that_meet_every_limit():
    outputs = [timed(0.1, 0.5, 5), timed(0.3, 0.5, 5), timed(0.1, 2.1, 5), timed(0.1, 0.1, 1), failed()]
    level = summarise(outputs, 2.0, 5, slo=(("ttft", 0.2), ("tpot", 0.15)))
    assert level["goodput_requests_per_s"] == 1.0  # the first, and the one that has no time per output token
    assert level["goodput_share"] == 2 / 5
    assert level["one_token"] == 1


def test_goodput_is_unknown_where_times_are():
    level = summarise([Output(text="x", num_tokens=2, timing=Timing(e2e_s=1.0))], 1.0, 2, slo=(("ttft", 0.2),))
    assert level["goodput_requests_per_s"] is None
    assert "SLO" in level["goodput_reason"]


def test_parts_add_up_to_the_time_to_first_token():
    timing = Timing(ttft_s=1.0, e2e_s=3.0, image_s=0.1, host_s=0.2, encoder_s=0.3, prefill_s=0.15)
    parts = summarise([Output(text="x", num_tokens=3, timing=timing)] * 2, 1.0, 3)["parts"]
    assert parts["wait_s"]["mean"] == pytest.approx(0.25)
    assert parts["decode_s"]["mean"] == pytest.approx(2.0)


def test_parts_that_an_engine_does_not_see_are_null_with_its_reason():
    parts = summarise([timed(1.0, 2.0, 3)], 1.0, 3, reason="nobody looked")["parts"]
    assert parts["encoder_s"] == {"n": 0, "mean": None, "reason": "nobody looked"}
    assert parts["wait_s"]["mean"] is None
    assert parts["decode_s"]["mean"] == 1.0


def test_chunks_are_not_called_tokens():
    output = Output(text="x", num_tokens=4, timing=Timing(ttft_s=1.0, e2e_s=2.0, token_s=(1.0, 2.0)))
    assert summarise([output], 1.0, 4)["itl_unit"] == "chunk (2 chunks for 4 tokens)"


def test_every_cell_is_measured_and_named(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path)
    (tmp_path / "weights").write_text("w")
    asked = []

    def answer(request):
        asked.append((len(request.images), request.messages[0]["content"][-1]["text"], request.sampling.max_tokens))
        return says("x", request.sampling.max_tokens)

    load = Load(
        concurrencies=(2,), requests=2, warmup=1, output_tokens=3, rates=(500.0,),
        sweep=(("images", (0, 2)), ("prompt", (5,)), ("output", (7,))), slo=(("ttft", 1.0),),
    )  # fmt: skip
    done = []
    section = measure(FakeEngine(answer, str(tmp_path)), [path], load, progress=done.append)
    assert sum(done) == load.total == len(asked)
    assert [what for what, _ in cells(section)] == [
        "concurrency 2", "images 0", "images 2", "prompt 5", "output 7", "500 requests/s",
    ]  # fmt: skip
    assert all(cell["n"] == 2 and cell["warmup"]["failed"] == 0 for _, cell in cells(section))
    assert {images for images, _, _ in asked} == {0, 1, 2}
    assert {tokens for _, _, tokens in asked} == {3, 7}
    texts = [text for images, text, _ in asked if images == 0]
    assert len({text.split()[0] for text in texts}) == len(texts)
    (open_loop,) = section["open_loop"]
    assert open_loop["dispatch_delay_s"]["n"] == 2
    assert open_loop["goodput_share"] is not None
    assert section["artefact"]["files"] == 1
    assert section["memory"]["peak_rss_bytes"] > 0


def test_failures_of_the_warm_up_are_counted_apart(tmp_path):
    (tmp_path / "weights").write_text("w")
    answers = iter([failed(), says("x", 2), says("x", 2)])
    engine = FakeEngine(lambda _: next(answers), str(tmp_path))
    section = measure(engine, [], Load(concurrencies=(1,), requests=2, warmup=1, output_tokens=2))
    assert section["failed"] == 0
    assert section["levels"][0]["warmup"] == {"requests": 1, "failed": 1, "first_e2e_s": None}


def test_synthetic_pictures_are_the_same_for_all_and_all_different():
    a, b = Pictures(seed=1), Pictures(seed=1)
    assert a.picture(5).tobytes() == b.picture(5).tobytes() != a.picture(6).tobytes()


def test_jpeg_rounds_stay_apart(tmp_path):
    path = tmp_path / "a.jpg"
    Image.new("RGB", (40, 30), (120, 90, 200)).save(path)
    pictures = Pictures([path])
    seen = {pictures.picture(i).convert("RGB").tobytes() for i in range(40)}
    assert len(seen) == 40
    assert pictures.picture(7).format == "JPEG"


def test_resolution_can_be_lowered_and_put_back():
    holder = SimpleNamespace(patch_size=14, image_size=224)
    engine = SimpleNamespace(name="onnx", encoder=holder)
    set_resolution(engine, 112)
    assert holder.image_size == 112
    with pytest.raises(ConfigError, match="at most the model's image size of 224"):
        set_resolution(engine, 238)
    with pytest.raises(ConfigError, match="multiple of the patch size 14"):
        set_resolution(engine, 100)
    set_resolution(engine, None)
    assert holder.image_size == 224
    with pytest.raises(ConfigError, match="scales images by itself"):
        set_resolution(SimpleNamespace(name="openai"), 112)


@pytest.mark.parametrize(
    "wrong",
    [{"rates": (0.0,)}, {"sweep": (("colour", (1,)),)}, {"sweep": (("output", (0,)),)}, {"slo": (("tokens", 1.0),)}],
)
def test_a_load_that_makes_no_sense(wrong):
    with pytest.raises(ConfigError, match="expected"):
        Load(**wrong)


def test_a_workload_without_images_needs_no_picture():
    request = Workload(images=0).request(Pictures(), 4)
    assert request.messages[0]["content"] == [{"type": "text", "text": "4 Describe the image."}]


def test_the_artefact_is_the_model_alone(tmp_path):
    """A resume checkpoint holds the optimizer twice the size of the weights, and records may lie beside any model."""
    own = {"model.safetensors": "w" * 100, "config.json": "{}", "run.json": "{}"}
    left = {
        "training/optimizer.safetensors": "o" * 200,
        "answers/vqa-0.jsonl": "{}",
        "vqa.items.jsonl": "{}",
        "vqa.json": '{\n  "format": "nmm-serve/evaluation/1"}',
        "report.html": "<html>",
    }
    for name, text in (own | left).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert artefact(str(tmp_path)) == {"files": 3, "bytes": 104, "weights_bytes": 100}
