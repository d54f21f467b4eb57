import math
from dataclasses import replace

import pytest
import torch
from parity_checkpoint import FAMILIES, TORCH_ONLY, assert_parity, make_parity_checkpoint, noise_image, parity_requests

from nmm_serve.engines import open_engine
from nmm_serve.engines.base import Engine, Request, SamplingParams, ScoreRequest
from nmm_serve.engines.torch import TorchEngine
from nmm_serve.errors import ConfigError, EngineError, NMMError, PromptError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(make_parity_checkpoint(tmp_path_factory.mktemp("torch") / "ckpt", "early"))


@pytest.fixture(scope="module")
def engine(checkpoint):
    return TorchEngine(checkpoint, batch_size=4)


@pytest.mark.parametrize("family", [*FAMILIES, *TORCH_ONLY])
def test_cache_and_batch_change_nothing(tmp_path, family):
    path = str(make_parity_checkpoint(tmp_path / "ckpt", family))
    alone = TorchEngine(path, batch_size=1)
    assert_parity(alone, TorchEngine(path, batch_size=16), parity_requests(8))
    assert_parity(alone, TorchEngine(path, batch_size=16, use_cache=False), parity_requests(8))


def test_pixels_answer_like_patches(engine, checkpoint, monkeypatch):
    """What the engine gives its model on a GPU."""
    monkeypatch.setattr("nmm_serve.engines.torch.takes_raw_pixels", lambda device: True)
    raw = TorchEngine(checkpoint)
    assert raw.encode(parity_requests(1)[1]).pixel_values.dtype == torch.uint8
    assert_parity(engine, raw, parity_requests(8))


def test_same_tokens_as_transformers_generate(engine):
    for request in parity_requests(8)[:4]:
        prompt = engine.encode(request)
        batch = engine.processor.collate([prompt])
        out = engine.network.generate(**batch, max_new_tokens=8, min_new_tokens=8, do_sample=False)
        assert tuple(out[0, len(prompt.input_ids) :].tolist()) == engine.generate([request])[0].token_ids


def test_outputs_and_times(engine):
    assert isinstance(engine, Engine)
    requests = parity_requests(5)
    counted: list[int] = []
    outputs = engine.generate(requests, counted.append)
    assert sum(counted) == len(requests)
    for output in outputs:
        assert output.num_tokens == len(output.token_ids) == len(output.timing.token_s) == 5
        assert output.finish_reason == "length"
        assert 0 < output.timing.preprocess_s < output.timing.ttft_s < output.timing.e2e_s
        parts = (output.timing.image_s, output.timing.host_s, output.timing.encoder_s, output.timing.prefill_s)
        assert all(part is not None and part >= 0 for part in parts)
        assert sum(parts) <= output.timing.ttft_s + 1e-9
        assert list(output.timing.token_s) == sorted(output.timing.token_s)


def test_failed_requests_do_not_stop_the_others(engine):
    good = parity_requests(4)[0]
    long = Request(prompt="circle " * 600)
    wrong = Request(prompt="<|image|>")
    wide = Request(prompt="<|image|>", images=[noise_image(0, 2000, 10)])
    halves = [Request(prompt="a \ud83d b"), Request(messages=[{"role": "user", "content": "\udc80"}])]
    outputs = engine.generate([long, good, wrong, wide, *halves])
    assert "context is 512; shorten the prompt" in outputs[0].error
    assert outputs[1].token_ids == engine.generate([good])[0].token_ids
    assert "1 <|image|> marks but 0 images" in outputs[2].error
    assert "longer than 16:1" in outputs[3].error
    assert "half of a surrogate pair (U+D83D at position 2)" in outputs[4].error
    assert "half of a surrogate pair (U+DC80 at position 0)" in outputs[5].error
    assert [o.finish_reason for o in outputs] == ["error", "length", *["error"] * 4]


