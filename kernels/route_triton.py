"""Triton kernels for routing: scores, choice and statistics in one pass; its gradient; a stable sort by expert.

All are deterministic: sums run in a fixed order, and nothing is atomic.

Legend: `moe_reference.py`; EP experts and KP choices padded to powers of two, M tokens of a block.
"""

import triton
import triton.language as tl


@triton.jit
def scores(logit_ME, real_E, SIGMOID: tl.constexpr):
    """Scores (0 for padding), their sum, the softmax of the logits and their logsumexp, all fp32."""
    logit_ME = tl.where(real_E[None, :], logit_ME, float("-inf"))
    top_M = tl.max(logit_ME, 1)
    exp_ME = tl.where(real_E[None, :], tl.exp(logit_ME - top_M[:, None]), 0.0)
    sum_M = tl.sum(exp_ME, 1)
    soft_ME = exp_ME / sum_M[:, None]
    lse_M = top_M + tl.log(sum_M)
    if SIGMOID:
        score_ME = tl.where(real_E[None, :], 1.0 / (1.0 + tl.exp(-logit_ME)), 0.0)
        return score_ME, tl.sum(score_ME, 1), soft_ME, lse_M
    else:
        return soft_ME, sum_M * 0.0 + 1.0, soft_ME, lse_M


@triton.jit
def choose(
    logits, t_M, T, E,
    K: tl.constexpr, KP: tl.constexpr, EP: tl.constexpr, M: tl.constexpr,
    SIGMOID: tl.constexpr, RENORMALIZE: tl.constexpr,
):  # fmt: skip
    """Of M tokens: weights and experts of their choices, which experts were chosen, all scores, their sum, and the
    logsumexp of the logits."""
    e_E = tl.arange(0, EP)
    k_K = tl.arange(0, KP)
    real_E = e_E < E
    address_ME = t_M[:, None].to(tl.int64) * E + e_E[None, :]
    logit_ME = tl.load(logits + address_ME, mask=(t_M < T)[:, None] & real_E[None, :], other=0.0).to(tl.float32)
    score_ME, total_M, _soft_ME, lse_M = scores(logit_ME, real_E, SIGMOID)

    # a NaN never wins over a number, but an index is always that of some expert: it must not become a wild address
    key_ME = tl.where(score_ME == score_ME, score_ME, -1.0)
    key_ME = tl.where(real_E[None, :], key_ME, -3.0)
    chosen_ME = tl.zeros((M, EP), tl.float32)
    weight_MK = tl.zeros((M, KP), tl.float32)
    expert_MK = tl.zeros((M, KP), tl.int32)
    for k in tl.static_range(K):
        best_M = tl.argmax(key_ME, 1).to(tl.int32)
        hit_ME = e_E[None, :] == best_M[:, None]
        w_M = tl.sum(tl.where(hit_ME, score_ME, 0.0), 1)
        weight_MK = tl.where(k_K[None, :] == k, w_M[:, None], weight_MK)
        expert_MK = tl.where(k_K[None, :] == k, best_M[:, None], expert_MK)
        chosen_ME += tl.where(hit_ME, 1.0, 0.0)
        key_ME = tl.where(hit_ME, -2.0, key_ME)
    if RENORMALIZE:
        weight_MK = weight_MK / tl.sum(weight_MK, 1)[:, None]
    return weight_MK, expert_MK, chosen_ME, score_ME, total_M, lse_M


