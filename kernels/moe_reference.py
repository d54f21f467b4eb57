"""The eager mixture-of-experts layer: one function for each launch of `moe_triton.py`, with the same signature.

They define what the kernels compute and are what the operators run on a CPU.

Legend: T tokens, D hidden size, E experts, K experts a token, F expert hidden size, N = T*K slots (slot t*K+k is
token t's k-th choice), B blocks of tokens, S statistics. "Sorted" is expert order: expert e owns the rows from
`offset_E1[e]` to `offset_E1[e + 1]`, and row i belongs to slot `order_N[i]`.
"""

import torch
import torch.nn.functional as F


def route_block(num_experts: int) -> int:
    """Tokens in one block of the routing pass; the statistics are summed over blocks."""
    return max(16, 2048 // (1 << (num_experts - 1).bit_length()))


def _wide(x: torch.Tensor) -> torch.Tensor:
    """fp32, or fp64 for fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _blocks(x_TE: torch.Tensor) -> torch.Tensor:
    """[T, E] -> [B, block, E], padded with zeros."""
    T, E = x_TE.shape
    block = route_block(E)
    return F.pad(x_TE, (0, 0, 0, -T % block)).view(-1, block, E)


def _scores(logits_TE: torch.Tensor, sigmoid: bool) -> torch.Tensor:
    return _wide(logits_TE).sigmoid() if sigmoid else _wide(logits_TE).softmax(-1)


def route(
    logits_TE: torch.Tensor, counted_T: torch.Tensor | None, top_k: int, sigmoid: bool, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores of all experts, the top k of each token, and the sums that the router's losses need, in one pass.

    Returns:
        weight_TK (fp32), expert_TK (int32), count_BE (int32: slots of each expert, of all tokens) and stat_BS (fp32:
        for the tokens where `counted_T` holds, slots of each expert, summed probability of each expert, summed
        squared logsumexp of the logits, number of tokens).
    """
    E = logits_TE.shape[1]
    score_TE = _scores(logits_TE, sigmoid)
    weight_TK, expert_TK = score_TE.topk(top_k, dim=-1)
    if renormalize:
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
    chosen_TE = torch.zeros_like(score_TE).scatter_(1, expert_TK, 1.0)
    prob_TE = score_TE / score_TE.sum(-1, keepdim=True) if sigmoid else score_TE
    square_T1 = _wide(logits_TE).logsumexp(-1, keepdim=True).square()
    counted_T1 = torch.ones_like(square_T1) if counted_T is None else counted_T[:, None].to(square_T1.dtype)
    stat_TS = torch.cat((chosen_TE, prob_TE, square_T1, torch.ones_like(square_T1)), dim=1)
    stat_TS = stat_TS.masked_fill(counted_T1 == 0, 0.0)
    block = route_block(E)
    stat_BS = F.pad(stat_TS, (0, 0, 0, -len(stat_TS) % block)).view(-1, block, 2 * E + 2).sum(1)
    return weight_TK, expert_TK.int(), _blocks(chosen_TE).sum(1).int(), stat_BS


def route_backward(
    dweight_TK: torch.Tensor,
    dstat_BS: torch.Tensor,
    logits_TE: torch.Tensor,
    expert_TK: torch.Tensor,
    counted_T: torch.Tensor | None,
    sigmoid: bool,
    renormalize: bool,
) -> torch.Tensor:
    """Gradient of the logits from that of the weights and of the summed probabilities and squared logsumexps."""
    T, E = logits_TE.shape
    score_TE = _scores(logits_TE, sigmoid)
    expert_TK = expert_TK.long()
    if renormalize:
        chosen_TK = score_TE.gather(1, expert_TK)
        total_T1 = chosen_TK.sum(-1, keepdim=True)
        inner_T1 = (dweight_TK * chosen_TK).sum(-1, keepdim=True) / total_T1
        dweight_TK = (dweight_TK - inner_T1) / total_T1
    dscore_TE = torch.zeros_like(score_TE).scatter_(1, expert_TK, dweight_TK.to(score_TE.dtype))
    dstat_TS = dstat_BS.repeat_interleave(route_block(E), dim=0)[:T]
    if counted_T is not None:
        dstat_TS = dstat_TS.masked_fill(~counted_T[:, None], 0.0)
    dprob_TE, dsquare_T1 = dstat_TS[:, E : 2 * E], dstat_TS[:, 2 * E : 2 * E + 1]
    if sigmoid:
        total_T1 = score_TE.sum(-1, keepdim=True)
        inner_T1 = (dprob_TE * score_TE).sum(-1, keepdim=True) / total_T1
        dscore_TE = dscore_TE + (dprob_TE - inner_T1) / total_T1
        dlogits_TE = score_TE * (1 - score_TE) * dscore_TE
    else:
        dscore_TE = dscore_TE + dprob_TE
        dlogits_TE = score_TE * (dscore_TE - (score_TE * dscore_TE).sum(-1, keepdim=True))
    wide_TE = _wide(logits_TE)
    dlogits_TE = dlogits_TE + 2 * dsquare_T1 * wide_TE.logsumexp(-1, keepdim=True) * wide_TE.softmax(-1)
    return dlogits_TE.to(logits_TE.dtype)


def count_experts(expert_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """count_BE of `route`, for experts that something else has chosen."""
    chosen_TE = F.one_hot(expert_TK.long(), num_experts).sum(1)
    return _blocks(chosen_TE).sum(1).int()


def sort_slots(expert_TK: torch.Tensor, count_BE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """order_N and offset_E1, both int32. Stable: within an expert, slots keep their order."""
    offset_E1 = F.pad(count_BE.sum(0).cumsum(0), (1, 0))
    return expert_TK.reshape(-1).argsort(stable=True).int(), offset_E1.int()


def _swiglu(pre_N2F: torch.Tensor) -> torch.Tensor:
    gate_NF, up_NF = pre_N2F.chunk(2, dim=-1)
    return F.silu(gate_NF) * up_NF


def _per_expert(offset_E1: torch.Tensor, *rows: torch.Tensor):
    """(expert, its rows of each tensor), for the experts that have any."""
    counts = offset_E1.diff().tolist()
    for expert, blocks in enumerate(zip(*(r.split(counts) for r in rows), strict=True)):
        if counts[expert]:
            yield expert, *blocks


def up_proj(
    x_TD: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    order_N: torch.Tensor,
    offset_E1: torch.Tensor,
    top_k: int,
    keep_pre: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """act_NF = silu(gate) * up, sorted, and the pre-activation [N, 2F] (empty unless `keep_pre`)."""
    x_ND = x_TD[order_N // top_k]
    pre_N2F = x_ND.new_empty(len(x_ND), gate_up_E2FD.shape[1])
    act_NF = x_ND.new_empty(len(x_ND), gate_up_E2FD.shape[1] // 2)
    for expert, x_nD, pre_n2F, act_nF in _per_expert(offset_E1, x_ND, pre_N2F, act_NF):
        torch.mm(x_nD, gate_up_E2FD[expert].T, out=pre_n2F)
        gate_nF, up_nF = pre_n2F.chunk(2, dim=-1)
        torch.mul(F.silu(gate_nF), up_nF, out=act_nF)
    return act_NF, pre_N2F if keep_pre else pre_N2F.new_empty(0, pre_N2F.shape[1])


def down_proj(
    act_NF: torch.Tensor,
    down_EDF: torch.Tensor,
    order_N: torch.Tensor,
    offset_E1: torch.Tensor,
    weight_TK: torch.Tensor,
) -> torch.Tensor:
    """Each sorted row through its expert's down projection, times its router weight, put at its slot: [N, D]."""
    out_ND = act_NF.new_empty(len(act_NF), down_EDF.shape[1])
    for expert, act_nF, out_nD in _per_expert(offset_E1, act_NF, out_ND):
        torch.mm(act_nF, down_EDF[expert].T, out=out_nD)
    out_ND *= weight_TK.reshape(-1)[order_N, None].to(out_ND.dtype)
    return torch.empty_like(out_ND).index_copy_(0, order_N.long(), out_ND)


def combine(slot_ND: torch.Tensor, top_k: int) -> torch.Tensor:
    """Sum over the k slots of each token: [T, D]."""
    return slot_ND.view(-1, top_k, slot_ND.shape[1]).sum(1)


def decode_up(
    x_TD: torch.Tensor, gate_up_E2FD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor
) -> torch.Tensor:
    """act_NF in slot order, times the router's weight."""
    T, K = expert_TK.shape
    act_TKF = x_TD.new_zeros(T, K, gate_up_E2FD.shape[1] // 2)
    for expert in expert_TK.unique().tolist():
        t, k = (expert_TK == expert).nonzero(as_tuple=True)
        act_nF = _swiglu(x_TD[t] @ gate_up_E2FD[expert].T)
        act_TKF[t, k] = act_nF * weight_TK[t, k, None].to(act_nF.dtype)
    return act_TKF.view(T * K, -1)


def decode_down(act_NF: torch.Tensor, down_EDF: torch.Tensor, expert_TK: torch.Tensor) -> torch.Tensor:
    """slot_ND: act through the down projection of each slot's expert."""
    expert_N = expert_TK.reshape(-1)
    slot_ND = act_NF.new_empty(len(act_NF), down_EDF.shape[1])
    for expert in expert_N.unique().tolist():
        n = expert_N == expert
        slot_ND[n] = act_NF[n] @ down_EDF[expert].T
    return slot_ND


def decode_layer(
    x_TD: torch.Tensor,
    logits_TE: torch.Tensor,
    counted_T: torch.Tensor | None,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
    top_k: int,
    sigmoid: bool,
    renormalize: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole layer after the router's logits: y_TD, and stat_BS of `route`."""
    weight_TK, expert_TK, _, stat_BS = route(logits_TE, counted_T, top_k, sigmoid, renormalize)
    act_NF = decode_up(x_TD, gate_up_E2FD, expert_TK, weight_TK)
    return combine(decode_down(act_NF, down_EDF, expert_TK), top_k), stat_BS


def down_backward(
    dy_TD: torch.Tensor,
    down_EDF: torch.Tensor,
    pre_N2F: torch.Tensor,
    order_N: torch.Tensor,
    offset_E1: torch.Tensor,
    weight_TK: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Back through combine, down projection and SwiGLU.

    Returns:
        dpre_N2F and the weighted activation w * act (for the weight's gradient), both sorted, and dweight_TK.
    """
    N, K, F2 = len(order_N), weight_TK.shape[1], pre_N2F.shape[1]
    dpre_N2F = torch.empty_like(pre_N2F)
    weighted_act_NF = pre_N2F.new_empty(N, F2 // 2)
    dweight_N = torch.empty(N, dtype=weight_TK.dtype, device=dy_TD.device)
    weight_N1 = weight_TK.reshape(-1)[order_N, None].to(pre_N2F.dtype)
    rows = dy_TD[order_N // K], pre_N2F, dpre_N2F, weighted_act_NF, weight_N1, dweight_N
    # one expert at a time: its rows stay in the cache through all of this
    for expert, dy_nD, pre_n2F, dpre_n2F, weighted_act_nF, weight_n1, dweight_n in _per_expert(offset_E1, *rows):
        dact_nF = dy_nD @ down_EDF[expert]  # of the unweighted activation, before the weight
        (gate_nF, up_nF), (dgate_nF, dup_nF) = pre_n2F.chunk(2, dim=-1), dpre_n2F.chunk(2, dim=-1)
        silu_nF = F.silu(gate_nF)
        act_nF = silu_nF * up_nF
        torch.sum(_wide(dact_nF) * act_nF, dim=-1, dtype=weight_TK.dtype, out=dweight_n)
        torch.mul(act_nF, weight_n1, out=weighted_act_nF)
        dact_nF *= weight_n1
        torch.mul(dact_nF, silu_nF, out=dup_nF)
        dact_nF *= up_nF
        torch.ops.aten.silu_backward.grad_input(dact_nF, gate_nF, grad_input=dgate_nF)
    dweight_TK = torch.empty_like(dweight_N).index_copy_(0, order_N.long(), dweight_N).view_as(weight_TK)
    return dpre_N2F, weighted_act_NF, dweight_TK


def up_backward(
    dpre_N2F: torch.Tensor, gate_up_E2FD: torch.Tensor, order_N: torch.Tensor, offset_E1: torch.Tensor
) -> torch.Tensor:
    """Gradient of the input, one row a slot: [N, D]."""
    dx_ND = dpre_N2F.new_empty(len(dpre_N2F), gate_up_E2FD.shape[2])
    for expert, dpre_n2F, dx_nD in _per_expert(offset_E1, dpre_N2F, dx_ND):
        torch.mm(dpre_n2F, gate_up_E2FD[expert], out=dx_nD)
    return torch.empty_like(dx_ND).index_copy_(0, order_N.long(), dx_ND)


def _weight_grad(like: torch.Tensor, offset_E1: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """[E, rows, cols], written only for experts without tokens: the gradient of a large model is as large again, and
    every pass over it counts."""
    counts = offset_E1.diff().tolist()
    grad_ERC = like.new_empty(len(counts), rows, cols)
    for expert, count in enumerate(counts):
        if not count:
            grad_ERC[expert] = 0
    return grad_ERC


def up_weight_grad(
    dpre_N2F: torch.Tensor, x_TD: torch.Tensor, order_N: torch.Tensor, offset_E1: torch.Tensor, top_k: int
) -> torch.Tensor:
    """dgate_up [E, 2F, D]; zero for an expert without tokens."""
    grad_E2FD = _weight_grad(x_TD, offset_E1, dpre_N2F.shape[1], x_TD.shape[1])
    for expert, dpre_n2F, x_nD in _per_expert(offset_E1, dpre_N2F, x_TD[order_N // top_k]):
        torch.mm(dpre_n2F.T, x_nD, out=grad_E2FD[expert])
    return grad_E2FD


def down_weight_grad(
    dy_TD: torch.Tensor, weighted_act_NF: torch.Tensor, order_N: torch.Tensor, offset_E1: torch.Tensor, top_k: int
) -> torch.Tensor:
    """ddown [E, D, F]; zero for an expert without tokens."""
    grad_EDF = _weight_grad(dy_TD, offset_E1, dy_TD.shape[1], weighted_act_NF.shape[1])
    for expert, act_nF, dy_nD in _per_expert(offset_E1, weighted_act_NF, dy_TD[order_N // top_k]):
        torch.mm(dy_nD.T, act_nF, out=grad_EDF[expert])
    return grad_EDF
