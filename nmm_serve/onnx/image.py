"""The way from pixels to image tokens as a graph: one linear layer (early), or a ViT and a connector (late).

Legend: H W pixels, p patch size, R C rows and columns of patches, P = R*C patches, K numbers in a patch, D width.
"""

from pathlib import Path

import numpy as np

from nmm_serve.config import NMMConfig
from nmm_serve.onnx.decoder import Weights, head_norm
from nmm_serve.onnx.graph import CONTRIB, FLOAT, UINT8, Graph
from nmm_serve.onnx.quantize import Quantization


def write_image_front(path: Path, config: NMMConfig, weights: Weights, quantization: Quantization) -> None:
    """One image, already of a size that is cut into whole patches, to its tokens.

    Input: `pixels` [H, W, 3] uint8. Output: `image_embeds` [P, D]. The first layer, which sees pixels, stays fp32.
    """
    graph = Graph()
    p = config.patch_size
    rows = graph.op("Div", graph.shape("pixels", 0), graph.ints(p))
    cols = graph.op("Div", graph.shape("pixels", 1), graph.ints(p))
    split = graph.op("Concat", rows, graph.ints(p), cols, graph.ints(p, 3), axis=0)
    patches = graph.op("Transpose", graph.op("Reshape", "pixels", split), perm=[0, 2, 1, 3, 4])
    patches_PK = graph.op("Reshape", patches, graph.ints(-1, config.patch_dim))
    scaled_PK = graph.op("Div", graph.op("Cast", patches_PK, to=FLOAT), graph.scalar(127.5, np.float32))
    scaled_PK = graph.op("Sub", scaled_PK, graph.scalar(1.0, np.float32))
    x_PD = graph.linear(scaled_PK, weights["model.patch_embed.proj.weight"], "none", "patch")
    zero, one = graph.ints(0), graph.ints(1)
    row_RD = graph.op("Slice", graph.weight(weights["model.patch_embed.row_embed.weight"], "row"), zero, rows, zero)
    col_CD = graph.op("Slice", graph.weight(weights["model.patch_embed.col_embed.weight"], "col"), zero, cols, zero)
    position_RCD = graph.op("Add", graph.op("Unsqueeze", row_RD, one), graph.op("Unsqueeze", col_CD, zero))
    position_PD = graph.op("Reshape", position_RCD, graph.ints(-1, config.vision_width))
    x_PD = graph.op("Add", x_PD, position_PD)
    if config.encoder is not None:
        x_PD = encoder(graph, config, weights, quantization, x_PD)
    graph.op("Identity", x_PD, out=["image_embeds"])
    graph.save(path, {"pixels": (UINT8, ["H", "W", 3])}, {"image_embeds": (FLOAT, ["P", config.hidden_size])}, "image")


def encoder(graph: Graph, config: NMMConfig, weights: Weights, quantization: Quantization, x_PD: str) -> str:
    """The ViT, its last norm and the connector."""
    vision = config.encoder
    assert vision is not None
    H, C, eps = vision.num_attention_heads, vision.head_dim, vision.rms_norm_eps
    residual = graph.op("Unsqueeze", x_PD, graph.ints(0))
    x = graph.rms_norm(residual, weights["model.vision.layers.0.input_layernorm.weight"], eps)
    for i in range(vision.num_hidden_layers):
        layer = f"model.vision.layers.{i}."
        qkv = graph.linear(x, weights[layer + "self_attn.qkv_proj.weight"], quantization, f"vision.{i}.qkv")
        q, k, v = (graph.name(name) for name in "qkv")
        graph.op("Split", qkv, out=[q, k, v], axis=-1, num_outputs=3)
        q = head_norm(graph, q, H, C, weights[layer + "self_attn.q_norm.weight"], eps)
        k = head_norm(graph, k, H, C, weights[layer + "self_attn.k_norm.weight"], eps)
        attended = graph.op("MultiHeadAttention", q, k, v, domain=CONTRIB, num_heads=H)
        out = graph.linear(attended, weights[layer + "self_attn.o_proj.weight"], quantization, f"vision.{i}.o")
        x, residual = graph.add_rms_norm(residual, out, weights[layer + "post_attention_layernorm.weight"], eps)
        gate_up, down = weights[layer + "mlp.gate_up_proj.weight"], weights[layer + "mlp.down_proj.weight"]
        x = graph.swiglu(x, gate_up, down, quantization, f"vision.{i}")
        last = i == vision.num_hidden_layers - 1
        gain = weights["model.vision.norm.weight" if last else f"model.vision.layers.{i + 1}.input_layernorm.weight"]
        x, residual = graph.add_rms_norm(residual, x, gain, eps)
    x = graph.linear(x, weights["model.connector.weight"], quantization, "connector")
    return graph.op("Squeeze", x, graph.ints(0))
