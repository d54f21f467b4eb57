"""What the layer is compared with, one small adapter each. A peer takes tokens and router logits and does all the rest
itself: choice of experts, sorting, products, combination.

Adapters import their library when they are prepared, by name: `kernels` knows torch and Triton only. An adapter that
no longer fits its library fails its check against float32 and is named with the reason, never timed.

Legend: T tokens, D hidden size, F expert hidden size, E experts, K experts a token, N = T*K routed rows, M padded rows.
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

Layer = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(x_TD, logits_TE float32) -> y_TD."""


@dataclass(frozen=True)
class Weights:
    """One copy: [E, 2F, D] with the gate's rows first, and [E, D, F]."""

    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True)
class Prepared:
    layer: Layer
    parameters: tuple[torch.Tensor, torch.Tensor]
    """What the layer's gradients are taken of: the weights, or a peer's own arrangement of them."""


@dataclass(frozen=True)
class Peer:
    name: str
    prepare: Callable[[Weights, int], Prepared]
    """(weights, top_k). Raises ImportError where the library is absent."""
    gpu_only: bool = False
    trains: bool = False
    graph: bool = True
    """False: it waits for the host, so a CUDA graph need not be tried."""
    most_tokens: int | None = None
    is_bound: bool = False
    """No implementation of the layer but what its products alone would take; enters no ratio."""


