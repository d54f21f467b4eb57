"""Triton kernels for many tokens: grouped matrix products over rows in expert order.

A tile is BM rows of one expert. How many tiles there are is known to the device alone: the grid has the most there can
be, and a program past the last tile finds that out from the offsets and ends. Each output element is written by one
program: no atomics.

Programs loop over tiles, so a grid of one program a processor makes the same kernel persistent. `flatten` then makes
one loop of the two, over tiles and over a tile's depth: the next tile's first loads are under way while a tile is
stored. The weights' gradients keep two loops, since how deep their tiles are is known to the device alone.

Weights are read through tensor descriptors (TMA on Hopper and later) where TMA holds, else through pointers.

Legend: `moe_reference.py`; M, N, L a tile's rows, columns and depth; R rows of a tile; EP experts padded;
Q a quarter of a tile's columns.
"""

import triton
import triton.language as tl


@triton.jit
def load_weight(w, e, row, col, rows, cols, BR: tl.constexpr, BC: tl.constexpr, TMA: tl.constexpr):
    """w[e, row : row + BR, col : col + BC]; zero past the end."""
    if TMA:
        return w.load([e, row, col]).reshape(BR, BC)
    else:
        r_R, c_C = row + tl.arange(0, BR), col + tl.arange(0, BC)
        address = (e * rows + r_R[:, None]).to(tl.int64) * cols + c_C[None, :]
        return tl.load(w + address, mask=(r_R < rows)[:, None] & (c_C < cols)[None, :], other=0.0)


