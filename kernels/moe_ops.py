"""The operators `nmm_serve::*`: each launch with its eager and its Triton implementation, the two that have a gradient,
`route` and `expert_mlp`, and `moe_inference`, the whole layer without one.

`moe_triton.py` serves CUDA and `moe_reference.py` the CPU. With TRITON_INTERPRET=1, Triton's interpreter serves the
CPU: that is how the kernels are tested without a GPU. Legend: `moe_reference.py`.
"""

import importlib
import os
from collections.abc import Callable

import torch

from nmm_serve.kernels import moe_reference

DECODE_TOKENS = 64
"""Up to so many tokens, inference skips the sort: reading the weights takes all the time there."""
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _triton(name: str) -> Callable:
    def launch(*args):
        # imported at the first launch: the package must import where there is no Triton
        function = getattr(importlib.import_module("nmm_serve.kernels.moe_triton"), name)
        with torch.cuda.device_of(args[0]):  # Triton launches on the current device, whatever the tensors'
            return function(*args)

    return launch


def _launch(fake: Callable) -> Callable:
    """Make the operator named like `fake`, which gives the shapes of what its two implementations return."""
    name = fake.__name__
    eager = getattr(moe_reference, name)
    qualified = f"nmm_serve::{name}"
    torch.library.define(qualified, torch.library.infer_schema(eager, mutates_args=()))
    torch.library.impl(qualified, "cpu", _triton(name) if INTERPRETED else eager)
    torch.library.impl(qualified, "cuda", _triton(name))
    torch.library.register_fake(qualified, fake)
    return getattr(torch.ops.nmm_serve, name)


def on_triton(x: torch.Tensor) -> bool:
    """Whether the kernels compute with it, and not the eager functions."""
    return x.device.type == "cuda" or INTERPRETED


