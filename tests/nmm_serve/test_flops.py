"""Closed-form FLOPs against torch's own counter, and against the paper's 6ND. Attention is named apart."""

import numpy as np
import pytest
import torch
from parity_checkpoint import FAMILIES
from PIL import Image
from tiny_checkpoint import make_checkpoint
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import silu
from torch.utils.flop_counter import FlopCounterMode

from nmm_serve.checkpoint import load_model, load_processor
from nmm_serve.config import NMMConfig
from nmm_serve.kernels.moe import route
from nmm_serve.presets import PAPER, preset
from nmm_serve.sizing import attention_flops, count_params, paper_flops, training_flops
from nmm_serve.train.parts import part_of

NAMES = ("early", "late", "moe", "late-moe")


def plain_moe(x_TD, logits_TE, gate_up_E2FD, down_EDF, *, top_k, renormalize, counted_T):
    """The experts as separate layers: the counter cannot look into our operators."""
    weight_TK, expert_TK, _, stats = route(logits_TE, top_k, renormalize=renormalize, counted_T=counted_T)
    y_TD = torch.zeros_like(x_TD)
    for e in range(logits_TE.shape[-1]):
        token, k = torch.where(expert_TK == e)
        gate, up = (x_TD[token] @ gate_up_E2FD[e].T).chunk(2, -1)
        y_TD = y_TD.index_add(0, token, (silu(gate) * up * weight_TK[token, k, None]) @ down_EDF[e].T)
    return y_TD, stats


def counted(model, inputs) -> tuple[int, int]:
    """FLOPs of the layers' products and of attention, forward and backward. Plain attention is all that makes bmm."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs).loss.backward()
    by_operator = counter.get_flop_counts()["Global"]
    attention = by_operator.pop(torch.ops.aten.bmm)
    return sum(by_operator.values()), attention


@pytest.mark.parametrize("family", NAMES)
def test_profiler_and_closed_form_agree_within_two_percent(family, tmp_path, monkeypatch):
    monkeypatch.setattr("nmm_serve.models.blocks.moe_mlp", plain_moe)
    path = make_checkpoint(tmp_path / "m", **FAMILIES[family])
    model, processor = load_model(path).train(), load_processor(path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    text = "<|image|>" + "a large square and a small circle . " * 12
    inputs = dict(processor(images=[image], text=text, return_tensors="pt"))
    labels = inputs["input_ids"].clone()
    labels[labels == model.config.image_token_id] = -100
    products, attention = counted(model, {**inputs, "labels": labels})
    tokens, images, c, v = inputs["input_ids"].shape[1], [64], model.config, model.config.encoder
    own_attention = 3 * attention_flops(c.num_hidden_layers, c.num_attention_heads * c.head_dim, [tokens])
    if v is not None:
        own_attention += 3 * attention_flops(v.num_hidden_layers, v.hidden_size, images)
    total = training_flops(c, images, [tokens], logits=int((labels[:, 1:] != -100).sum()))
    # pixels get no gradient, so the patch layer has one product fewer than "three times the forward pass"
    pixels = 2 * c.patch_dim * c.vision_width * sum(images)
    assert products == pytest.approx(total - own_attention - pixels, rel=0.02)
    assert attention == pytest.approx(own_attention, rel=0.02)


@pytest.mark.parametrize("trained", ["vision", "connector", "decoder"])
def test_frozen_parts_cost_what_the_profiler_counts(trained, tmp_path):
    model = load_model(make_checkpoint(tmp_path / "m", **FAMILIES["late"])).train()
    c = model.config
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name, late=True) == trained)
    ids = torch.tensor([[c.image_token_id] * 64 + list(range(20, 220))])
    pixels, grid = torch.zeros(64, c.patch_dim), torch.tensor([[8, 8]])
    labels = ids.masked_fill(ids == c.image_token_id, -100)
    inputs = {"input_ids": ids, "pixel_values": pixels, "image_grid": grid, "labels": labels}
    total = training_flops(c, [64], [264], logits=200, trained=[trained])
    pixels_again = 2 * c.patch_dim * c.vision_width * 64 if trained == "vision" else 0  # they get no gradient
    assert sum(counted(model, inputs)) == pytest.approx(total - pixels_again, rel=0.02)


@pytest.mark.parametrize("name", [n for n in PAPER if n != "early-8.13b"])
@pytest.mark.parametrize("experts", [0, 8])
def test_closed_form_and_the_papers_convention_agree_within_two_percent(name, experts):
    """Without attention, and with the output layer at every position, as 6ND has it. What is left: the patch layer,
    connector and router, which 6ND leaves out, and the look-up of embeddings, which it counts as a product."""
    shape = preset(name)
    vision = shape.vision_hidden_size and {"hidden_size": shape.vision_hidden_size, "num_hidden_layers": 24}
    config = NMMConfig(
        hidden_size=shape.hidden_size, num_hidden_layers=24, vision_config=vision, num_experts=experts
    )  # fmt: skip
    images, tokens = [256], 1024
    ours = training_flops(config, images, [tokens], logits=tokens)
    ours -= 3 * attention_flops(24, config.hidden_size, [tokens])
    if config.encoder is not None:
        ours -= 3 * attention_flops(24, config.encoder.hidden_size, images)
    lookup = 6 * config.vocab_size * config.hidden_size * tokens
    assert ours + lookup == pytest.approx(paper_flops(config, 256, tokens - 256), rel=0.02)
    assert lookup < 0.16 * 6 * count_params(config).paper * tokens
