"""Triton kernels for a few tokens and small experts: the whole layer, from the router's logits on, in two launches.

Where weights are read in a few microseconds, launches are what takes the time. A program takes one expert and a slice
of BN of its F columns: it chooses the experts of all tokens anew, which is cheap, computes its slice of the activation,
and multiplies it at once with the same slice of the down projection. What comes out is a part of each token's sum, and
the second kernel adds the parts up. They are many, F / BN for each slot, so large experts are better served by
`decode_triton.py`; `moe_configs.in_slices` decides.

Legend: `moe_reference.py`; M all tokens, padded; KP choices and EP experts padded; BD columns of the output at a time;
P parts of a token's sum.
"""

import triton
import triton.language as tl

from nmm_serve.kernels.grouped_triton import gather_rows, halves, load_gate_up, load_weight
from nmm_serve.kernels.route_triton import choose, store_statistics


@triton.jit(do_not_specialize=["T"])
def slices_kernel(
    x, logits, counted, gate_up, down, part, stat, T, D, F, E,
    K: tl.constexpr, KP: tl.constexpr, EP: tl.constexpr, SIGMOID: tl.constexpr, RENORMALIZE: tl.constexpr,
    COUNT_ALL: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """part [T, K, slices, D] float32: row (t, k) of slice s is what the columns of s add to slot (t, k)."""
    e, s = tl.program_id(0), tl.program_id(1)
    t_M = tl.arange(0, BM)
    weight_MK, expert_MK, chosen_ME, score_ME, total_M, lse_M = choose(
        logits, t_M, T, E, K, KP, EP, BM, SIGMOID, RENORMALIZE
    )
    if (e == 0) & (s == 0):
        store_statistics(stat, counted, t_M, T, E, chosen_ME, score_ME, total_M, lse_M, EP, COUNT_ALL)
    k_K = tl.arange(0, KP)
    hit_MK = (expert_MK == e) & (k_K < K)[None, :] & (t_M < T)[:, None]
    mine_M = tl.sum(hit_MK.to(tl.int32), 1) > 0
    if tl.max(mine_M.to(tl.int32), 0) > 0:
        slot_M = t_M * K + tl.sum(tl.where(hit_MK, k_K[None, :], 0), 1)
        weight_M = tl.sum(tl.where(hit_MK, weight_MK, 0.0), 1)
        n = s * BN
        both_MN = tl.zeros((BM, 2 * BN), tl.float32)
        for d in range(0, D, BK):
            x_ML = gather_rows(x, t_M, mine_M, d, D, BK)
            w_NL = load_gate_up(gate_up, e, n, d, F, D, BN, BK, TMA)
            both_MN = tl.dot(x_ML, w_NL.T, both_MN, input_precision=PRECISION)
        gate_MN, up_MN = halves(both_MN, BM, 2 * BN)
        act_MN = (gate_MN / (1.0 + tl.exp(-gate_MN)) * up_MN * weight_M[:, None]).to(x.dtype.element_ty)
        line_M = part + (slot_M * tl.num_programs(1) + s).to(tl.int64) * D
        for d in range(0, D, BD):
            w_DN = load_weight(down, e, d, n, D, F, BD, BN, TMA)
            part_MD = tl.dot(act_MN, w_DN.T, input_precision=PRECISION)
            d_D = d + tl.arange(0, BD)
            tl.store(line_M[:, None] + d_D[None, :], part_MD, mask=mine_M[:, None] & (d_D < D)[None, :])


@triton.jit
def sum_parts_kernel(part, out, P, D, BP: tl.constexpr, BD: tl.constexpr):
    """out[t] = the sum over a token's P parts, in a fixed order."""
    t = tl.program_id(0).to(tl.int64)
    d_D = tl.program_id(1) * BD + tl.arange(0, BD)
    sum_PD = tl.zeros((BP, BD), tl.float32)
    for first in range(0, P, BP):
        p_P = first + tl.arange(0, BP)
        mask_PD = (p_P < P)[:, None] & (d_D < D)[None, :]
        sum_PD += tl.load(part + (t * P + p_P[:, None]) * D + d_D[None, :], mask=mask_PD, other=0.0)
    tl.store(out + t * D + d_D, tl.sum(sum_PD, 0).to(out.dtype.element_ty), mask=d_D < D)