def _score_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@_launch
def route(logits_TE, counted_T, top_k, sigmoid, renormalize):
    T, E = logits_TE.shape
    B = -(-T // moe_reference.route_block(E))
    dtype = _score_dtype(logits_TE)
    return (
        logits_TE.new_empty(T, top_k, dtype=dtype),
        logits_TE.new_empty(T, top_k, dtype=torch.int32),
        logits_TE.new_empty(B, E, dtype=torch.int32),
        logits_TE.new_empty(B, 2 * E + 2, dtype=dtype),
    )


@_launch
def route_backward(dweight_TK, dstat_BS, logits_TE, expert_TK, counted_T, sigmoid, renormalize):
    return torch.empty_like(logits_TE)


@_launch
def count_experts(expert_TK, num_experts):
    B = -(-expert_TK.shape[0] // moe_reference.route_block(num_experts))
    return expert_TK.new_empty(B, num_experts, dtype=torch.int32)


@_launch
def sort_slots(expert_TK, count_BE):
    return expert_TK.new_empty(expert_TK.numel(), dtype=torch.int32), count_BE.new_empty(count_BE.shape[1] + 1)


@_launch
def up_proj(x_TD, gate_up_E2FD, order_N, offset_E1, top_k, keep_pre):
    N, F2 = order_N.shape[0], gate_up_E2FD.shape[1]
    return x_TD.new_empty(N, F2 // 2), x_TD.new_empty(N if keep_pre else 0, F2)


@_launch
def down_proj(act_NF, down_EDF, order_N, offset_E1, weight_TK):
    return act_NF.new_empty(act_NF.shape[0], down_EDF.shape[1])


@_launch
def combine(slot_ND, top_k):
    return slot_ND.new_empty(slot_ND.shape[0] // top_k, slot_ND.shape[1])


@_launch
def decode_up(x_TD, gate_up_E2FD, expert_TK, weight_TK):
    return x_TD.new_empty(expert_TK.numel(), gate_up_E2FD.shape[1] // 2)


@_launch
def decode_down(act_NF, down_EDF, expert_TK):
    return act_NF.new_empty(act_NF.shape[0], down_EDF.shape[1])


@_launch
def decode_layer(x_TD, logits_TE, counted_T, gate_up_E2FD, down_EDF, top_k, sigmoid, renormalize):
    return torch.empty_like(x_TD), logits_TE.new_empty(1, 2 * logits_TE.shape[1] + 2, dtype=_score_dtype(logits_TE))


@_launch
def down_backward(dy_TD, down_EDF, pre_N2F, order_N, offset_E1, weight_TK):
    return (
        torch.empty_like(pre_N2F),
        pre_N2F.new_empty(pre_N2F.shape[0], down_EDF.shape[2]),
        weight_TK.new_empty(weight_TK.shape),
    )


@_launch
def up_backward(dpre_N2F, gate_up_E2FD, order_N, offset_E1):
    return dpre_N2F.new_empty(dpre_N2F.shape[0], gate_up_E2FD.shape[2])


@_launch
def up_weight_grad(dpre_N2F, x_TD, order_N, offset_E1, top_k):
    return dpre_N2F.new_empty(offset_E1.shape[0] - 1, dpre_N2F.shape[1], x_TD.shape[1])


@_launch
def down_weight_grad(dy_TD, weighted_act_NF, order_N, offset_E1, top_k):
    return dy_TD.new_empty(offset_E1.shape[0] - 1, dy_TD.shape[1], weighted_act_NF.shape[1])


def _expert_mlp(
    x_TD: torch.Tensor,
    weight_TK: torch.Tensor,
    expert_TK: torch.Tensor,
    count_BE: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
    training: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y_TD and, in training, what the backward pass needs beside the arguments: the pre-activation [N, 2F] and the
    sort (order_N, offset_E1). These three are empty otherwise."""
    T, K = expert_TK.shape
    if T == 0:
        return torch.empty_like(x_TD), *_saved(x_TD, expert_TK, count_BE, gate_up_E2FD, training)
    if on_triton(x_TD) and not training and T <= DECODE_TOKENS:
        slot_ND = decode_down(decode_up(x_TD, gate_up_E2FD, expert_TK, weight_TK), down_EDF, expert_TK)
        y_TD = slot_ND if K == 1 else combine(slot_ND, K)
        return y_TD, *_saved(x_TD, expert_TK, count_BE, gate_up_E2FD, training)
    order_N, offset_E1 = sort_slots(expert_TK, count_BE)
    act_NF, pre_N2F = up_proj(x_TD, gate_up_E2FD, order_N, offset_E1, K, training)
    slot_ND = down_proj(act_NF, down_EDF, order_N, offset_E1, weight_TK)
    y_TD = slot_ND if K == 1 else combine(slot_ND, K)
    if training:
        return y_TD, pre_N2F, order_N, offset_E1
    return y_TD, *_saved(x_TD, expert_TK, count_BE, gate_up_E2FD, training)


def _saved(x_TD, expert_TK, count_BE, gate_up_E2FD, training):
    N = expert_TK.numel() if training else 0
    E1 = count_BE.shape[1] + 1 if training else 0
    return x_TD.new_empty(N, gate_up_E2FD.shape[1]), expert_TK.new_empty(N), count_BE.new_empty(E1)


def _expert_mlp_fake(x_TD, weight_TK, expert_TK, count_BE, gate_up_E2FD, down_EDF, training):
    return torch.empty_like(x_TD), *_saved(x_TD, expert_TK, count_BE, gate_up_E2FD, training)


def _inference(
    x_TD: torch.Tensor,
    logits_TE: torch.Tensor,
    counted_T: torch.Tensor | None,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
    top_k: int,
    sigmoid: bool,
    renormalize: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y_TD and stat_BS, without gradients. One operator for any number of tokens: a compiled model has one graph."""
    few = 0 < x_TD.shape[0] <= DECODE_TOKENS
    if few and on_triton(x_TD) and _triton("takes_slices")(x_TD, gate_up_E2FD, top_k):
        return decode_layer(x_TD, logits_TE, counted_T, gate_up_E2FD, down_EDF, top_k, sigmoid, renormalize)
    weight_TK, expert_TK, count_BE, stat_BS = route(logits_TE, counted_T, top_k, sigmoid, renormalize)
    return _expert_mlp(x_TD, weight_TK, expert_TK, count_BE, gate_up_E2FD, down_EDF, False)[0], stat_BS


def _inference_fake(x_TD, logits_TE, counted_T, gate_up_E2FD, down_EDF, top_k, sigmoid, renormalize):
    T, E = logits_TE.shape
    B = -(-T // moe_reference.route_block(E))
    return torch.empty_like(x_TD), logits_TE.new_empty(B, 2 * E + 2, dtype=_score_dtype(logits_TE))


def _expert_mlp_backward(
    dy_TD: torch.Tensor,
    x_TD: torch.Tensor,
    weight_TK: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
    pre_N2F: torch.Tensor,
    order_N: torch.Tensor,
    offset_E1: torch.Tensor,
    needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weight, gate_up and down. The activation is computed again from the pre-activation.

    `needs`: whether those of x, gate_up and down are wanted. One that is not is empty and costs nothing.
    """
    T, K = weight_TK.shape
    if T == 0:
        return _gradients(torch.zeros_like, x_TD, weight_TK, gate_up_E2FD, down_EDF, needs)
    needs_x, needs_gate_up, needs_down = needs
    dx_TD, dgate_up_E2FD, ddown_EDF = (t.new_empty(0) for t in (x_TD, gate_up_E2FD, down_EDF))
    dy_TD = dy_TD.contiguous()
    dpre_N2F, weighted_act_NF, dweight_TK = down_backward(dy_TD, down_EDF, pre_N2F, order_N, offset_E1, weight_TK)
    if needs_down:
        ddown_EDF = down_weight_grad(dy_TD, weighted_act_NF, order_N, offset_E1, K)
    del weighted_act_NF
    if needs_gate_up:
        dgate_up_E2FD = up_weight_grad(dpre_N2F, x_TD, order_N, offset_E1, K)
    if needs_x:
        dslot_ND = up_backward(dpre_N2F, gate_up_E2FD, order_N, offset_E1)
        dx_TD = dslot_ND if K == 1 else combine(dslot_ND, K)
    return dx_TD, dweight_TK, dgate_up_E2FD, ddown_EDF


def _gradients(like: Callable, x_TD, weight_TK, gate_up_E2FD, down_EDF, needs: list[bool]):
    """What the backward pass returns, filled as `like` fills."""
    wanted = (needs[0], True, *needs[1:])
    tensors = (x_TD, weight_TK, gate_up_E2FD, down_EDF)
    return tuple(like(t) if want else t.new_empty(0) for t, want in zip(tensors, wanted, strict=True))


def _expert_mlp_backward_fake(dy_TD, x_TD, weight_TK, gate_up_E2FD, down_EDF, pre_N2F, order_N, offset_E1, needs):
    return _gradients(torch.empty_like, x_TD, weight_TK, gate_up_E2FD, down_EDF, needs)


for _name, _function, _fake in (
    ("nmm_serve::expert_mlp", _expert_mlp, _expert_mlp_fake),
    ("nmm_serve::expert_mlp_backward", _expert_mlp_backward, _expert_mlp_backward_fake),
    ("nmm_serve::moe_inference", _inference, _inference_fake),
):
    torch.library.define(_name, torch.library.infer_schema(_function, mutates_args=()))
    torch.library.impl(_name, ("cpu", "cuda"), _function)
    torch.library.register_fake(_name, _fake)
expert_mlp = torch.ops.nmm_serve.expert_mlp
moe_inference = torch.ops.nmm_serve.moe_inference


def _only_once() -> None:
    """Autograd would take what a kernel gives for a constant, and second derivatives would be silently wrong."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the experts layer has no double backward: call backward() or autograd.grad() without create_graph=True"
        )


def _save_route(ctx, inputs, output):
    logits_TE, counted_T, _, ctx.sigmoid, ctx.renormalize = inputs
    weight_TK, expert_TK, _, stat_BS = output
    ctx.save_for_backward(logits_TE, expert_TK, counted_T)
    ctx.shapes = weight_TK.shape, stat_BS.shape
    ctx.set_materialize_grads(False)


def _backward_route(ctx, dweight_TK, _dexpert, _dcount, dstat_BS):
    _only_once()
    logits_TE, expert_TK, counted_T = ctx.saved_tensors
    dtype = _score_dtype(logits_TE)
    if dweight_TK is None:
        dweight_TK = logits_TE.new_zeros(ctx.shapes[0], dtype=dtype)
    if dstat_BS is None:
        dstat_BS = logits_TE.new_zeros(ctx.shapes[1], dtype=dtype)
    args = dweight_TK.contiguous(), dstat_BS.contiguous(), logits_TE, expert_TK, counted_T
    return route_backward(*args, ctx.sigmoid, ctx.renormalize), None, None, None, None


def _save_expert_mlp(ctx, inputs, output):
    x_TD, weight_TK, _, _, gate_up_E2FD, down_EDF, _ = inputs
    _, pre_N2F, order_N, offset_E1 = output
    ctx.save_for_backward(x_TD, weight_TK, gate_up_E2FD, down_EDF, pre_N2F, order_N, offset_E1)
    ctx.set_materialize_grads(False)  # zeros for the pre-activation's gradient would be the largest tensor of all


def _backward_expert_mlp(ctx, dy_TD, _dpre, _dorder, _doffset):
    _only_once()
    if dy_TD is None:
        return (None,) * 7
    needs = [ctx.needs_input_grad[i] for i in (0, 4, 5)]
    dx, dweight, *others = torch.ops.nmm_serve.expert_mlp_backward(dy_TD, *ctx.saved_tensors, needs)
    dx, dgate_up, ddown = (grad if need else None for grad, need in zip((dx, *others), needs, strict=True))
    return dx, dweight, None, None, dgate_up, ddown, None


torch.library.register_autograd("nmm_serve::route", _backward_route, setup_context=_save_route)
torch.library.register_autograd("nmm_serve::expert_mlp", _backward_expert_mlp, setup_context=_save_expert_mlp)