@triton.jit
def store_statistics(
    line, counted, t_M, T, E, chosen_ME, score_ME, total_M, lse_M, EP: tl.constexpr, COUNT_ALL: tl.constexpr
):  # fmt: skip
    """A block's line of `stat_BS`."""
    e_E = tl.arange(0, EP)
    real_E = e_E < E
    counts_M = t_M < T
    if not COUNT_ALL:
        counts_M = counts_M & (tl.load(counted + t_M, mask=counts_M, other=0) != 0)
    prob_ME = tl.where(counts_M[:, None], score_ME / total_M[:, None], 0.0)
    tl.store(line + e_E, tl.sum(tl.where(counts_M[:, None], chosen_ME, 0.0), 0), mask=real_E)
    tl.store(line + E + e_E, tl.sum(prob_ME, 0), mask=real_E)
    tl.store(line + 2 * E, tl.sum(tl.where(counts_M, lse_M * lse_M, 0.0), 0))
    tl.store(line + 2 * E + 1, tl.sum(counts_M.to(tl.float32), 0))


@triton.jit(do_not_specialize=["T"])
def route_kernel(
    logits, counted, weight, expert, count, stat, T, E,
    K: tl.constexpr, KP: tl.constexpr, EP: tl.constexpr, M: tl.constexpr,
    SIGMOID: tl.constexpr, RENORMALIZE: tl.constexpr, COUNT_ALL: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    t_M = block * M + tl.arange(0, M)
    weight_MK, expert_MK, chosen_ME, score_ME, total_M, lse_M = choose(
        logits, t_M, T, E, K, KP, EP, M, SIGMOID, RENORMALIZE
    )
    k_K = tl.arange(0, KP)
    slot_MK = t_M[:, None].to(tl.int64) * K + k_K[None, :]
    real_MK = (t_M < T)[:, None] & (k_K[None, :] < K)
    tl.store(weight + slot_MK, weight_MK, mask=real_MK)
    tl.store(expert + slot_MK, expert_MK, mask=real_MK)

    e_E = tl.arange(0, EP)
    in_ME = tl.where((t_M < T)[:, None], chosen_ME, 0.0)
    tl.store(count + block * E + e_E, tl.sum(in_ME, 0).to(tl.int32), mask=e_E < E)
    line = stat + block * (2 * E + 2)
    store_statistics(line, counted, t_M, T, E, chosen_ME, score_ME, total_M, lse_M, EP, COUNT_ALL)


@triton.jit(do_not_specialize=["T"])
def route_backward_kernel(
    dweight, dstat, logits, expert, counted, dlogits, T, E,
    K: tl.constexpr, EP: tl.constexpr, M: tl.constexpr,
    SIGMOID: tl.constexpr, RENORMALIZE: tl.constexpr, COUNT_ALL: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    t_M = block * M + tl.arange(0, M)
    e_E = tl.arange(0, EP)
    in_M, real_E = t_M < T, e_E < E
    real_ME = in_M[:, None] & real_E[None, :]
    address_ME = t_M[:, None].to(tl.int64) * E + e_E[None, :]
    logit_ME = tl.load(logits + address_ME, mask=real_ME, other=0.0).to(tl.float32)
    score_ME, total_M, soft_ME, lse_M = scores(logit_ME, real_E, SIGMOID)

    dscore_ME = tl.zeros((M, EP), tl.float32)
    chosen_ME = tl.zeros((M, EP), tl.float32)
    for k in tl.static_range(K):
        slot_M = t_M.to(tl.int64) * K + k
        expert_M = tl.load(expert + slot_M, mask=in_M, other=0)
        dweight_M = tl.load(dweight + slot_M, mask=in_M, other=0.0)
        hit_ME = e_E[None, :] == expert_M[:, None]
        dscore_ME += tl.where(hit_ME, dweight_M[:, None], 0.0)
        chosen_ME += tl.where(hit_ME, 1.0, 0.0)
    if RENORMALIZE:
        picked_ME = chosen_ME * score_ME
        sum_M = tl.sum(picked_ME, 1)
        inner_M = tl.sum(dscore_ME * picked_ME, 1) / sum_M
        dscore_ME = chosen_ME * (dscore_ME - inner_M[:, None]) / sum_M[:, None]

    counts_M = in_M
    if not COUNT_ALL:
        counts_M = in_M & (tl.load(counted + t_M, mask=in_M, other=0) != 0)
    line = dstat + block * (2 * E + 2)
    dprob_E = tl.load(line + E + e_E, mask=real_E, other=0.0)
    dsquare = tl.load(line + 2 * E)
    dprob_ME = tl.where(counts_M[:, None], dprob_E[None, :], 0.0)
    if SIGMOID:
        inner_M = tl.sum(dprob_ME * score_ME, 1) / total_M
        dscore_ME += (dprob_ME - inner_M[:, None]) / total_M[:, None]
        dlogit_ME = score_ME * (1.0 - score_ME) * dscore_ME
    else:
        dscore_ME += dprob_ME
        dlogit_ME = score_ME * (dscore_ME - tl.sum(score_ME * dscore_ME, 1)[:, None])
    dlogit_ME += tl.where(counts_M[:, None], 2.0 * dsquare * lse_M[:, None] * soft_ME, 0.0)
    tl.store(dlogits + address_ME, dlogit_ME.to(dlogits.dtype.element_ty), mask=real_ME)


@triton.jit
def one_hot_slots(expert, block, T, K: tl.constexpr, KP: tl.constexpr, EP: tl.constexpr, M: tl.constexpr):
    """The slots of a block of tokens, in order, and which expert each goes to."""
    i_S = tl.arange(0, M * KP)
    t_S, k_S = block * M + i_S // KP, i_S % KP
    real_S = (t_S < T) & (k_S < K)
    slot_S = t_S * K + k_S
    expert_S = tl.load(expert + slot_S, mask=real_S, other=-1)
    hit_SE = (expert_S[:, None] == tl.arange(0, EP)[None, :]) & real_S[:, None]
    return slot_S, real_S, hit_SE


@triton.jit(do_not_specialize=["T"])
def count_kernel(expert, count, T, E, K: tl.constexpr, KP: tl.constexpr, EP: tl.constexpr, M: tl.constexpr):
    block = tl.program_id(0)
    e_E = tl.arange(0, EP)
    _slot_S, _real_S, hit_SE = one_hot_slots(expert, block, T, K, KP, EP, M)
    tl.store(count + block * E + e_E, tl.sum(hit_SE.to(tl.int32), 0), mask=e_E < E)


@triton.jit(do_not_specialize=["T"])
def sort_kernel(
    expert, count, order, offset, T, E,
    K: tl.constexpr, KP: tl.constexpr, EP: tl.constexpr, M: tl.constexpr, LOOK: tl.constexpr,
):  # fmt: skip
    """Counting sort. Each block of tokens finds from the counts of all blocks where its slots of each expert begin:
    after every slot of a lower expert, and after the same expert's slots of the blocks before."""
    block, num_blocks = tl.program_id(0), tl.num_programs(0)
    e_E = tl.arange(0, EP)
    total_E = tl.zeros((EP,), tl.int32)
    before_E = tl.zeros((EP,), tl.int32)
    for first in range(0, num_blocks, LOOK):
        b_B = first + tl.arange(0, LOOK)
        mask_BE = (b_B < num_blocks)[:, None] & (e_E < E)[None, :]
        count_BE = tl.load(count + b_B[:, None] * E + e_E[None, :], mask=mask_BE, other=0)
        total_E += tl.sum(count_BE, 0)
        before_E += tl.sum(tl.where((b_B < block)[:, None], count_BE, 0), 0)
    end_E = tl.cumsum(total_E, 0)
    if block == 0:
        tl.store(offset, 0)
        tl.store(offset + 1 + e_E, end_E, mask=e_E < E)
    slot_S, real_S, hit_SE = one_hot_slots(expert, block, T, K, KP, EP, M)
    hit_SE = hit_SE.to(tl.int32)
    rank_SE = tl.cumsum(hit_SE, 0) - 1 + (end_E - total_E + before_E)[None, :]
    row_S = tl.sum(hit_SE * rank_SE, 1)
    tl.store(order + row_S, slot_S, mask=real_S)
