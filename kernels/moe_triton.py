"""Launches the Triton kernels: one function for each of `moe_reference.py`, with the same signature.

Nothing here waits for the device or asks it for a size, and buffers have sizes that the host knows: every function can
be captured in a CUDA graph. No kernel is specialised for the number of tokens.

Legend: `moe_reference.py`.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from nmm_serve.kernels import decode_triton, grouped_triton, moe_configs, route_triton, slices_triton
from nmm_serve.kernels.moe_reference import route_block

BLOCKS_PER_LOOK = 32
"""Blocks of tokens whose counts a program of the sort reads at a time."""


def _pow2(n: int) -> int:
    return triton.next_power_of_2(n)


@lru_cache
def _device(index: int | None) -> moe_configs.Device:
    """The interpreter has no device; two processors make programs loop there too."""
    if index is None:
        return moe_configs.Device("interpreter", processors=2, shared_bytes=232448, tma=True)
    properties = torch.cuda.get_device_properties(index)
    shared_bytes = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    tma = torch.version.hip is None and (properties.major, properties.minor) >= (9, 0)
    return moe_configs.Device(properties.name, properties.multi_processor_count, shared_bytes, tma)


def _precision(dtype: torch.dtype) -> str:
    """fp32 products follow torch's own switch; other types ignore it. Every way to set the switch shows here, whereas
    `get_float32_matmul_precision` refuses to answer once the newer ways were used."""
    fast = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if fast else "ieee"


def _tma(*tensors: torch.Tensor) -> bool:
    """Whether the device has TMA and it can read all of them: 16-byte rows and base."""
    return _device(tensors[0].device.index).tma and all(
        t.numel() and (t.shape[-1] * t.element_size()) % 16 == 0 and t.data_ptr() % 16 == 0 for t in tensors
    )


def _weight(w: torch.Tensor, block_row: int, block_col: int, tma: bool) -> Any:
    """[E, rows, cols], as a descriptor of one expert's tiles or as it is."""
    return TensorDescriptor.from_tensor(w, [1, block_row, block_col]) if tma else w


