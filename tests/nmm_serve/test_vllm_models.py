"""vLLM against the torch engine: every family, and every setting that changes how a prompt is cut into steps."""

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from parity_checkpoint import FAMILIES, assert_parity, make_parity_checkpoint, noise_image, parity_requests

pytest.importorskip("vllm", reason="vLLM is not installed")

from nmm_serve.engines.base import Request, SamplingParams
from nmm_serve.engines.torch import TorchEngine
from nmm_serve.engines.vllm import VLLMEngine
from nmm_serve.errors import CheckpointError, ConfigError, EngineError
from nmm_serve.kernels.image_front import image_front
from nmm_serve.kernels.moe import moe_mlp

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    made = {}

    def get(family: str) -> str:
        if family not in made:
            made[family] = str(make_parity_checkpoint(tmp_path_factory.mktemp(family) / "checkpoint", family))
        return made[family]

    return get


@pytest.fixture(scope="module")
def oracle(checkpoint):
    return TorchEngine(checkpoint("early"))


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"early"}))
def test_same_tokens_as_torch(checkpoint, family):
    requests = parity_requests()
    reference = TorchEngine(checkpoint(family))
    with VLLMEngine(checkpoint(family)) as engine:
        assert_parity(reference, engine, requests)  # together
        assert_parity(reference, engine, requests[-1:] + requests[:2])  # again, from the prefix cache


def test_hard_routing_is_refused(checkpoint):
    with pytest.raises(EngineError, match="serve this checkpoint with the torch engine"):
        VLLMEngine(checkpoint("modality-moe"))


def test_our_experts_and_our_image_front_inside_vllm(checkpoint, monkeypatch):
    """Switched on by hand: without a GPU vLLM would use neither."""
    import nmm_serve.models.vision as vision
    import nmm_serve.vllm_plugin.model as model
    import nmm_serve.vllm_plugin.processing as processing

    calls = []

    def counted(function):
        return lambda *args, **kwargs: calls.append(function) or function(*args, **kwargs)

    monkeypatch.setenv("NMM_SERVE_MOE", "nmm-serve")
    monkeypatch.setattr(processing, "takes_raw_pixels", lambda device: True)
    monkeypatch.setattr(model, "moe_mlp", counted(model.moe_mlp))
    monkeypatch.setattr(vision, "image_front", counted(vision.image_front))
    reference = TorchEngine(checkpoint("late-moe"))
    with VLLMEngine(checkpoint("late-moe")) as engine:
        assert engine.describe()["expert_kernels"] == "nmm-serve"
        calls.clear()
        assert_parity(reference, engine, parity_requests())
    assert set(calls) == {moe_mlp, image_front}


CRAMPED: dict[str, dict[str, Any]] = {
    "steps": {"max_num_batched_tokens": 100},  # little more than one image: most wait, some of them more than once
    "cache": {"kv_cache_memory_bytes": 8 * 128 * 2048, "prefix_caching": False},  # requests are thrown out and redone
}


@pytest.mark.parametrize("cramped", CRAMPED)
def test_images_are_never_split(checkpoint, oracle, cramped):
    with VLLMEngine(checkpoint("early"), **CRAMPED[cramped]) as engine:
        requests = parity_requests(max_tokens=40)
        assert_parity(oracle, engine, requests + requests)


def test_image_that_no_step_can_hold(checkpoint):
    with pytest.raises(EngineError, match="max_num_batched_tokens is 65, but an image of this model takes up to 66"):
        VLLMEngine(checkpoint("early"), max_num_batched_tokens=65)
    with pytest.raises(EngineError, match="long_prefill_token_threshold is 40"):
        VLLMEngine(checkpoint("early"), long_prefill_token_threshold=40)


def test_text_only(checkpoint, oracle):
    """Without images vLLM drops the image front; text must not change."""
    requests = [r for r in parity_requests() if not r.images]
    with VLLMEngine(checkpoint("early"), limit_mm_per_prompt={"image": 0}) as engine:
        assert_parity(oracle, engine, requests)
        (output,) = engine.generate([Request(prompt="<|image|>", images=[noise_image(0, 8, 8)])])
        assert "text-only" in output.error


def test_bfloat16_stays_near(checkpoint, oracle):
    """Rounding moves tokens, so only the first token's log-probability is bounded."""
    requests = [replace(r, sampling=SamplingParams(max_tokens=1, logprobs=True)) for r in parity_requests()]
    with VLLMEngine(checkpoint("early"), dtype="bfloat16", image_cache=False) as engine:
        assert engine.describe()["dtype"] == "bfloat16"
        outputs = engine.generate(requests)
    same = [
        abs(a.logprobs[0] - b.logprobs[0])
        for a, b in zip(oracle.generate(requests), outputs, strict=True)
        if a.token_ids == b.token_ids
    ]
    assert len(same) >= len(requests) // 2
    assert max(same) < 1.0


def test_user_mistakes(checkpoint, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError):
        VLLMEngine(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"max_num_seq'\. Did you mean 'max_num_seqs'"):
        VLLMEngine(checkpoint("early"), max_num_seq=3)
    with pytest.raises(ConfigError, match="unknown dtype 'fp32'"):
        VLLMEngine(checkpoint("early"), dtype="fp32")
    with pytest.raises(ConfigError, match="max_model_len 4096"):
        VLLMEngine(checkpoint("early"), max_model_len=4096)
    monkeypatch.setattr("nmm_serve.engines.vllm.vllm_distribution", lambda: None)
    with pytest.raises(EngineError, match=r"not installed; run pip install 'nmm-serve\[vllm\]'"):
        VLLMEngine(checkpoint("early"))
    monkeypatch.setattr("nmm_serve.engines.vllm.vllm_distribution", lambda: ("vllm", "0.11.2"))
    with pytest.raises(EngineError, match=r"works with 0\.32"):
        VLLMEngine(checkpoint("early"))


def test_closing_gives_the_process_back(checkpoint):
    before = torch.set_num_threads
    with VLLMEngine(checkpoint("early")):
        pass
    assert torch.set_num_threads is before
    assert not torch.distributed.is_initialized()
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"