def choose(logits_TE: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [T, K] float32 and experts [T, K] int64."""
    weight_TK, expert_TK = logits_TE.softmax(-1).topk(top_k, dim=-1)
    return weight_TK, expert_TK


def ours(weights: Weights, top_k: int) -> Prepared:
    from nmm_serve.kernels.moe import moe_mlp

    def layer(x_TD, logits_TE):
        return moe_mlp(x_TD, logits_TE, weights.gate_up, weights.down, top_k=top_k)[0]

    return Prepared(layer, (weights.gate_up, weights.down))


def loop(weights: Weights, top_k: int) -> Prepared:
    """One dense product an expert, cuBLAS on a GPU; the counts come to the host.

    The experts are unbound, not indexed: each index would make a gradient of the size of all weights in the backward
    pass, and add it to the others'.
    """

    def layer(x_TD, logits_TE):
        weight_TK, expert_TK = choose(logits_TE, top_k)
        order_N = expert_TK.reshape(-1).argsort(stable=True)
        counts = torch.bincount(expert_TK.reshape(-1), minlength=logits_TE.shape[1]).tolist()
        rows = []
        x_E = x_TD[order_N // top_k].split(counts)
        for x_ND, gate_up_2FD, down_DF in zip(x_E, weights.gate_up.unbind(), weights.down.unbind(), strict=True):
            gate_NF, up_NF = F.linear(x_ND, gate_up_2FD).chunk(2, dim=-1)
            rows.append(F.linear(F.silu(gate_NF) * up_NF, down_DF))
        return combine(torch.cat(rows), order_N, weight_TK)

    return Prepared(layer, (weights.gate_up, weights.down))


def combine(sorted_ND: torch.Tensor, order_N: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
    """Rows in expert order -> weighted sums in token order, [T, D]."""
    place_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N), device=order_N.device))
    out_TKD = sorted_ND[place_N].view(*weight_TK.shape, -1)
    return (out_TKD * weight_TK[:, :, None].to(sorted_ND.dtype)).sum(1)


def grouped_layer(x_TD, logits_TE, gate_up_E2FD, down_EDF, top_k: int) -> torch.Tensor:
    weight_TK, expert_TK = choose(logits_TE, top_k)
    expert_N = expert_TK.reshape(-1)
    order_N = expert_N.argsort(stable=True)
    experts_E = torch.arange(gate_up_E2FD.shape[0], device=x_TD.device)
    offset_E = (expert_N[:, None] == experts_E).sum(0).cumsum(0).to(torch.int32)
    h_N2F = F.grouped_mm(x_TD[order_N // top_k], gate_up_E2FD.transpose(1, 2), offs=offset_E)
    gate_NF, up_NF = h_N2F.chunk(2, dim=-1)
    out_ND = F.grouped_mm(F.silu(gate_NF) * up_NF, down_EDF.transpose(1, 2), offs=offset_E)
    return combine(out_ND, order_N, weight_TK)


@lru_cache
def compiled_grouped_layer() -> Callable:
    # every shape, top-k and mode may compile it once more; past dynamo's limit it would run uncompiled, and quietly
    torch._dynamo.config.recompile_limit = 256
    return torch.compile(grouped_layer, dynamic=True)


def grouped_mm(weights: Weights, top_k: int) -> Prepared:
    """torch's grouped product between what torch.compile makes of the rest."""
    function = compiled_grouped_layer() if weights.gate_up.is_cuda else grouped_layer

    def layer(x_TD, logits_TE):
        return function(x_TD, logits_TE, weights.gate_up, weights.down, top_k)

    return Prepared(layer, (weights.gate_up, weights.down))


def hugging_face(function: str) -> Callable[[Weights, int], Prepared]:
    def prepare(weights: Weights, top_k: int) -> Prepared:
        forward = getattr(importlib.import_module("transformers.integrations.moe"), function)

        def gated(x: torch.Tensor) -> torch.Tensor:
            gate, up = x.chunk(2, dim=-1)
            return F.silu(gate) * up

        module = SimpleNamespace(
            gate_up_proj=weights.gate_up, down_proj=weights.down, num_experts=weights.down.shape[0], has_gate=True,
            has_bias=False, is_transposed=False, is_concatenated=True, _is_expert_parallel=False, _apply_gate=gated,
        )  # fmt: skip

        def layer(x_TD, logits_TE):
            weight_TK, expert_TK = choose(logits_TE, top_k)
            return forward(module, x_TD, expert_TK, weight_TK.to(x_TD.dtype))

        return Prepared(layer, (weights.gate_up, weights.down))

    return prepare


def batched_bound(weights: Weights, top_k: int) -> Prepared:
    """The two products on equal groups of already sorted rows and the activation between them, nothing else."""

    def layer(x_TD, logits_TE):
        E = weights.down.shape[0]
        rows = -(-x_TD.shape[0] * top_k // E)
        x_END = x_TD.repeat(-(-E * rows // x_TD.shape[0]), 1)[: E * rows].view(E, rows, -1)
        gate, up = torch.bmm(x_END, weights.gate_up.transpose(1, 2)).chunk(2, dim=-1)
        return torch.bmm(F.silu(gate) * up, weights.down.transpose(1, 2))

    return Prepared(layer, (weights.gate_up, weights.down))


def liger(weights: Weights, top_k: int) -> Prepared:
    function = importlib.import_module("liger_kernel.ops").LigerFusedMoEFunction

    def layer(x_TD, logits_TE):
        weight_TK, expert_TK = choose(logits_TE, top_k)
        return function.apply(x_TD, weights.gate_up, weights.down, expert_TK.int(), weight_TK)

    return Prepared(layer, (weights.gate_up, weights.down))


def scattermoe(weights: Weights, top_k: int) -> Prepared:
    library = importlib.import_module("scattermoe.parallel_experts")

    def layer(x_TD, logits_TE):
        weight_TK, expert_TK = choose(logits_TE, top_k)
        expert_N, order_N, offset_E = library.flatten_sort_count(expert_TK, num_experts=logits_TE.shape[1])
        h_N2F = library.parallel_linear(
            x_TD, weights.gate_up.permute(0, 2, 1), top_k, expert_N, order_N, offset_E, grouped_out=True
        )
        gate_NF, up_NF = h_N2F.chunk(2, dim=-1)
        return library.parallel_linear(
            F.silu(gate_NF) * up_NF, weights.down.permute(0, 2, 1), 1, expert_N, order_N, offset_E,
            gates=weight_TK.to(x_TD.dtype), grouped_in=True,
        )  # fmt: skip

    return Prepared(layer, (weights.gate_up, weights.down))


def vllm_fused_moe(weights: Weights, top_k: int) -> Prepared:
    experts = importlib.import_module("vllm.model_executor.layers.fused_moe.fused_moe").fused_experts
    try:
        topk = importlib.import_module("vllm.model_executor.layers.fused_moe.router.fused_topk_router").fused_topk
    except ImportError:  # before the routers had modules of their own
        topk = importlib.import_module("vllm.model_executor.layers.fused_moe.fused_moe").fused_topk

    def layer(x_TD, logits_TE):
        weight_TK, expert_TK, *_ = topk(x_TD, logits_TE, top_k, renormalize=False)
        return experts(x_TD, weights.gate_up, weights.down, weight_TK, expert_TK)

    return Prepared(layer, (weights.gate_up, weights.down))


def triton_kernels(weights: Weights, top_k: int) -> Prepared:
    """The releases that have `matmul_ogs` and `routing`. Their fused SwiGLU is gpt-oss's, with up + 1: not used."""
    products = importlib.import_module("triton_kernels.matmul_ogs")
    routing = importlib.import_module("triton_kernels.routing").routing

    def layer(x_TD, logits_TE):
        data, gather, scatter = routing(logits_TE, top_k, sm_first=True)
        h_N2F = products.matmul_ogs(x_TD, weights.gate_up.transpose(1, 2), None, data, gather_indx=gather)
        gate_NF, up_NF = h_N2F.chunk(2, dim=-1)
        return products.matmul_ogs(
            F.silu(gate_NF) * up_NF, weights.down.transpose(1, 2), None, data, scatter_indx=scatter,
            gammas=data.gate_scal,
        )  # fmt: skip

    return Prepared(layer, (weights.gate_up, weights.down))


def deep_gemm(weights: Weights, top_k: int) -> Prepared:
    """Its grouped product wants each expert's rows padded to whole tiles; the padding is part of the price."""
    try:
        library: Any = importlib.import_module("deep_gemm")
    except ImportError:
        library = importlib.import_module("vllm.third_party.deep_gemm")
    align = library.get_mk_alignment_for_contiguous_layout()

    def layer(x_TD, logits_TE):
        E, D, F_ = weights.down.shape
        weight_TK, expert_TK = choose(logits_TE, top_k)
        expert_N = expert_TK.reshape(-1)
        order_N = expert_N.argsort(stable=True)
        experts_E = torch.arange(E, device=x_TD.device)
        count_E = (expert_N[:, None] == experts_E).sum(0)
        padding_E = -count_E % align
        sorted_N = expert_N[order_N]
        before_E = padding_E.cumsum(0) - padding_E
        row_N = torch.arange(len(expert_N), device=x_TD.device) + before_E[sorted_N]
        M = -(-(len(expert_N) + E * (align - 1)) // align) * align  # what the host knows without asking
        group_M = torch.full((M,), -1, dtype=torch.int32, device=x_TD.device)
        group_M[row_N] = sorted_N.to(torch.int32)
        x_MD = x_TD.new_zeros(M, D)
        x_MD[row_N] = x_TD[order_N // top_k]
        h_M2F = x_TD.new_empty(M, 2 * F_)
        library.m_grouped_bf16_gemm_nt_contiguous(x_MD, weights.gate_up, h_M2F, group_M)
        gate_MF, up_MF = h_M2F.chunk(2, dim=-1)
        out_MD = x_TD.new_empty(M, D)
        library.m_grouped_bf16_gemm_nt_contiguous(F.silu(gate_MF) * up_MF, weights.down, out_MD, group_M)
        return combine(out_MD[row_N], order_N, weight_TK)

    return Prepared(layer, (weights.gate_up, weights.down))


def sonic_moe(weights: Weights, top_k: int) -> Prepared:
    library = importlib.import_module("sonicmoe.functional")
    swiglu = importlib.import_module("sonicmoe.enums").ActivationType.SWIGLU
    function = library.moe_general_routing_inputs
    gate_up, options = weights.gate_up, {}
    if "concat_layout" in inspect.signature(function).parameters:
        options["concat_layout"] = True
    else:  # rows of gate and up in turn
        gate_up = torch.stack(gate_up.detach().chunk(2, dim=1), dim=2).flatten(1, 2)
        gate_up = gate_up.requires_grad_(weights.gate_up.requires_grad)

    def layer(x_TD, logits_TE):
        weight_TK, expert_TK = choose(logits_TE, top_k)
        token_N = torch.arange(len(x_TD), device=x_TD.device, dtype=torch.int32).repeat_interleave(top_k)
        return function(
            x_TD, weight_TK.reshape(-1).to(x_TD.dtype), token_N, expert_TK.reshape(-1).int(),
            gate_up.permute(1, 2, 0), None, weights.down.permute(1, 2, 0), None,
            E=logits_TE.shape[1], activation_type=swiglu, stream_id=None,
            is_inference_mode_enabled=not torch.is_grad_enabled(), **options,
        )[0]  # fmt: skip

    return Prepared(layer, (gate_up, weights.down))


OURS = "nmm-serve"

PEERS = (
    Peer(OURS, ours, trains=True),
    Peer("loop", loop, trains=True, graph=False),
    Peer("grouped_mm", grouped_mm, trains=True),
    Peer("HF grouped_mm", hugging_face("grouped_mm_experts_forward"), trains=True),
    # gathers the weights of every row: beyond a few tokens that is gigabytes
    Peer("HF batched_mm", hugging_face("batched_mm_experts_forward"), most_tokens=64),
    Peer("bmm bound", batched_bound, is_bound=True),
    Peer("Liger", liger, gpu_only=True, trains=True),
    Peer("ScatterMoE", scattermoe, gpu_only=True, trains=True, graph=False),
    Peer("vLLM fused_moe", vllm_fused_moe, gpu_only=True),
    Peer("triton_kernels", triton_kernels, gpu_only=True),
    Peer("DeepGEMM", deep_gemm, gpu_only=True),
    Peer("SonicMoE", sonic_moe, gpu_only=True, trains=True),
)
