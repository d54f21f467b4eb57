"""The decoder as one graph, for prompts and for single tokens, with its KV cache in place.

Legend: B batch, T new tokens, S cached and new tokens, M room in the cache, D hidden size, G key/value heads, C head
size, K positions whose logits are wanted, V vocabulary, P patches.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from nmm_serve.config import NMMConfig
from nmm_serve.onnx.graph import CONTRIB, FLOAT, INT32, INT64, Graph
from nmm_serve.onnx.moe import Routing, experts, learned_routing, modality_routing
from nmm_serve.onnx.quantize import Quantization, per_row_int8

BOOL = 9
LOWEST = float(np.finfo(np.float32).min)

Weights = Mapping[str, np.ndarray]


def write_decoder(path: Path, config: NMMConfig, weights: Weights, quantization: Quantization) -> None:
    """Token ids and image tokens to logits.

    Inputs: `input_ids` [B, T]; `image_embeds` [P, D], one row for each placeholder among the ids; `seqlens_k` [B], the
    tokens of each row after this step, less one; `total_len` [], the most of them; `logits_index` [K]; `past_key_i` and
    `past_value_i` [B, G, M, C]. With T = 1 the rows may differ in length. With T > 1 all rows have the same number of
    cached tokens, and an image lies within one call.
    Outputs: `logits` [B, K, V]; `present_key_i` and `present_value_i`, which may be the very memory of the past.
    """
    graph = Graph()
    eps = config.rms_norm_eps
    H, G, C = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    residual, bias = embed(graph, config, weights["model.embed_tokens.weight"], quantization)
    cos, sin = (graph.weight(table, "rope") for table in rope(config))
    by_modality: Routing | None = None
    if config.num_experts:
        width = graph.ints(config.hidden_size)
        shape_BTD = graph.op("Concat", graph.ints(-1), graph.shape("input_ids", 1), width, axis=0)
        if config.router == "modality":
            by_modality = modality_routing(graph, placeholder_id(config))
    x = graph.rms_norm(residual, weights["model.layers.0.input_layernorm.weight"], eps)
    inputs: dict = {
        "input_ids": (INT64, ["B", "T"]),
        "image_embeds": (FLOAT, ["P", config.hidden_size]),
        "seqlens_k": (INT32, ["B"]),
        "total_len": (INT32, []),
        "logits_index": (INT64, ["K"]),
    }
    outputs: dict = {"logits": (FLOAT, ["B", "K", config.vocab_size])}
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}."
        qkv = graph.linear(x, weights[layer + "self_attn.qkv_proj.weight"], quantization, f"{i}.qkv")
        q, k, v = (graph.name(name) for name in "qkv")
        graph.op("Split", qkv, graph.ints(H * C, G * C, G * C), out=[q, k, v], axis=-1)
        if config.qk_norm:
            q = head_norm(graph, q, H, C, weights[layer + "self_attn.q_norm.weight"], eps)
            k = head_norm(graph, k, G, C, weights[layer + "self_attn.k_norm.weight"], eps)
        past = [f"past_key_{i}", f"past_value_{i}"]
        present = [f"present_key_{i}", f"present_value_{i}"]
        inputs |= {name: (FLOAT, ["B", G, "M", C]) for name in past}
        outputs |= {name: (FLOAT, ["B", G, "M", C]) for name in present}
        # causal=0: the bias holds the whole mask, since a causal mask on top could not be opened for an image
        attended = graph.op(
            "GroupQueryAttention", q, k, v, *past, "seqlens_k", "total_len", cos, sin, "", bias,
            out=[graph.name("attended"), *present], domain=CONTRIB, num_heads=H, kv_num_heads=G, do_rotary=1, causal=0,
        )  # fmt: skip
        out = graph.linear(attended, weights[layer + "self_attn.o_proj.weight"], quantization, f"{i}.o")
        x, residual = graph.add_rms_norm(residual, out, weights[layer + "post_attention_layernorm.weight"], eps)
        if config.num_experts:
            x_ND = graph.op("Reshape", x, graph.ints(-1, config.hidden_size))
            routing = by_modality or learned_routing(
                graph, x_ND, weights[layer + "mlp.gate.weight"], top_k=config.num_experts_per_tok,
                renormalize=config.norm_topk_prob, hint=str(i),
            )  # fmt: skip
            gate_up, down = weights[layer + "mlp.experts.gate_up_proj"], weights[layer + "mlp.experts.down_proj"]
            y_ND = experts(graph, x_ND, routing, gate_up, down, quantization, str(i))
            x = graph.op("Reshape", y_ND, shape_BTD)
        else:
            gate_up, down = weights[layer + "mlp.gate_up_proj.weight"], weights[layer + "mlp.down_proj.weight"]
            x = graph.swiglu(x, gate_up, down, quantization, str(i))
        last = i == config.num_hidden_layers - 1
        gain = weights["model.norm.weight" if last else f"model.layers.{i + 1}.input_layernorm.weight"]
        x, residual = graph.add_rms_norm(residual, x, gain, eps)
    wanted = graph.op("Gather", x, "logits_index", axis=1)
    head = weights["lm_head.weight"]
    if quantization == "int4":  # its errors go straight into the answer
        logits = graph.linear_blocks(wanted, head, 8, "lm_head")
    else:
        logits = graph.linear(wanted, head, quantization, "lm_head")
    if config.image_token_id is not None:
        # only an image can stand behind its placeholder
        is_placeholder_V = graph.weight(np.arange(config.vocab_size) == config.image_token_id)
        graph.op("Where", is_placeholder_V, graph.scalar(LOWEST, np.float32), logits, out=["logits"])
    else:
        graph.op("Identity", logits, out=["logits"])
    graph.save(path, inputs, outputs, "decoder")


def placeholder_id(config: NMMConfig) -> int:
    """The token of an image patch; no token in a model without images."""
    return -1 if config.image_token_id is None else config.image_token_id


def head_norm(graph: Graph, x: str, num_heads: int, head_dim: int, gain: np.ndarray, eps: float) -> str:
    """RMSNorm of each head by itself; [B, T, heads * C] in and out."""
    x_BTHC = graph.op("Reshape", x, graph.ints(0, 0, num_heads, head_dim))
    return graph.op("Reshape", graph.rms_norm(x_BTHC, gain, eps), graph.ints(0, 0, num_heads * head_dim))


def rope(config: NMMConfig) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of every position, each [context, C/2], rounded as `models/blocks.py` rounds them."""
    import torch

    from nmm_serve.models.blocks import rope_tables

    position_1T = torch.arange(config.max_position_embeddings)[None]
    cos, sin = rope_tables(position_1T, config.head_dim, config.rope_theta, torch.float32)
    return cos[0, 0].numpy(), sin[0, 0].numpy()


