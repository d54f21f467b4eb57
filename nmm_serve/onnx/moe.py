"""A mixture of experts as a graph of its own: each expert is a branch that runs only when a token chose it.

ONNX Runtime's `MoE` operator is no faster on a CPU than a loop in Python, and gives wrong results where its input and
its output are both inner values of a graph. A branch costs microseconds, and its products are the runtime's best.

Legend: N tokens, n tokens of one expert, D width, E experts, K experts a token.
"""

import numpy as np

from nmm_serve.onnx.graph import FLOAT, Graph
from nmm_serve.onnx.quantize import Quantization


def learned_weights(
    graph: Graph, x_BTD: str, router_ED: np.ndarray, *, top_k: int, renormalize: bool, hint: str
) -> str:
    """Softmax over all experts and the top k of them: [E, N], 0 where an expert was not chosen. Stays fp32."""
    num_experts, width = router_ED.shape
    x_ND = graph.op("Reshape", x_BTD, graph.ints(-1, width))
    probs_NE = graph.op("Softmax", graph.linear(x_ND, router_ED, "none", f"{hint}.router"), axis=-1)
    weight_NK, expert_NK = graph.name("weight"), graph.name("expert")
    graph.op("TopK", probs_NE, graph.ints(top_k), out=[weight_NK, expert_NK], axis=-1)
    if renormalize:
        weight_NK = graph.op("Div", weight_NK, graph.op("ReduceSum", weight_NK, graph.ints(-1), keepdims=1))
    numbers_E = graph.weight(np.arange(num_experts, dtype=np.int64))
    chosen_NKE = graph.op("Equal", graph.op("Unsqueeze", expert_NK, graph.ints(2)), numbers_E)
    weight_NKE = graph.op(
        "Mul", graph.op("Unsqueeze", weight_NK, graph.ints(2)), graph.op("Cast", chosen_NKE, to=FLOAT)
    )
    return graph.op("Transpose", graph.op("ReduceSum", weight_NKE, graph.ints(1), keepdims=0), perm=[1, 0])


def modality_weights(graph: Graph, image_token_id: int) -> str:
    """Expert 0 for text, expert 1 for image patches: [2, N]."""
    is_image_BT = graph.op("Equal", "input_ids", graph.scalar(image_token_id))
    image_1N = graph.op("Reshape", graph.op("Cast", is_image_BT, to=FLOAT), graph.ints(1, -1))
    text_1N = graph.op("Sub", graph.scalar(1.0, np.float32), image_1N)
    return graph.op("Concat", text_1N, image_1N, axis=0)


def experts(
    graph: Graph,
    x_BTD: str,
    weight_EN: str,
    gate_up_E2FD: np.ndarray,
    down_EDF: np.ndarray,
    quantization: Quantization,
    hint: str,
) -> str:
    """The weighted sum of the experts, as in `kernels/moe_reference.py`. [B, T, D]"""
    num_experts, width, _ = down_EDF.shape
    x_ND = graph.op("Reshape", x_BTD, graph.ints(-1, width))
    used_E = graph.op(
        "Greater", graph.op("ReduceMax", weight_EN, graph.ints(1), keepdims=0), graph.scalar(0.0, np.float32)
    )
    used = [graph.name("used") for _ in range(num_experts)]
    graph.op("Split", used_E, out=used, axis=0, num_outputs=num_experts)
    y_ND = graph.op("Mul", x_ND, graph.scalar(0.0, np.float32))
    for e in range(num_experts):
        then, otherwise = Graph(graph), Graph(graph)
        weight_N = then.op("Gather", weight_EN, then.scalar(e), axis=0)
        row_n1 = then.op("Transpose", then.op("NonZero", weight_N), perm=[1, 0])
        x_nD = then.op("GatherND", x_ND, row_n1)
        weight_n1 = then.op("Unsqueeze", then.op("GatherND", weight_N, row_n1), then.ints(1))
        out_nD = then.op(
            "Mul", then.swiglu(x_nD, gate_up_E2FD[e], down_EDF[e], quantization, f"{hint}.expert{e}"), weight_n1
        )
        added_ND = then.op("ScatterND", y_ND, row_n1, out_nD, reduction="add")
        same_ND = otherwise.op("Identity", y_ND)
        y_ND = graph.op(
            "If", used[e],
            then_branch=then.branch(f"{hint}.expert{e}", [added_ND]),
            else_branch=otherwise.branch(f"{hint}.no_expert{e}", [same_ND]),
        )  # fmt: skip
    return graph.op("Reshape", y_ND, graph.op("Shape", x_BTD))
