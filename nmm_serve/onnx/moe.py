"""A mixture of experts as a graph of its own: tokens are sorted by expert and cut into one piece an expert.

ONNX Runtime's `MoE` operator is no faster on a CPU than a loop in Python, and gives wrong results where its input and
its output are both inner values of a graph. Here every expert has its products; those of an expert that no token chose
get no rows, which ends them at once, without a look at the weights. Branches (`If`) around the experts were slower: in
decode the weights of a step drive all else out of the caches, and then a branch that is not taken costs 6 microseconds,
a product without rows about one.

Legend: N tokens, K experts a token, R = N*K choices (choice n*K + k is token n's k-th), D width, E experts, F expert
width.
"""

from dataclasses import dataclass

import numpy as np

from nmm_serve.onnx.graph import INT64, Graph
from nmm_serve.onnx.quantize import Quantization


@dataclass(frozen=True)
class Routing:
    """Who computes what; values in the graph.

    Attributes:
        order_R1: the choices, sorted by expert.
        count_E: choices of each expert.
        weight_NK: of each choice; None for 1.
        top_k: K.
    """

    order_R1: str
    count_E: str
    weight_NK: str | None
    top_k: int


def learned_routing(
    graph: Graph, x_ND: str, router_ED: np.ndarray, *, top_k: int, renormalize: bool, hint: str
) -> Routing:
    """The top k of a softmax over all experts. The router stays fp32."""
    probs_NE = graph.op("Softmax", graph.linear(x_ND, router_ED, "none", f"{hint}.router"), axis=-1)
    weight_NK, expert_NK = graph.name("weight"), graph.name("expert")
    graph.op("TopK", probs_NE, graph.ints(top_k), out=[weight_NK, expert_NK], axis=-1)
    if renormalize:
        weight_NK = graph.op("Div", weight_NK, graph.op("ReduceSum", weight_NK, graph.ints(-1), keepdims=1))
    return _routing(graph, expert_NK, weight_NK, num_experts=len(router_ED), top_k=top_k)


def modality_routing(graph: Graph, image_token_id: int) -> Routing:
    """Expert 0 for text, expert 1 for image patches."""
    is_image_N1 = graph.op("Equal", graph.op("Reshape", "input_ids", graph.ints(-1, 1)), graph.scalar(image_token_id))
    return _routing(graph, graph.op("Cast", is_image_N1, to=INT64), None, num_experts=2, top_k=1)


def _routing(graph: Graph, expert_NK: str, weight_NK: str | None, *, num_experts: int, top_k: int) -> Routing:
    expert_R1 = expert_NK if top_k == 1 else graph.op("Reshape", expert_NK, graph.ints(-1, 1))
    order_R1 = graph.name("order")
    graph.op("TopK", expert_R1, graph.shape(expert_R1, 0), out=[graph.name("sorted"), order_R1], axis=0, largest=0)
    chosen_R1E = graph.op("OneHot", expert_R1, graph.scalar(num_experts), graph.ints(0, 1))
    count_E = graph.op("ReduceSum", chosen_R1E, graph.ints(0, 1), keepdims=0)
    return Routing(order_R1, count_E, weight_NK, top_k)


def experts(
    graph: Graph,
    x_ND: str,
    routing: Routing,
    gate_up_E2FD: np.ndarray,
    down_EDF: np.ndarray,
    quantization: Quantization,
    hint: str,
) -> str:
    """The weighted sum of the chosen experts, as in `kernels/moe_reference.py`. [N, D]"""
    top_k = routing.top_k
    token_R1 = routing.order_R1 if top_k == 1 else graph.op("Div", routing.order_R1, graph.scalar(top_k))
    x_RD = graph.op("GatherND", x_ND, token_R1)
    gate_up = _products(graph, x_RD, routing.count_E, gate_up_E2FD, quantization, f"{hint}.gate_up")
    out_RD = _products(graph, graph.gated(gate_up), routing.count_E, down_EDF, quantization, f"{hint}.down")
    # every row is written: the first tensor gives no more than its shape
    y_RD = graph.op("ScatterND", x_RD, routing.order_R1, out_RD)
    if top_k == 1:
        return y_RD if routing.weight_NK is None else graph.op("Mul", y_RD, routing.weight_NK)
    assert routing.weight_NK is not None
    y_NKD = graph.op("Reshape", y_RD, graph.ints(-1, top_k, down_EDF.shape[1]))
    weighted_NKD = graph.op("Mul", y_NKD, graph.op("Unsqueeze", routing.weight_NK, graph.ints(2)))
    return graph.op("ReduceSum", weighted_NKD, graph.ints(1), keepdims=0)


def _products(
    graph: Graph, x_RI: str, count_E: str, weight_EOI: np.ndarray, quantization: Quantization, hint: str
) -> str:
    """Each expert's weights times its own rows. [R, O]"""
    pieces = [graph.name("piece") for _ in weight_EOI]
    graph.op("Split", x_RI, count_E, out=pieces, axis=0)
    products = [
        graph.linear(piece, weight_OI, quantization, f"{hint}{e}")
        for e, (piece, weight_OI) in enumerate(zip(pieces, weight_EOI, strict=True))
    ]
    return graph.op("Concat", *products, axis=0)
