"""Is what a peer computes the layer at all? Nothing is timed before it agrees with float32.

Legend: T tokens, D hidden size, F expert hidden size, E experts, K experts a token.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

BOUND = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-5}
"""Largest |actual - expected| / |expected| (Frobenius norms) for each type: several roundings of the type."""
TOKENS = 256
"""Float32 is worked out for so many tokens of the cell, since all of them would take longer than the measurement.
A peer always gets the whole batch, so that what is checked are the very kernels that are timed; the output's gradient
is zero outside these tokens, which leaves the weights' gradients what these tokens alone give."""


def exact_layer(x_TD, logits_TE, gate_up_E2FD, down_EDF, top_k: int) -> torch.Tensor:
    """The definition, in float32: softmax over all experts, the chosen ones' weights as they are."""
    weight_TK, expert_TK = logits_TE.float().softmax(-1).topk(top_k, dim=-1)
    y_TD = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
    for e in range(gate_up_E2FD.shape[0]):
        t_N, k_N = (expert_TK == e).nonzero(as_tuple=True)
        gate_NF, up_NF = F.linear(x_TD[t_N].float(), gate_up_E2FD[e].float()).chunk(2, dim=-1)
        out_ND = F.linear(F.silu(gate_NF) * up_NF, down_EDF[e].float())
        y_TD = y_TD.index_add(0, t_N, out_ND * weight_TK[t_N, k_N, None])
    return y_TD


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error; infinite when anything is not finite."""
    difference = (actual.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-30)
    return float(difference) if torch.isfinite(difference) else float("inf")


def gradients(layer, x_TD, logits_TE, weights: Sequence[torch.Tensor], dy_TD) -> list[torch.Tensor]:
    """Of x, the router's logits and the weights."""
    leaves = [x_TD.detach().requires_grad_(), logits_TE.detach().requires_grad_()]
    y_TD = layer(*leaves)
    return list(torch.autograd.grad(y_TD, [*leaves, *weights], dy_TD.to(y_TD.dtype)))
