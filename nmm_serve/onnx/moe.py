"""A mixture of experts as a graph of its own: each expert is a branch that runs only if a token chose it.

ONNX Runtime's `MoE` operator is no faster on a CPU than a loop in Python, and gives wrong results where its input and
its output are both inner values of a graph. Here tokens are sorted by expert and cut into one piece an expert, so that
a layer is few nodes: the weights that a step reads drive all else out of the caches, and then each node costs about
two microseconds, whatever it computes.

Legend: N tokens, K experts a token, R = N*K choices (choice n*K + k is token n's k-th), D width, E experts, F expert
width.
"""

from dataclasses import dataclass

import numpy as np

from nmm_serve.onnx.graph import BOOL, FLOAT, INT64, Graph
from nmm_serve.onnx.quantize import Quantization


@dataclass(frozen=True)
class Routing:
    """Who computes what; names of values in the graph.

    Attributes:
        order_R1: the choices, sorted by expert.
        count_E: choices of each expert.
        used: for each expert, whether anyone chose it.
        weight_NK: of each choice; None for 1.
    """

    order_R1: str
    count_E: str
    used: list[str]
    weight_NK: str | None


def learned_routing(
    graph: Graph, x_ND: str, router_ED: np.ndarray, *, top_k: int, renormalize: bool, hint: str
) -> Routing:
    """The top k of a softmax over all experts. The router stays fp32."""
    probs_NE = graph.op("Softmax", graph.linear(x_ND, router_ED, "none", f"{hint}.router"), axis=-1)
    weight_NK, expert_NK = graph.name("weight"), graph.name("expert")
    graph.op("TopK", probs_NE, graph.ints(top_k), out=[weight_NK, expert_NK], axis=-1)
    if renormalize:
        weight_NK = graph.op("Div", weight_NK, graph.op("ReduceSum", weight_NK, graph.ints(-1), keepdims=1))
    return _routing(graph, expert_NK, weight_NK, len(router_ED), top_k)


def modality_routing(graph: Graph, image_token_id: int) -> Routing:
    """Expert 0 for text, expert 1 for image patches."""
    is_image_N1 = graph.op("Equal", graph.op("Reshape", "input_ids", graph.ints(-1, 1)), graph.scalar(image_token_id))
    return _routing(graph, graph.op("Cast", is_image_N1, to=INT64), None, num_experts=2, top_k=1)


def _routing(graph: Graph, expert_NK: str, weight_NK: str | None, num_experts: int, top_k: int) -> Routing:
    expert_R1 = expert_NK if top_k == 1 else graph.op("Reshape", expert_NK, graph.ints(-1, 1))
    order_R1 = graph.name("order")
    graph.op("TopK", expert_R1, graph.shape(expert_R1, 0), out=[graph.name("sorted"), order_R1], axis=0, largest=0)
    chosen_R1E = graph.op("OneHot", expert_R1, graph.scalar(num_experts), graph.ints(0, 1))
    count_E = graph.op("ReduceSum", chosen_R1E, graph.ints(0, 1), keepdims=0)
    used = [graph.name("used") for _ in range(num_experts)]
    graph.op("Split", graph.op("Cast", count_E, to=BOOL), out=used, num_outputs=num_experts)
    return Routing(order_R1, count_E, used, weight_NK)


def experts(
    graph: Graph,
    x_ND: str,
    routing: Routing,
    gate_up_E2FD: np.ndarray,
    down_EDF: np.ndarray,
    quantization: Quantization,
    top_k: int,
    hint: str,
) -> str:
    """The weighted sum of the chosen experts, as in `kernels/moe_reference.py`. [N, D]"""
    num_experts, width, _ = down_EDF.shape
    token_R1 = routing.order_R1 if top_k == 1 else graph.op("Div", routing.order_R1, graph.scalar(top_k))
    x_RD = graph.op("GatherND", x_ND, token_R1)
    pieces = [graph.name("piece") for _ in range(num_experts)]
    graph.op("Split", x_RD, routing.count_E, out=pieces, axis=0)
    outputs = []
    for e, (used, piece) in enumerate(zip(routing.used, pieces, strict=True)):
        name = f"{hint}.expert{e}"
        then, otherwise = Graph(graph), Graph(graph)
        computed = then.swiglu(piece, gate_up_E2FD[e], down_EDF[e], quantization, name)
        outputs.append(graph.op(
            "If", used, then_branch=then.branch(name, [computed]),
            else_branch=otherwise.branch(f"{name}.unused", [otherwise.op("Identity", piece)]),
        ))  # fmt: skip
    # every row is written; the tensor below gives no more than its shape
    y_RD = graph.op("ScatterND", x_RD, routing.order_R1, graph.op("Concat", *outputs, axis=0))
    if top_k == 1:
        return y_RD if routing.weight_NK is None else graph.op("Mul", y_RD, routing.weight_NK)
    y_NKD = graph.op("Reshape", y_RD, graph.ints(-1, top_k, width))
    weighted_NKD = graph.op("Mul", y_NKD, graph.op("Unsqueeze", routing.weight_NK, graph.ints(2)))
    return graph.op("ReduceSum", weighted_NKD, graph.ints(1), keepdims=0)
