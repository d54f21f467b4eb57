"""vLLM's compiled image encoder: the torch engine's answers, one compilation for images of any sizes, and the interface
to CUDA graphs with graphs that compute anew."""

import contextlib
import itertools
import random
from types import SimpleNamespace

import pytest
import torch
from parity_checkpoint import assert_parity, make_parity_checkpoint, noise_image, parity_requests

pytest.importorskip("vllm", reason="vLLM is not installed")

from torch._dynamo.utils import counters
from vllm.compilation import decorators
from vllm.compilation.counter import compilation_counter
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from nmm_serve.config import NMMConfig
from nmm_serve.engines.base import Request, SamplingParams
from nmm_serve.engines.torch import TorchEngine
from nmm_serve.engines.vllm import VLLMEngine
from nmm_serve.vllm_plugin import encoder_graphs
from nmm_serve.vllm_plugin.model import NMMDecoder
from nmm_serve.vllm_plugin.settings import NMMSettings

pytestmark = pytest.mark.slow


def compilations() -> tuple[int, int]:
    return compilation_counter.num_aot_compiles, counters["stats"]["unique_graphs"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Images keep their size, so that one may have any number of patches."""
    path = tmp_path_factory.mktemp("late") / "checkpoint"
    return str(make_parity_checkpoint(path, "late", num_hidden_layers=1, native_resolution=True))


@pytest.fixture(scope="module")
def engine(checkpoint, tmp_path_factory):
    before = compilations()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CACHE_ROOT", str(tmp_path_factory.mktemp("compiled")))
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # vLLM sets it for the whole process
        patch.delenv("TORCHINDUCTOR_CACHE_DIR")
        patch.setattr(NMMDecoder, decorators.IGNORE_COMPILE_KEY, True)  # which would take as long again
        with VLLMEngine(checkpoint, enforce_eager=False, image_cache=False, prefix_caching=False) as opened:
            assert compilations()[0] == before[0] + 1, "before the first request"
            yield opened


def test_images_of_any_sizes_give_the_same_tokens_and_compile_nothing(engine, checkpoint):
    described = engine.describe()
    assert (described["compile_encoder"], described["encoder_graphs"]) == (True, False)
    sampling = SamplingParams(max_tokens=4, ignore_eos=True)
    sides = [(8, 8), (8, 16), (16, 8), (64, 64), (24, 40), (128, 8), (9, 100), (300, 40)]
    images = [noise_image(i, *size) for i, size in enumerate(sides)]
    requests = [Request(prompt="<|image|> what is", images=[image], sampling=sampling) for image in images]
    requests.append(Request(prompt="<|image|>" * 5, images=images[:5], sampling=sampling))
    reference = TorchEngine(checkpoint)
    # the first log-probabilities compile a small function of vLLM's own
    assert_parity(reference, engine, [Request(prompt="what is", sampling=sampling)])
    before = compilations()
    for request in requests:  # alone: one image, down to a single patch
        assert_parity(reference, engine, [request])
    assert_parity(reference, engine, requests + parity_requests(max_tokens=4))
    assert compilations() == before


def varlen(q, k, v, scale, cu_seqlens, enable_gqa):
    """As the kernels of a GPU: rows beyond the last image are left alone."""
    out = torch.full_like(q, torch.nan)
    for begin, end in itertools.pairwise(cu_seqlens.tolist()):
        one = (x[:, begin:end].transpose(1, 2) for x in (q, k, v))
        out[:, begin:end] = torch.nn.functional.scaled_dot_product_attention(*one, scale=scale).transpose(1, 2)
    return out


def test_graphs_of_the_encoder(engine, monkeypatch):
    """vLLM's manager packs images, pads them, replays and takes the result apart: as without graphs."""
    from vllm.model_executor.layers.attention import mm_encoder_attention
    from vllm.v1.worker import encoder_cudagraph

    model, sizes = engine.llm.apply_model(lambda model: model)[0], random.Random(0)
    monkeypatch.setattr(model.vision.body, "do_not_compile", True)
    monkeypatch.setattr(encoder_graphs, "CAPTURABLE", (AttentionBackendEnum.TORCH_SDPA,))
    monkeypatch.setattr(mm_encoder_attention, "vit_torch_sdpa_wrapper", varlen)
    monkeypatch.setattr(encoder_cudagraph, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_args, **_kwargs: contextlib.nullcontext())
    manager = encoder_cudagraph.EncoderCudaGraphManager(
        engine.engine.vllm_config, torch.device("cpu"), torch.float32, model
    )
    manager.token_budgets = manager.path_token_budgets["default"] = [64, 128]
    manager.max_batch_size = 5
    with torch.inference_mode():
        manager.capture(None)
        for budget, graph in manager.budget_graphs["default"].items():
            assert graph.input_buffers["x_PD"].shape[0] == graph.output_buffer.shape[0] == budget

            def replay(graph=graph):
                graph.output_buffer.copy_(model.encoder_cudagraph_forward({**graph.input_buffers}))

            graph.graph.replay = replay
        for count in (1, 2, 7, 12):
            grid_I2 = torch.tensor([(sizes.randint(1, 8), sizes.randint(1, 8)) for _ in range(count)])
            pixels = torch.rand(int(grid_I2.prod(-1).sum()), 3 * 8 * 8) * 2 - 1
            images = {"pixel_values": pixels, "image_grid": grid_I2}
            for ours, theirs in zip(manager.execute(images), model.embed_multimodal(**images), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert (manager.graph_hits, manager.graph_misses) == (22, 0)
        large = torch.rand(200, 3 * 8 * 8), torch.tensor([[10, 20]])
        (ours,) = manager.execute(dict(zip(("pixel_values", "image_grid"), large, strict=True)))
        assert (ours.shape, manager.graph_misses) == ((200, 128), 1)


def test_attention_that_cannot_be_captured_is_refused(engine):
    model = engine.llm.apply_model(lambda model: model)[0]
    with pytest.raises(ValueError, match=r"needs an encoder attention of \['FLASH_ATTN', 'TRITON_ATTN'\]"):
        model.get_encoder_cudagraph_config()


VISION = {"hidden_size": 64, "num_hidden_layers": 1}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (False, False)),
        ({"vision_config": VISION}, (True, True)),
        ({"vision_config": VISION, "pool_image": True}, (True, False)),
    ],
)
def test_what_is_compiled_and_captured(fields, expected):
    compilation = SimpleNamespace(compile_mm_encoder=False, cudagraph_mm_encoder=True)
    model = SimpleNamespace(hf_config=NMMConfig(**fields), is_mm_prefix_lm=False)
    NMMSettings.verify_and_update_config(
        SimpleNamespace(model_config=model, compilation_config=compilation, scheduler_config=None)
    )
    assert (compilation.compile_mm_encoder, compilation.cudagraph_mm_encoder) == expected
