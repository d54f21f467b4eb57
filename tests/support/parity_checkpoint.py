"""Random checkpoints of every family whose next token is never in doubt: a fresh model's logits nearly tie, and a tie
falls to whoever rounds first."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tiny_checkpoint import make_checkpoint

from nmm_serve.checkpoint import load_model
from nmm_serve.engines.base import Engine, Request, SamplingParams
from nmm_serve.engines.parity import compare_engines

VISION = {"hidden_size": 64, "num_hidden_layers": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "early": {},
    "late": {"vision_config": VISION},
    "moe": {"num_experts": 4},
    "late-moe": {"vision_config": VISION, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True},
    # as language models of others are: also no QK-norm, and heads that are wider together than the model
    "tied": {
        "tie_word_embeddings": True, "num_key_value_heads": 1,
        "qk_norm": False, "head_dim": 64, "num_attention_heads": 4,
    },
}  # fmt: skip
TORCH_ONLY: dict[str, dict[str, Any]] = {"modality-moe": {"num_experts": 2, "router": "modality"}}
"""What vLLM does not serve."""


def make_parity_checkpoint(path: Path, family: str, **config: Any) -> Path:
    make_checkpoint(path, **(FAMILIES | TORCH_ONLY)[family] | config)
    model = load_model(path)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed" in name or "lm_head" in name:
                parameter.normal_()
            elif parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            else:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(path)
    return path


def noise_image(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def parity_requests(max_tokens: int = 16) -> list[Request]:
    """0 to 3 images of mixed sizes and shapes, at the front, within and one after another; some prompts share one."""
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    shared = noise_image(0, 64, 64)
    sizes = [(), ((64, 64),), ((50, 80), (17, 200)), (), ((300, 40),), ((9, 9), (64, 64), (90, 60))] * 2
    requests = []
    for i, shapes in enumerate(sizes):
        images = [noise_image(100 * i + k, *shape) for k, shape in enumerate(shapes)]
        content: list[dict] = [{"type": "text", "text": f"what is {'the circle ' * i}"}]
        content += [{"type": "image"} for _ in images]
        content.append({"type": "text", "text": "? <|image|> <|assistant|>"})
        if i % 2:
            images.insert(0, shared)
            content.insert(0, {"type": "image"})
        requests.append(Request(messages=[{"role": "user", "content": content}], images=images, sampling=sampling))
    images = [noise_image(1, 64, 64), noise_image(2, 40, 70)]
    requests.append(Request(prompt="<|image|> large <|image|><|user|>square", images=images, sampling=sampling))
    return requests


def assert_parity(reference: Engine, candidate: Engine, requests: list[Request]) -> None:
    """All tokens equal, and their log-probabilities as near as fp32 allows (seen: 2e-5 nats)."""
    parity = compare_engines(reference, candidate, requests)
    assert parity.num_equal == parity.num_requests == len(requests), parity
    assert parity.max_logprob_diff < 2e-4
    assert parity.num_tokens == sum(r.sampling.max_tokens for r in requests)
