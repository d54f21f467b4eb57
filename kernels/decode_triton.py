"""Triton kernels for a few tokens, without a sort: a tile holds all tokens, and reading the weights takes the time.

A program computes one expert's tile for all tokens and keeps the rows of those that chose it; an expert that nobody
chose costs nothing. The down projection is not summed over experts in one program: that would leave one program for
each tile of columns, too few to keep the memory of a large GPU busy (16 of them at 512 columns, for 132 processors).

Legend: `moe_reference.py`; M all tokens, padded; KP choices padded.
"""

import triton
import triton.language as tl

from nmm_serve.kernels.grouped_triton import gather_rows, halves, load_gate_up, load_weight


@triton.jit
def who_chose(expert, e, T, K: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr):
    """For each token: whether it chose expert `e`, and the slot of that choice."""
    t_M, k_K = tl.arange(0, BM), tl.arange(0, KP)
    mask_MK = (t_M < T)[:, None] & (k_K < K)[None, :]
    slot_MK = t_M[:, None] * K + k_K[None, :]
    hit_MK = tl.load(expert + slot_MK, mask=mask_MK, other=-1) == e
    return tl.sum(hit_MK.to(tl.int32), 1) > 0, tl.sum(tl.where(hit_MK, slot_MK, 0), 1)


@triton.jit(do_not_specialize=["T"])
def decode_up_kernel(
    x, w, expert, weight, act, T, D, F,
    K: tl.constexpr, KP: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    e, n = tl.program_id(0), tl.program_id(1) * BN
    mine_M, slot_M = who_chose(expert, e, T, K, KP, BM)
    if tl.max(mine_M.to(tl.int32), 0) > 0:
        t_M = tl.arange(0, BM)
        both_MN = tl.zeros((BM, 2 * BN), tl.float32)
        for d in range(0, D, BK):
            x_ML = gather_rows(x, t_M, mine_M, d, D, BK)
            w_NL = load_gate_up(w, e, n, d, F, D, BN, BK, TMA)
            both_MN = tl.dot(x_ML, w_NL.T, both_MN, input_precision=PRECISION)
        gate_MN, up_MN = halves(both_MN, BM, 2 * BN)
        act_MN = gate_MN / (1.0 + tl.exp(-gate_MN)) * up_MN
        act_MN *= tl.load(weight + slot_M, mask=mine_M, other=0.0)[:, None]
        n_N = n + tl.arange(0, BN)
        mask_MN = mine_M[:, None] & (n_N < F)[None, :]
        address_MN = act + slot_M[:, None].to(tl.int64) * F + n_N[None, :]
        tl.store(address_MN, act_MN.to(act.dtype.element_ty), mask=mask_MN)


@triton.jit(do_not_specialize=["T"])
def decode_down_kernel(
    act, w, expert, slot, T, D, F,
    K: tl.constexpr, KP: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    e, n = tl.program_id(0), tl.program_id(1) * BN
    mine_M, slot_M = who_chose(expert, e, T, K, KP, BM)
    if tl.max(mine_M.to(tl.int32), 0) > 0:
        acc_MN = tl.zeros((BM, BN), tl.float32)
        for f in range(0, F, BK):
            act_ML = gather_rows(act, slot_M, mine_M, f, F, BK)
            w_NL = load_weight(w, e, n, f, D, F, BN, BK, TMA)
            acc_MN = tl.dot(act_ML, w_NL.T, acc_MN, input_precision=PRECISION)
        n_N = n + tl.arange(0, BN)
        mask_MN = mine_M[:, None] & (n_N < D)[None, :]
        address_MN = slot + slot_M[:, None].to(tl.int64) * D + n_N[None, :]
        tl.store(address_MN, acc_MN.to(slot.dtype.element_ty), mask=mask_MN)