def _gate_up(w_E2FD: torch.Tensor, block_row: int, block_col: int, tma: bool) -> Any:
    """As above, of tiles that hold as many rows of the gate as of the up projection."""
    if not tma:
        return w_E2FD
    E, F2, D = w_E2FD.shape
    return TensorDescriptor.from_tensor(w_E2FD.view(E, 2, F2 // 2, D), [1, 2, block_row, block_col])


def _rows(a: torch.Tensor, block_row: int, block_col: int, tma: bool) -> Any:
    return TensorDescriptor.from_tensor(a, [block_row, block_col]) if tma else a


def _options(config: moe_configs.Config, dtype: torch.dtype, tma: bool) -> dict[str, Any]:
    tile = {k: v for k, v in config.items() if k not in ("per_sm", "most_mb")}
    return tile | {"TMA": tma, "PRECISION": _precision(dtype)}


def _grouped(kernel: str, a: torch.Tensor, hidden: int, intermediate: int, slots: int, E: int) -> moe_configs.Config:
    regime = moe_configs.grouped_regime(slots, E, a.dtype)
    return moe_configs.config(kernel, hidden, intermediate, regime, _device(a.device.index))


def _programs(tiles: int, config: moe_configs.Config, device: torch.device) -> tuple[int]:
    """One program a tile, or so many a processor, which then loop."""
    return (min(tiles, config["per_sm"] * _device(device.index).processors) if config["per_sm"] else tiles,)


def _row_tiles(slots: int, E: int, BM: int) -> int:
    """The most tiles of BM rows that the experts can need, whoever got how many."""
    return slots // BM + min(E, slots)


def route(logits_TE, counted_T, top_k, sigmoid, renormalize):
    T, E = logits_TE.shape
    M = route_block(E)
    blocks = triton.cdiv(T, M)
    weight_TK = logits_TE.new_empty(T, top_k, dtype=torch.float32)
    expert_TK = logits_TE.new_empty(T, top_k, dtype=torch.int32)
    count_BE = logits_TE.new_empty(blocks, E, dtype=torch.int32)
    stat_BS = logits_TE.new_empty(blocks, 2 * E + 2, dtype=torch.float32)
    if T:
        route_triton.route_kernel[blocks,](
            logits_TE, _bytes(counted_T, logits_TE), weight_TK, expert_TK, count_BE, stat_BS, T, E,
            K=top_k, KP=_pow2(top_k), EP=_pow2(E), M=M,
            SIGMOID=sigmoid, RENORMALIZE=renormalize, COUNT_ALL=counted_T is None,
        )  # fmt: skip
    return weight_TK, expert_TK, count_BE, stat_BS


def _bytes(counted_T: torch.Tensor | None, unused: torch.Tensor) -> torch.Tensor:
    """Triton has no pointers to bool; without a mask, anything that is never read."""
    return unused if counted_T is None else counted_T.view(torch.uint8)


def route_backward(dweight_TK, dstat_BS, logits_TE, expert_TK, counted_T, sigmoid, renormalize):
    T, E = logits_TE.shape
    M = route_block(E)
    dlogits_TE = torch.empty_like(logits_TE)
    if T:
        route_triton.route_backward_kernel[triton.cdiv(T, M),](
            dweight_TK, dstat_BS, logits_TE, expert_TK, _bytes(counted_T, logits_TE), dlogits_TE, T, E,
            K=expert_TK.shape[1], EP=_pow2(E), M=M,
            SIGMOID=sigmoid, RENORMALIZE=renormalize, COUNT_ALL=counted_T is None,
        )  # fmt: skip
    return dlogits_TE


def count_experts(expert_TK, num_experts):
    T, K = expert_TK.shape
    M = route_block(num_experts)
    blocks = triton.cdiv(T, M)
    count_BE = expert_TK.new_empty(blocks, num_experts, dtype=torch.int32)
    if T:
        route_triton.count_kernel[blocks,](
            expert_TK, count_BE, T, num_experts, K=K, KP=_pow2(K), EP=_pow2(num_experts), M=M
        )
    return count_BE


def sort_slots(expert_TK, count_BE):
    (T, K), (blocks, E) = expert_TK.shape, count_BE.shape
    order_N = expert_TK.new_empty(T * K)
    offset_E1 = count_BE.new_zeros(E + 1) if T == 0 else count_BE.new_empty(E + 1)
    if T:
        route_triton.sort_kernel[blocks,](
            expert_TK, count_BE, order_N, offset_E1, T, E,
            K=K, KP=_pow2(K), EP=_pow2(E), M=route_block(E), LOOK=BLOCKS_PER_LOOK,
        )  # fmt: skip
    return order_N, offset_E1


def up_proj(x_TD, gate_up_E2FD, order_N, offset_E1, top_k, keep_pre):
    R, (E, F2, D) = order_N.shape[0], gate_up_E2FD.shape
    F = F2 // 2
    c = _grouped("up", x_TD, D, F, R, E)
    tma = _tma(gate_up_E2FD)
    act_NF, pre_N2F = x_TD.new_empty(R, F), x_TD.new_empty(R if keep_pre else 0, F2)
    grid = _programs(_row_tiles(R, E, c["BM"]) * triton.cdiv(F, c["BN"]), c, x_TD.device)
    grouped_triton.up_kernel[grid](
        x_TD, _gate_up(gate_up_E2FD, c["BN"], c["BK"], tma), order_N, offset_E1, act_NF,
        pre_N2F if keep_pre else act_NF, E, D, F,
        K=top_k, EP=_pow2(E), KEEP_PRE=keep_pre, PERSISTENT=c["per_sm"] > 0, **_options(c, x_TD.dtype, tma),
    )  # fmt: skip
    return act_NF, pre_N2F


def down_proj(act_NF, down_EDF, order_N, offset_E1, weight_TK):
    (R, F), (E, D, _) = act_NF.shape, down_EDF.shape
    c = _grouped("down", act_NF, D, F, R, E)
    tma = _tma(act_NF, down_EDF)
    slot_ND = act_NF.new_empty(R, D)
    grid = _programs(_row_tiles(R, E, c["BM"]) * triton.cdiv(D, c["BN"]), c, act_NF.device)
    grouped_triton.down_kernel[grid](
        _rows(act_NF, c["BM"], c["BK"], tma), _weight(down_EDF, c["BN"], c["BK"], tma),
        order_N, offset_E1, weight_TK, slot_ND, E, D, F,
        EP=_pow2(E), TRANSPOSED=False, PERSISTENT=c["per_sm"] > 0, **_options(c, act_NF.dtype, tma),
    )  # fmt: skip
    return slot_ND


def combine(slot_ND, top_k):
    T, D = slot_ND.shape[0] // top_k, slot_ND.shape[1]
    y_TD = slot_ND.new_empty(T, D)
    BM, BN = 8, 256
    grouped_triton.combine_kernel[triton.cdiv(T, BM), triton.cdiv(D, BN)](slot_ND, y_TD, T, D, K=top_k, BM=BM, BN=BN)
    return y_TD


def _decode(kernel: str, a: torch.Tensor, hidden: int, intermediate: int, tokens: int) -> moe_configs.Config:
    regime = moe_configs.decode_regime(tokens, a.dtype)
    return moe_configs.config(kernel, hidden, intermediate, regime, _device(a.device.index))


def decode_up(x_TD, gate_up_E2FD, expert_TK, weight_TK):
    (T, K), (E, F2, D) = expert_TK.shape, gate_up_E2FD.shape
    F = F2 // 2
    c = _decode("decode_up", x_TD, D, F, T)
    tma = _tma(gate_up_E2FD)
    act_NF = x_TD.new_empty(T * K, F)
    decode_triton.decode_up_kernel[E, triton.cdiv(F, c["BN"])](
        x_TD, _gate_up(gate_up_E2FD, c["BN"], c["BK"], tma), expert_TK, weight_TK, act_NF, T, D, F,
        K=K, KP=_pow2(K), **_options(c, x_TD.dtype, tma),
    )  # fmt: skip
    return act_NF


def decode_down(act_NF, down_EDF, expert_TK):
    (T, K), (E, D, F) = expert_TK.shape, down_EDF.shape
    c = _decode("decode_down", act_NF, D, F, T)
    tma = _tma(down_EDF)
    slot_ND = act_NF.new_empty(T * K, D)
    decode_triton.decode_down_kernel[E, triton.cdiv(D, c["BN"])](
        act_NF, _weight(down_EDF, c["BN"], c["BK"], tma), expert_TK, slot_ND, T, D, F,
        K=K, KP=_pow2(K), **_options(c, act_NF.dtype, tma),
    )  # fmt: skip
    return slot_ND


def takes_slices(x_TD, gate_up_E2FD, top_k):
    """Whether `decode_layer` is the better way for these tokens. Its routing is of one block."""
    (T, D), (E, F2, _) = x_TD.shape, gate_up_E2FD.shape
    config = _decode("slices", x_TD, D, F2 // 2, T)
    return route_block(E) >= T and moe_configs.in_slices(T, top_k, D, F2 // 2, config)


def decode_layer(x_TD, logits_TE, counted_T, gate_up_E2FD, down_EDF, top_k, sigmoid, renormalize):
    (T, D), (E, F2, _) = x_TD.shape, gate_up_E2FD.shape
    F = F2 // 2
    c = _decode("slices", x_TD, D, F, T)
    tma = _tma(gate_up_E2FD, down_EDF)
    slices = triton.cdiv(F, c["BN"])
    part_TKSD = x_TD.new_empty(T, top_k, slices, D, dtype=torch.float32)
    stat_1S = x_TD.new_empty(1, 2 * E + 2, dtype=torch.float32)
    slices_triton.slices_kernel[E, slices](
        x_TD, logits_TE, _bytes(counted_T, logits_TE),
        _gate_up(gate_up_E2FD, c["BN"], c["BK"], tma), _weight(down_EDF, c["BD"], c["BN"], tma),
        part_TKSD, stat_1S, T, D, F, E,
        K=top_k, KP=_pow2(top_k), EP=_pow2(E), SIGMOID=sigmoid, RENORMALIZE=renormalize,
        COUNT_ALL=counted_T is None, **_options(c, x_TD.dtype, tma),
    )  # fmt: skip
    y_TD = torch.empty_like(x_TD)
    BP, BD = 32, 64
    slices_triton.sum_parts_kernel[T, triton.cdiv(D, BD)](part_TKSD, y_TD, top_k * slices, D, BP=BP, BD=BD)
    return y_TD, stat_1S


def down_backward(dy_TD, down_EDF, pre_N2F, order_N, offset_E1, weight_TK):
    R, K, (E, D, F) = order_N.shape[0], weight_TK.shape[1], down_EDF.shape
    c = _grouped("down_backward", dy_TD, D, F, R, E)
    tma = _tma(down_EDF, pre_N2F)
    dpre_N2F, weighted_act_NF = torch.empty_like(pre_N2F), pre_N2F.new_empty(R, F)
    num_n = triton.cdiv(F, c["BN"])
    parts_Nn = weight_TK.new_empty(R, num_n)
    grid = _programs(_row_tiles(R, E, c["BM"]) * num_n, c, dy_TD.device)
    grouped_triton.down_backward_kernel[grid](
        dy_TD, _weight(down_EDF, c["BK"], c["BN"], tma), _rows(pre_N2F, c["BM"], c["BN"] // 4, tma),
        order_N, offset_E1, weight_TK,
        dpre_N2F, weighted_act_NF, parts_Nn, E, D, F,
        K=K, EP=_pow2(E), PERSISTENT=c["per_sm"] > 0, **_options(c, dy_TD.dtype, tma),
    )  # fmt: skip
    return dpre_N2F, weighted_act_NF, parts_Nn.sum(1).view_as(weight_TK)


def up_backward(dpre_N2F, gate_up_E2FD, order_N, offset_E1):
    (R, F2), (E, _, D) = dpre_N2F.shape, gate_up_E2FD.shape
    c = _grouped("up_backward", dpre_N2F, D, F2 // 2, R, E)
    tma = _tma(dpre_N2F, gate_up_E2FD)
    dslot_ND = dpre_N2F.new_empty(R, D)
    grid = _programs(_row_tiles(R, E, c["BM"]) * triton.cdiv(D, c["BN"]), c, dpre_N2F.device)
    grouped_triton.down_kernel[grid](
        _rows(dpre_N2F, c["BM"], c["BK"], tma), _weight(gate_up_E2FD, c["BK"], c["BN"], tma),
        order_N, offset_E1, dslot_ND, dslot_ND, E, D, F2,
        EP=_pow2(E), TRANSPOSED=True, PERSISTENT=c["per_sm"] > 0, **_options(c, dpre_N2F.dtype, tma),
    )  # fmt: skip
    return dslot_ND


def up_weight_grad(dpre_N2F, x_TD, order_N, offset_E1, top_k):
    return _weight_grad("up_weight_grad", dpre_N2F, x_TD, order_N, offset_E1, top_k)


def down_weight_grad(dy_TD, weighted_act_NF, order_N, offset_E1, top_k):
    return _weight_grad("down_weight_grad", dy_TD, weighted_act_NF, order_N, offset_E1, top_k)


def _weight_grad(kernel, a, b, order_N, offset_E1, top_k):
    """[E, A, B] = a^T b of each expert. The operand in sorted order is `a` for the up projection, else `b`."""
    R, E, (A, B) = order_N.shape[0], offset_E1.shape[0] - 1, (a.shape[1], b.shape[1])
    gather_a = kernel == "down_weight_grad"
    c = _grouped(kernel, a, A if gather_a else B, B if gather_a else A // 2, R, E)
    tma = _tma(b if gather_a else a)
    rows = (c["BK"], c["BN"]) if gather_a else (c["BK"], c["BM"])
    operands = (a, _rows(b, *rows, tma)) if gather_a else (_rows(a, *rows, tma), b)
    out_EAB = a.new_empty(E, A, B)
    tiles = E * triton.cdiv(A, c["BM"]) * triton.cdiv(B, c["BN"])
    # the loads of row numbers, on which the gather waits, are stages for Triton too: it would keep half of the tiles
    options = _options(c, a.dtype, tma) | {"num_stages": 2 * c["num_stages"] - 1}
    grouped_triton.weight_grad_kernel[_programs(tiles, c, a.device)](
        *operands, order_N, offset_E1, out_EAB, E, A, B,
        K=top_k, GATHER_A=gather_a, **options,
    )  # fmt: skip
    return out_EAB