def test_stop_strings_cut_the_text(engine):
    request = parity_requests(16)[1]
    whole = engine.generate([request])[0].text
    stop = whole[3:5]
    output = engine.generate([replace(request, sampling=replace(request.sampling, stop=(stop,)))])[0]
    assert output.text == whole[: whole.index(stop)]
    assert output.finish_reason == "stop"


def test_sampling_repeats_with_a_seed_and_follows_the_distribution(engine):
    sampling = SamplingParams(max_tokens=6, temperature=1.5, seed=3, ignore_eos=True)
    request = Request(prompt="what is", sampling=sampling)
    first, again = engine.generate([request])[0], engine.generate([request])[0]
    assert first.token_ids == again.token_ids
    others = {engine.generate([replace(request, sampling=replace(sampling, seed=s))])[0].token_ids for s in range(5)}
    assert len(others) > 1
    tiny = replace(sampling, temperature=1e-300)
    greedy = replace(sampling, temperature=0.0)
    cold, exact = (engine.generate([replace(request, sampling=s)])[0].token_ids for s in (tiny, greedy))
    assert cold == exact
    narrow = replace(sampling, top_p=1e-9)
    assert engine.generate([replace(request, sampling=narrow)])[0].token_ids == exact


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"temperature": math.nan}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_sampling_out_of_range_is_refused(engine, bad):
    with pytest.raises(ConfigError, match="temperature"):
        engine.generate([Request(prompt="x", sampling=SamplingParams(**bad))])


def test_loglikelihood_is_the_sum_over_the_continuation(engine):
    image = noise_image(5, 64, 64)
    requests = [
        ScoreRequest(context="look <|image|> what", continuation=" is the circle", images=[image]),
        ScoreRequest(context="red", continuation="x"),
    ]
    scores = engine.loglikelihood(requests)
    for request, score in zip(requests, scores, strict=True):
        prompt = engine.processor.encode_prompt(request.context, request.images)
        target = engine.processor.encode_text(request.continuation)
        batch = engine.processor.collate([replace(prompt, input_ids=prompt.input_ids + target)])
        with torch.inference_mode():
            logprobs = engine.network(**batch).logits[0].log_softmax(-1)
        rows = range(len(prompt.input_ids) - 1, len(prompt.input_ids) + len(target) - 1)
        expected = sum(logprobs[row, token].item() for row, token in zip(rows, target, strict=True))
        assert score.logprob == pytest.approx(expected, abs=1e-4)
        assert score.num_tokens == len(target)
    greedy = engine.generate([Request(prompt="red", sampling=SamplingParams(max_tokens=1))])[0]
    (score,) = engine.loglikelihood([ScoreRequest(context="red", continuation=greedy.text)])
    assert score.is_greedy == (engine.processor.encode_text(greedy.text) == list(greedy.token_ids))


def test_scores_that_cannot_be_had_are_refused(engine):
    with pytest.raises(PromptError, match="empty continuation"):
        engine.loglikelihood([ScoreRequest(context="a", continuation="")])
    with pytest.raises(PromptError, match="over the model's context of 512"):
        engine.loglikelihood([ScoreRequest(context="circle " * 600, continuation="a")])


def test_poisoned_weights_are_an_error_not_token_zero(checkpoint):
    poisoned = TorchEngine(checkpoint)
    with torch.no_grad():
        poisoned.network.lm_head.weight[3, 0] = float("nan")
    with pytest.raises(NMMError, match="NaN or infinite logits"):
        poisoned.generate([Request(prompt="what")])


def test_opening_names_what_does_not_fit(checkpoint):
    with pytest.raises(EngineError, match="unknown engine 'tourch'. Did you mean 'torch'"):
        open_engine(checkpoint, "tourch")
    with pytest.raises(EngineError, match="does not fit"):
        open_engine("http://127.0.0.1:1", "torch")
    with pytest.raises(ConfigError, match="unknown dtype 'float23'"):
        open_engine(checkpoint, "torch", dtype="float23")
    with pytest.raises(ConfigError, match="batch_size must be at least 1"):
        open_engine(checkpoint, "torch", batch_size=0)