@triton.jit
def load_gate_up(w, e, row, col, F, cols, BR: tl.constexpr, BC: tl.constexpr, TMA: tl.constexpr):
    """The gate's rows `row : row + BR` of w [E, 2F, D] over the up projection's, [2 BR, BC]; zero past F.

    One product with both has one accumulator: two could not be started anew in a loop over tiles without a stop of the
    tensor cores.
    """
    if TMA:
        return w.load([e, 0, row, col]).reshape(2 * BR, BC)
    else:
        r_R, c_C = tl.arange(0, 2 * BR), col + tl.arange(0, BC)
        inside_R = row + r_R % BR
        address = (e * (2 * F) + r_R // BR * F + inside_R)[:, None].to(tl.int64) * cols + c_C[None, :]
        return tl.load(w + address, mask=(inside_R < F)[:, None] & (c_C < cols)[None, :], other=0.0)


@triton.jit
def halves(x_MN, BM: tl.constexpr, BN: tl.constexpr):
    """The left and the right half of a tile's columns."""
    return x_MN.reshape(BM, 2, BN // 2).permute(0, 2, 1).split()


@triton.jit
def load_rows(a, row, col, end, cols, BR: tl.constexpr, BC: tl.constexpr, TMA: tl.constexpr):
    """a[row : row + BR, col : col + BC]. Rows past `end` are another expert's or zero, and never used."""
    if TMA:
        return a.load([row, col])
    else:
        r_R, c_C = row + tl.arange(0, BR), col + tl.arange(0, BC)
        mask = (r_R < end)[:, None] & (c_C < cols)[None, :]
        return tl.load(a + r_R[:, None].to(tl.int64) * cols + c_C[None, :], mask=mask, other=0.0)


@triton.jit
def gather_rows(a, index_M, real_M, col, cols, BC: tl.constexpr):
    """a[index_M, col : col + BC]; zero where not real."""
    c_C = col + tl.arange(0, BC)
    address = index_M[:, None].to(tl.int64) * cols + c_C[None, :]
    return tl.load(a + address, mask=real_M[:, None] & (c_C < cols)[None, :], other=0.0)


@triton.jit
def tiles_of_experts(offset, E, BM: tl.constexpr, EP: tl.constexpr):
    """First row and number of rows of each expert, and its last tile + 1 in the list of all tiles."""
    e_E = tl.arange(0, EP)
    start_E = tl.load(offset + e_E, mask=e_E < E, other=0)
    length_E = tl.load(offset + e_E + 1, mask=e_E < E, other=0) - start_E
    last_E = tl.cumsum((length_E + BM - 1) // BM, 0)
    return start_E, length_E, last_E


@triton.jit
def find_tile(tile_m, start_E, length_E, last_E, BM: tl.constexpr, EP: tl.constexpr):
    """Expert, first row and end row of tile `tile_m`."""
    e = tl.sum((last_E <= tile_m).to(tl.int32), 0)
    mine_E = tl.arange(0, EP) == e
    start = tl.sum(tl.where(mine_E, start_E, 0), 0)
    end = start + tl.sum(tl.where(mine_E, length_E, 0), 0)
    first_tile = tl.sum(tl.where(mine_E, last_E - (length_E + BM - 1) // BM, 0), 0)
    return e, start + (tile_m - first_tile) * BM, end


@triton.jit
def swizzle(tile, num_m, num_n, GROUP_M: tl.constexpr):
    """Tiles in groups of GROUP_M rows, so that programs that run together share weights and rows in L2."""
    group = tile // (GROUP_M * num_n)
    first_m = group * GROUP_M
    size = tl.minimum(num_m - first_m, GROUP_M)
    inside = tile - group * GROUP_M * num_n
    return first_m + inside % size, inside // size


@triton.jit
def store_swiglu(
    gate_MC, up_MC, pre, act, row, end, n, F, KEEP_PRE: tl.constexpr, BM: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """Columns n : n + C of a tile of the activation and, in training, of the pre-activation."""
    n_C = n + tl.arange(0, C)
    real_MC = (row + tl.arange(0, BM) < end)[:, None] & (n_C < F)[None, :]
    # 64 bits for the tile's first row, 32 inside it: 64-bit addresses of every element would spill
    if KEEP_PRE:
        line = pre + row.to(tl.int64) * (2 * F)
        inside_MC = tl.arange(0, BM)[:, None] * (2 * F) + n_C[None, :]
        tl.store(line + inside_MC, gate_MC.to(pre.dtype.element_ty), mask=real_MC)
        tl.store(line + F + inside_MC, up_MC.to(pre.dtype.element_ty), mask=real_MC)
    act_MC = gate_MC / (1.0 + tl.exp(-gate_MC)) * up_MC
    inside_MC = tl.arange(0, BM)[:, None] * F + n_C[None, :]
    tl.store(act + row.to(tl.int64) * F + inside_MC, act_MC.to(act.dtype.element_ty), mask=real_MC)


@triton.jit
def up_kernel(
    x, w, order, offset, act, pre, E, D, F,
    K: tl.constexpr, EP: tl.constexpr, KEEP_PRE: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
    PERSISTENT: tl.constexpr,
):  # fmt: skip
    """Gather in the load, gate and up side by side in one accumulator, SwiGLU in the epilogue."""
    start_E, length_E, last_E = tiles_of_experts(offset, E, BM, EP)
    num_m, num_n = tl.max(last_E, 0), tl.cdiv(F, BN)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=PERSISTENT):
        tile_m, tile_n = swizzle(tile, num_m, num_n, GROUP_M)
        e, row, end = find_tile(tile_m, start_E, length_E, last_E, BM, EP)
        r_M = row + tl.arange(0, BM)
        real_M = r_M < end
        token_M = tl.load(order + r_M, mask=real_M, other=0) // K
        n = tile_n * BN
        both_MN = tl.zeros((BM, 2 * BN), tl.float32)
        for d in range(0, D, BK):
            x_ML = gather_rows(x, token_M, real_M, d, D, BK)
            w_NL = load_gate_up(w, e, n, d, F, D, BN, BK, TMA)
            both_MN = tl.dot(x_ML, w_NL.T, both_MN, input_precision=PRECISION)
        gate_MN, up_MN = halves(both_MN, BM, 2 * BN)
        gate_0, gate_1 = halves(gate_MN, BM, BN)
        up_0, up_1 = halves(up_MN, BM, BN)
        store_swiglu(gate_0, up_0, pre, act, row, end, n, F, KEEP_PRE, BM, BN // 2)
        store_swiglu(gate_1, up_1, pre, act, row, end, n + BN // 2, F, KEEP_PRE, BM, BN // 2)


@triton.jit
def down_kernel(
    a, w, order, offset, weight, out, E, D, F,
    EP: tl.constexpr, TRANSPOSED: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
    PERSISTENT: tl.constexpr,
):  # fmt: skip
    """Sorted rows a [N, F] through w_e, written to their slots, one row each: out [N, D].

    With w [E, D, F] this is the down projection, times the router's weight. TRANSPOSED, w is [E, F, D]: the input's
    gradient, without a weight.
    """
    start_E, length_E, last_E = tiles_of_experts(offset, E, BM, EP)
    num_m, num_n = tl.max(last_E, 0), tl.cdiv(D, BN)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=PERSISTENT):
        tile_m, tile_n = swizzle(tile, num_m, num_n, GROUP_M)
        e, row, end = find_tile(tile_m, start_E, length_E, last_E, BM, EP)
        n = tile_n * BN
        acc_MN = tl.zeros((BM, BN), tl.float32)
        for f in range(0, F, BK):
            a_ML = load_rows(a, row, f, end, F, BM, BK, TMA)
            if TRANSPOSED:
                w_LN = load_weight(w, e, f, n, F, D, BK, BN, TMA)
            else:
                w_LN = load_weight(w, e, n, f, D, F, BN, BK, TMA).T
            acc_MN = tl.dot(a_ML, w_LN, acc_MN, input_precision=PRECISION)
        r_M = row + tl.arange(0, BM)
        n_N = n + tl.arange(0, BN)
        real_M = r_M < end
        slot_M = tl.load(order + r_M, mask=real_M, other=0)
        if not TRANSPOSED:
            acc_MN *= tl.load(weight + slot_M, mask=real_M, other=0.0)[:, None]
        address_MN = out + slot_M[:, None].to(tl.int64) * D + n_N[None, :]
        tl.store(address_MN, acc_MN.to(out.dtype.element_ty), mask=real_M[:, None] & (n_N < D)[None, :])


@triton.jit
def swiglu_backward(
    dact_MQ, pre, dpre, weighted_act, weight_M, row, end, n, F,
    BM: tl.constexpr, Q: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """For columns n : n + Q of a tile: store the gradient of the pre-activation and the weighted activation; return
    the columns' part of the gradient of the router's weight."""
    n_Q = n + tl.arange(0, Q)
    real_MQ = (row + tl.arange(0, BM) < end)[:, None] & (n_Q < F)[None, :]
    gate_MQ = load_rows(pre, row, n, end, 2 * F, BM, Q, TMA).to(tl.float32)
    up_MQ = load_rows(pre, row, F + n, end, 2 * F, BM, Q, TMA).to(tl.float32)
    sigmoid_MQ = 1.0 / (1.0 + tl.exp(-gate_MQ))
    silu_MQ = gate_MQ * sigmoid_MQ
    part_M = tl.sum(tl.where(real_MQ, dact_MQ * silu_MQ * up_MQ, 0.0), 1)
    inside_MQ = tl.arange(0, BM)[:, None] * F + n_Q[None, :]
    wact_MQ = silu_MQ * up_MQ * weight_M[:, None]
    line = weighted_act + row.to(tl.int64) * F
    tl.store(line + inside_MQ, wact_MQ.to(weighted_act.dtype.element_ty), mask=real_MQ)
    dact_MQ *= weight_M[:, None]
    inside_MQ = tl.arange(0, BM)[:, None] * (2 * F) + n_Q[None, :]
    line = dpre + row.to(tl.int64) * (2 * F)
    tl.store(line + F + inside_MQ, (dact_MQ * silu_MQ).to(dpre.dtype.element_ty), mask=real_MQ)
    dgate_MQ = dact_MQ * up_MQ * (sigmoid_MQ + silu_MQ * (1.0 - sigmoid_MQ))
    tl.store(line + inside_MQ, dgate_MQ.to(dpre.dtype.element_ty), mask=real_MQ)
    return part_M


@triton.jit
def down_backward_kernel(
    dy, w, pre, order, offset, weight, dpre, weighted_act, dweight, E, D, F,
    K: tl.constexpr, EP: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
    PERSISTENT: tl.constexpr,
):  # fmt: skip
    """Gradient of the activation, and from it in the epilogue those of the pre-activation and of the router's weight.

    The latter is a sum over F, of which each tile of columns has a part: dweight is [N, tiles], to be summed. The
    epilogue takes a quarter of the columns at a time: all of them at once would not stay in registers.
    """
    start_E, length_E, last_E = tiles_of_experts(offset, E, BM, EP)
    num_m, num_n = tl.max(last_E, 0), tl.cdiv(F, BN)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=PERSISTENT):
        tile_m, tile_n = swizzle(tile, num_m, num_n, GROUP_M)
        e, row, end = find_tile(tile_m, start_E, length_E, last_E, BM, EP)
        r_M = row + tl.arange(0, BM)
        real_M = r_M < end
        slot_M = tl.load(order + r_M, mask=real_M, other=0)
        token_M = slot_M // K
        n = tile_n * BN
        dact_MN = tl.zeros((BM, BN), tl.float32)
        for d in range(0, D, BK):
            dy_ML = gather_rows(dy, token_M, real_M, d, D, BK)
            w_LN = load_weight(w, e, d, n, D, F, BK, BN, TMA)
            dact_MN = tl.dot(dy_ML, w_LN, dact_MN, input_precision=PRECISION)
        weight_M = tl.load(weight + slot_M, mask=real_M, other=0.0)
        Q: tl.constexpr = BN // 4
        left, right = halves(dact_MN, BM, BN)
        dact_0, dact_1 = halves(left, BM, BN // 2)
        dact_2, dact_3 = halves(right, BM, BN // 2)
        part_M = swiglu_backward(dact_0, pre, dpre, weighted_act, weight_M, row, end, n, F, BM, Q, TMA)
        part_M += swiglu_backward(dact_1, pre, dpre, weighted_act, weight_M, row, end, n + Q, F, BM, Q, TMA)
        part_M += swiglu_backward(dact_2, pre, dpre, weighted_act, weight_M, row, end, n + 2 * Q, F, BM, Q, TMA)
        part_M += swiglu_backward(dact_3, pre, dpre, weighted_act, weight_M, row, end, n + 3 * Q, F, BM, Q, TMA)
        tl.store(dweight + slot_M.to(tl.int64) * num_n + tile_n, part_M, mask=real_M)


@triton.jit
def weight_grad_kernel(
    a, b, order, offset, out, E, A, B,
    K: tl.constexpr, GATHER_A: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """out[e] = a_e^T b_e, [A, B], summed over the rows of expert e.

    One of the two lies in sorted order; the other is gathered from the tokens, with zeros past the expert's last row.
    """
    num_m, num_n = tl.cdiv(A, BM), tl.cdiv(B, BN)
    for tile in range(tl.program_id(0), E * num_m * num_n, tl.num_programs(0)):
        e = tile // (num_m * num_n)
        tile_m, tile_n = swizzle(tile % (num_m * num_n), num_m, num_n, GROUP_M)
        m, n = tile_m * BM, tile_n * BN
        start, end = tl.load(offset + e), tl.load(offset + e + 1)
        acc_MN = tl.zeros((BM, BN), tl.float32)
        for row in range(start, end, BK):
            r_L = row + tl.arange(0, BK)
            real_L = r_L < end
            token_L = tl.load(order + r_L, mask=real_L, other=0) // K
            if GATHER_A:
                a_LM = gather_rows(a, token_L, real_L, m, A, BM)
                b_LN = load_rows(b, row, n, end, B, BK, BN, TMA)
            else:
                a_LM = load_rows(a, row, m, end, A, BK, BM, TMA)
                b_LN = gather_rows(b, token_L, real_L, n, B, BN)
            acc_MN = tl.dot(a_LM.T, b_LN, acc_MN, input_precision=PRECISION)
        m_M, n_N = m + tl.arange(0, BM), n + tl.arange(0, BN)
        address_MN = out + (e.to(tl.int64) * A + m_M[:, None]) * B + n_N[None, :]
        tl.store(address_MN, acc_MN.to(out.dtype.element_ty), mask=(m_M < A)[:, None] & (n_N < B)[None, :])


@triton.jit(do_not_specialize=["T"])
def combine_kernel(slot, out, T, D, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Sum over the K slots of a token, in order."""
    t_M, n_N = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    mask_MN = (t_M < T)[:, None] & (n_N < D)[None, :]
    sum_MN = tl.zeros((BM, BN), tl.float32)
    for k in tl.static_range(K):
        address_MN = slot + (t_M[:, None].to(tl.int64) * K + k) * D + n_N[None, :]
        sum_MN += tl.load(address_MN, mask=mask_MN, other=0.0).to(tl.float32)
    address_MN = out + t_M[:, None].to(tl.int64) * D + n_N[None, :]
    tl.store(address_MN, sum_MN.to(out.dtype.element_ty), mask=mask_MN)
