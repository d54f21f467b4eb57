"""The exported model against the torch engine, for every family."""

import subprocess
import sys
from dataclasses import replace

import pytest
from exported import checkpoint_of, exported
from parity_checkpoint import FAMILIES, TORCH_ONLY, assert_parity, noise_image, parity_requests

pytest.importorskip("onnxruntime")

from nmm_serve.engines.base import Engine, Request, SamplingParams, ScoreRequest
from nmm_serve.engines.onnx import OnnxEngine
from nmm_serve.engines.parity import compare_engines
from nmm_serve.engines.torch import TorchEngine
from nmm_serve.errors import ConfigError


def engine_of(family: str, quantization: str = "none", batch_size: int = 16) -> OnnxEngine:
    return OnnxEngine(str(exported(family, quantization)), batch_size=batch_size, threads=1)


@pytest.fixture(scope="module")
def engine():
    return engine_of("late-moe", batch_size=3)


@pytest.fixture(scope="module")
def oracle():
    return TorchEngine(str(checkpoint_of("late-moe")))


@pytest.mark.parametrize("family", FAMILIES | TORCH_ONLY)
def test_tokens_and_logprobs_equal_torch(family):
    reference, requests = TorchEngine(str(checkpoint_of(family))), parity_requests(8)
    for batch_size in (1, 16):
        assert_parity(reference, engine_of(family, batch_size=batch_size), requests)


@pytest.mark.parametrize(("quantization", "bound"), [("int8", 1.0), ("int4", 4.0)])
def test_fewer_bits_stay_near(quantization, bound):
    """Random weights bear it worst: in nats, on the tokens that both choose (seen: 0.4 and 1.4)."""
    reference = TorchEngine(str(checkpoint_of("early")))
    parity = compare_engines(reference, engine_of("early", quantization), parity_requests(8))
    assert not parity.errors
    assert parity.num_tokens > 10
    assert parity.max_logprob_diff < bound


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_only_quantised_answers_depend_on_their_batch(quantization):
    """Kept answers go by this. Log-probabilities alone and side by side: seen 0 in fp32, 0.8 in int8, 0.007 in int4."""
    alone = engine_of("early", quantization, batch_size=1)
    together = engine_of("early", quantization, batch_size=8)
    apart = compare_engines(alone, together, parity_requests(8)).max_logprob_diff
    quantised = quantization != "none"
    assert together.describe().get("answers_depend_on_batch", False) is quantised
    assert (apart > 1e-3) is quantised, apart


def test_outputs_and_times(engine):
    assert isinstance(engine, Engine)
    counted: list[int] = []
    requests = parity_requests(5)
    outputs = engine.generate(requests, counted.append)
    assert sum(counted) == len(requests) > engine.batch_size
    for output in outputs:
        assert output.num_tokens == len(output.token_ids) == len(output.timing.token_s) == 5
        assert output.finish_reason == "length"
        assert 0 < output.timing.preprocess_s < output.timing.ttft_s < output.timing.e2e_s
        parts = (output.timing.image_s, output.timing.host_s, output.timing.encoder_s, output.timing.prefill_s)
        assert all(part is not None and part >= 0 for part in parts)
        assert sum(parts) <= output.timing.ttft_s + 1e-9


def test_requests_of_different_length_share_slots(engine, oracle):
    requests = [
        replace(r, sampling=replace(r.sampling, max_tokens=1 + 3 * i % 7)) for i, r in enumerate(parity_requests())
    ]
    expected = oracle.generate(requests)
    assert [o.token_ids for o in engine.generate(requests)] == [o.token_ids for o in expected]


def test_failed_requests_do_not_stop_the_others(engine):
    good = parity_requests(4)[0]
    long, wrong = Request(prompt="circle " * 600), Request(prompt="<|image|>")
    wide = Request(prompt="<|image|>", images=[noise_image(0, 2000, 10)])
    halves = [Request(prompt="a \ud83d b"), Request(messages=[{"role": "user", "content": "\udc80"}])]
    outputs = engine.generate([long, good, wrong, wide, *halves])
    assert "context is 512; shorten the prompt" in outputs[0].error
    assert outputs[1].token_ids == engine.generate([good])[0].token_ids
    assert "1 <|image|> marks but 0 images" in outputs[2].error
    assert "longer than 16:1" in outputs[3].error
    assert "half of a surrogate pair (U+D83D at position 2)" in outputs[4].error
    assert "half of a surrogate pair (U+DC80 at position 0)" in outputs[5].error


def test_stop_strings_and_text_equal_torch(engine, oracle):
    request = parity_requests(16)[1]
    whole = oracle.generate([request])[0].text
    assert engine.generate([request])[0].text == whole
    stopped = replace(request, sampling=replace(request.sampling, stop=(whole[3:5],)))
    expected, output = oracle.generate([stopped])[0], engine.generate([stopped])[0]
    assert (output.text, output.finish_reason) == (expected.text, expected.finish_reason)


def test_sampling_repeats_with_a_seed(engine):
    sampling = SamplingParams(max_tokens=6, temperature=1.5, seed=3, ignore_eos=True)
    request = Request(prompt="what is", sampling=sampling)
    first, again = engine.generate([request, request])
    assert first.token_ids == again.token_ids
    others = {
        engine.generate([replace(request, sampling=replace(sampling, seed=s))])[0].token_ids for s in range(-2, 3)
    }
    assert len(others) > 1


def test_likelihoods_equal_torch(engine, oracle):
    requests = [
        ScoreRequest(context="look <|image|> what", continuation=" is the circle", images=[noise_image(5, 64, 64)]),
        ScoreRequest(context="red", continuation="x"),
    ]
    for score, expected in zip(engine.loglikelihood(requests), oracle.loglikelihood(requests), strict=True):
        assert score.logprob == pytest.approx(expected.logprob, abs=1e-3)
        assert (score.is_greedy, score.num_tokens) == (expected.is_greedy, expected.num_tokens)


def test_prompt_in_pieces_equals_the_whole(engine):
    """What the server does with long prompts; an image stays in one piece."""
    runtime = engine.runtime
    prompt = engine.encode(parity_requests(4)[1])
    image_PD = runtime.image_tokens(prompt.pixels)
    ids, mark = prompt.input_ids, engine.manifest.image_token_id
    last = len(ids) - 1 - ids[::-1].index(mark) + 1
    first = ids.index(mark)
    whole = engine.prefill(0, prompt, [len(ids) - 1])
    runtime.clear(0)
    runtime.prefill(0, ids[: first - 1], None, [0])
    runtime.prefill(0, ids[first - 1 : last], image_PD, [0])
    pieces = runtime.prefill(0, ids[last:], None, [len(ids) - last - 1])
    assert pieces == pytest.approx(whole, abs=1e-3)


def test_starts_without_torch():
    code = (
        "import sys; from nmm_serve.engines import open_engine; from nmm_serve.engines.base import *\n"
        f"e = open_engine({str(exported('early'))!r}, threads=1)\n"
        "print(e.name, e.generate([Request(prompt='what', sampling=SamplingParams(max_tokens=2, ignore_eos=True))])"
        "[0].num_tokens, [m for m in ('torch', 'transformers', 'onnx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "onnx 2 []"


def test_options_are_checked():
    with pytest.raises(ConfigError, match="batch_size must be at least 1"):
        OnnxEngine(str(exported("early")), batch_size=0)
    with pytest.raises(ConfigError, match="threads must be at least 1"):
        OnnxEngine(str(exported("early")), threads=0)