def embed(graph: Graph, config: NMMConfig, table_VD: np.ndarray, quantization: Quantization) -> tuple[str, str]:
    """Decoder inputs [B, T, D] and attention bias [B or 1, 1, T, S]. A single token needs neither images nor a mask, so
    it takes the short branch."""
    if quantization == "none":
        x_BTD = graph.op("Gather", graph.weight(table_VD, "embed"), "input_ids")
    else:
        code_VD, scale_V1 = per_row_int8(table_VD)
        code_BTD = graph.op("Gather", graph.weight(code_VD, "embed"), "input_ids")
        scale_BT1 = graph.op("Gather", graph.weight(scale_V1, "embed"), "input_ids")
        x_BTD = graph.op("Mul", graph.op("Cast", code_BTD, to=FLOAT), scale_BT1)
    num_new = graph.shape("input_ids", 1)
    num_all = graph.op("Reshape", graph.op("Cast", "total_len", to=INT64), graph.ints(1))

    prompt = Graph(graph)
    is_image_BT = prompt.op("Equal", "input_ids", prompt.scalar(placeholder_id(config)))
    row_P1 = prompt.op("Transpose", prompt.op("NonZero", is_image_BT), perm=[1, 0])
    filled_BTD = prompt.op("ScatterND", x_BTD, row_P1, "image_embeds")
    bias_B1TS = attention_bias(prompt, is_image_BT, num_new, num_all)

    token = Graph(graph)
    same_BTD = token.op("Identity", x_BTD)
    shape = token.op("Concat", token.ints(1, 1, 1), num_all, axis=0)
    no_bias_111S = token.op("Expand", token.scalar(0.0, np.float32), shape)

    outputs = [graph.name("residual"), graph.name("bias")]
    graph.op(
        "If", graph.op("Greater", num_new, graph.ints(1)), out=outputs,
        then_branch=prompt.branch("prompt", [filled_BTD, bias_B1TS]),
        else_branch=token.branch("token", [same_BTD, no_bias_111S]),
    )  # fmt: skip
    return outputs[0], outputs[1]


def attention_bias(graph: Graph, is_image_BT: str, num_new: str, num_all: str) -> str:
    """0 where `models/masks.py` allows attention, the lowest number elsewhere. [B, 1, T, S]"""
    num_past = graph.op("Sub", num_all, num_new)
    zero, one = graph.scalar(0), graph.scalar(1)
    key_S = graph.op("Range", zero, graph.op("Squeeze", num_all), one)
    query_T = graph.op("Add", graph.op("Range", zero, graph.op("Squeeze", num_new), one), num_past)
    causal_TS = graph.op("LessOrEqual", key_S, graph.op("Unsqueeze", query_T, graph.ints(1)))
    image_BT = graph.op("Cast", is_image_BT, to=INT64)
    before_BT = graph.op("Slice", graph.op("Pad", image_BT, graph.ints(0, 1, 0, 0)), graph.ints(0), graph.ints(-1),
                         graph.ints(1))  # fmt: skip
    starts_BT = graph.op("Mul", image_BT, graph.op("Sub", one, before_BT))
    span_BT = graph.op("Mul", graph.op("CumSum", starts_BT, one), image_BT)
    span_BT1 = graph.op("Unsqueeze", span_BT, graph.ints(2))
    same_BTT = graph.op("Equal", span_BT1, graph.op("Unsqueeze", span_BT, graph.ints(1)))
    same_BTT = graph.op("And", same_BTT, graph.op("Greater", span_BT1, zero))
    padding = graph.op("Concat", graph.ints(0, 0), num_past, graph.ints(0, 0, 0), axis=0)
    # Pad knows no bool
    same_BTS = graph.op("Pad", graph.op("Cast", same_BTT, to=INT32), padding)
    allowed_BTS = graph.op("Or", causal_TS, graph.op("Cast", same_BTS, to=BOOL))
    bias_BTS = graph.op("Where", allowed_BTS, graph.scalar(0.0, np.float32), graph.scalar(LOWEST / 2, np.float32))
    return graph.op("Unsqueeze", bias_BTS, graph.ints(1))
