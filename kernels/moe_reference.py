"""The eager mixture-of-experts layer: the definition that every faster kernel is tested against, and the CPU's path.

Legend: T tokens, D hidden size, E experts, K experts a token, F expert hidden size, N = T*K routed rows.
"""

import torch
import torch.nn.functional as F


def route(logits_TE: torch.Tensor, top_k: int, renormalize: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Softmax over all experts in fp32, then the top k of each token.

    Returns:
        weight_TK (fp32), expert_TK (int64), probs_TE (fp32).
    """
    probs_TE = logits_TE.float().softmax(-1)
    weight_TK, expert_TK = probs_TE.topk(top_k, dim=-1)
    if renormalize:
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
    return weight_TK, expert_TK, probs_TE


def load_balancing_loss(probs_TE: torch.Tensor, expert_TK: torch.Tensor, valid_T: torch.Tensor | None = None):
    """Switch Transformer's loss (arXiv 2101.03961, eq. 4): E * sum_e share_e * mean probability_e. 1 when balanced.

    Args:
        valid_T: bool; tokens that count (padding does not).
    """
    num_experts = probs_TE.shape[1]
    chosen_TE = F.one_hot(expert_TK, num_experts).sum(1).to(probs_TE.dtype) / expert_TK.shape[1]
    if valid_T is not None:
        weight_T1 = valid_T[:, None].to(probs_TE.dtype) / valid_T.sum().clamp(min=1)
        return num_experts * ((chosen_TE * weight_T1).sum(0) * (probs_TE * weight_T1).sum(0)).sum()
    return num_experts * (chosen_TE.mean(0) * probs_TE.mean(0)).sum()


def moe_mlp(
    x_TD: torch.Tensor,
    weight_TK: torch.Tensor,
    expert_TK: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
) -> torch.Tensor:
    """Dropless SwiGLU experts: y_t = sum_k weight_tk * down_e(silu(gate_e x_t) * up_e x_t), e = expert_tk.

    Rows are sorted by expert, so each expert is one dense matrix product over a contiguous block.

    Returns:
        [T, D] in x's dtype.
    """
    T, D = x_TD.shape
    K = expert_TK.shape[1]
    order_N = expert_TK.reshape(-1).argsort(stable=True)
    counts = torch.bincount(expert_TK.reshape(-1), minlength=gate_up_E2FD.shape[0]).tolist()
    sorted_ND = x_TD[order_N // K]
    blocks = []
    for expert, block_nD in enumerate(sorted_ND.split(counts)):
        if block_nD.shape[0]:
            gate_nF, up_nF = F.linear(block_nD, gate_up_E2FD[expert]).chunk(2, dim=-1)
            blocks.append(F.linear(F.silu(gate_nF) * up_nF, down_EDF[expert]))
    if not blocks:
        return x_TD.clone()  # no tokens; still a function of x, so that a backward pass goes through
    weight_N1 = weight_TK.reshape(-1)[order_N, None].to(x_TD.dtype)
    out_ND = torch.empty_like(sorted_ND).index_copy(0, order_N, torch.cat(blocks) * weight_N1)
    return out_ND.view(T, K, D).sum(1)
