"""The mixture-of-experts layer after the router's logits: Triton on CUDA, eager on a CPU, one differentiable interface.

Legend: T tokens, D hidden size, E experts, K experts a token, F expert hidden size, B blocks of tokens, S statistics.
"""

from typing import Literal, NamedTuple

import torch

from nmm_serve.kernels import moe_ops

Score = Literal["softmax", "sigmoid"]


class RouterTotals(NamedTuple):
    """Counts over a batch."""

    slots_E: torch.Tensor
    """How often each expert was chosen."""
    num_tokens: torch.Tensor


class RouterStats(NamedTuple):
    """What the routing pass has summed over the tokens that count; nothing is computed until it is asked for."""

    stat_BS: torch.Tensor

    @property
    def num_experts(self) -> int:
        return self.stat_BS.shape[1] // 2 - 1

    @property
    def num_tokens(self) -> torch.Tensor:
        """Tokens that count, a scalar on the device."""
        return self.stat_BS[:, -1].sum()

    @property
    def slots_E(self) -> torch.Tensor:
        """How often each expert was chosen. Sums to top_k * num_tokens."""
        return self.stat_BS[:, : self.num_experts].sum(0)

    def totals(self) -> RouterTotals:
        """The counts, without gradient."""
        return RouterTotals(self.slots_E.detach(), self.num_tokens.detach())

    def load_balancing_loss(self, batch: RouterTotals | None = None) -> torch.Tensor:
        """Switch Transformer's (arXiv 2101.03961, eq. 4): E * sum_e share_e * mean probability_e. 1 when balanced.

        `batch`: counts over a batch that these tokens are a part of; the loss is then their part of the batch's.
        """
        slots_E, num_tokens = batch or self.totals()
        share_E = slots_E / slots_E.sum().clamp(min=1)
        prob_E = self.stat_BS[:, self.num_experts : -2].sum(0) / num_tokens.clamp(min=1)
        return self.num_experts * (share_E * prob_E).sum()

    def z_loss(self, batch: RouterTotals | None = None) -> torch.Tensor:
        """Mean squared logsumexp of the logits (ST-MoE, arXiv 2202.08906, eq. 5): keeps the logits small. `batch` as
        above."""
        _, num_tokens = batch or self.totals()
        return self.stat_BS[:, -2].sum() / num_tokens.clamp(min=1)


class Routing(NamedTuple):
    """Which experts each token visits."""

    weight_TK: torch.Tensor
    """In the scores' type, differentiable."""
    expert_TK: torch.Tensor
    """int32."""
    count_BE: torch.Tensor
    """int32: slots of each expert, for each block of tokens."""
    stats: RouterStats


def _checked_router(
    logits_TE: torch.Tensor, top_k: int, score: str, counted_T: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Both as the operators want them."""
    if logits_TE.dim() != 2 or not 1 <= top_k <= logits_TE.shape[1]:
        raise ValueError(f"logits must be [tokens, experts] with at least top_k = {top_k} >= 1 experts, "
                         f"not {list(logits_TE.shape)}")  # fmt: skip
    if score not in ("softmax", "sigmoid"):
        raise ValueError(f"score must be 'softmax' or 'sigmoid', not {score!r}")
    if counted_T is not None and (counted_T.dtype != torch.bool or counted_T.shape != logits_TE.shape[:1]):
        raise ValueError(
            f"counted_T must be {logits_TE.shape[0]} bools, not {list(counted_T.shape)} of {counted_T.dtype}"
        )
    if logits_TE.dtype == torch.float64 and moe_ops.on_triton(logits_TE):
        logits_TE = logits_TE.float()  # the kernels score in fp32
    return logits_TE.contiguous(), counted_T if counted_T is None else counted_T.contiguous()


def route(
    logits_TE: torch.Tensor,
    top_k: int,
    *,
    score: Score = "softmax",
    renormalize: bool = False,
    counted_T: torch.Tensor | None = None,
) -> Routing:
    """Choose the `top_k` experts of each token.

    Args:
        score: over all experts, in fp32 (fp64 for fp64 logits on a CPU), before the choice.
        renormalize: divide the chosen weights by their sum.
        counted_T: bool; tokens that the statistics count (padding should not). All tokens are routed.

    Raises ValueError when the arguments do not fit together.
    """
    logits_TE, counted_T = _checked_router(logits_TE, top_k, score, counted_T)
    weight_TK, expert_TK, count_BE, stat_BS = moe_ops.route(
        logits_TE, counted_T, top_k, score == "sigmoid", renormalize
    )
    return Routing(weight_TK, expert_TK, count_BE, RouterStats(stat_BS))


def _checked_layer(
    x_TD: torch.Tensor, gate_up_E2FD: torch.Tensor, down_EDF: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All three as the operators want them: of one type, under autocast autocast's."""
    D, (E, F2, _) = x_TD.shape[1], gate_up_E2FD.shape
    for name, tensor, shape in (("gate_up_E2FD", gate_up_E2FD, (E, F2, D)), ("down_EDF", down_EDF, (E, D, F2 // 2))):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)} beside x {list(x_TD.shape)}, not {list(tensor.shape)}")
    device = x_TD.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x_TD, gate_up_E2FD, down_EDF = x_TD.to(dtype), gate_up_E2FD.to(dtype), down_EDF.to(dtype)
    if not x_TD.dtype == gate_up_E2FD.dtype == down_EDF.dtype:
        raise ValueError(f"x is {x_TD.dtype}, gate_up {gate_up_E2FD.dtype} and down {down_EDF.dtype}: give one type")
    return x_TD.contiguous(), gate_up_E2FD.contiguous(), down_EDF.contiguous()


def _trains(*differentiable: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in differentiable)


def expert_mlp(
    x_TD: torch.Tensor,
    weight_TK: torch.Tensor,
    expert_TK: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
    *,
    count_BE: torch.Tensor | None = None,
) -> torch.Tensor:
    """Dropless SwiGLU experts: y_t = sum_k weight_tk * down_e(silu(gate_e x_t) * up_e x_t), e = expert_tk.

    Args:
        expert_TK: int32; the experts of one token must differ.
        gate_up_E2FD: the gate's F rows, then the up projection's F rows: the layout of transformers and vLLM.
        count_BE: of `route`, which has it for nothing; counted here otherwise.

    Returns:
        [T, D] in x's type; under autocast in autocast's, which then the products run in.

    Raises ValueError when shapes or types do not fit together.
    """
    if expert_TK.shape != weight_TK.shape or expert_TK.shape[0] != x_TD.shape[0]:
        raise ValueError(
            f"expert_TK and weight_TK must have {x_TD.shape[0]} rows, one a token of x, and one shape, not "
            f"{list(expert_TK.shape)} and {list(weight_TK.shape)}"
        )
    x_TD, gate_up_E2FD, down_EDF = _checked_layer(x_TD, gate_up_E2FD, down_EDF)
    expert_TK = expert_TK.to(torch.int32).contiguous()
    if count_BE is None:
        count_BE = moe_ops.count_experts(expert_TK, gate_up_E2FD.shape[0])
    training = _trains(x_TD, weight_TK, gate_up_E2FD, down_EDF)
    weight_TK = weight_TK.contiguous()
    return moe_ops.expert_mlp(x_TD, weight_TK, expert_TK, count_BE, gate_up_E2FD, down_EDF, training)[0]


def moe_mlp(
    x_TD: torch.Tensor,
    router_logits_TE: torch.Tensor,
    gate_up_E2FD: torch.Tensor,
    down_EDF: torch.Tensor,
    *,
    top_k: int,
    score: Score = "softmax",
    renormalize: bool = False,
    counted_T: torch.Tensor | None = None,
) -> tuple[torch.Tensor, RouterStats]:
    """`route`, then `expert_mlp`: the whole layer after the router's logits, and the statistics of its losses.

    Where nothing wants a gradient this is one operator, which is free to choose the experts inside of it.
    """
    T, E = x_TD.shape[0], gate_up_E2FD.shape[0]
    if router_logits_TE.shape != (T, E):
        raise ValueError(
            f"the router's logits must have {T} rows, one a token of x, of {E} experts, "
            f"not {list(router_logits_TE.shape)}"
        )
    if not _trains(x_TD, router_logits_TE, gate_up_E2FD, down_EDF):
        logits_TE, counted_T = _checked_router(router_logits_TE, top_k, score, counted_T)
        x_TD, gate_up_E2FD, down_EDF = _checked_layer(x_TD, gate_up_E2FD, down_EDF)
        y_TD, stat_BS = moe_ops.moe_inference(
            x_TD, logits_TE, counted_T, gate_up_E2FD, down_EDF, top_k, score == "sigmoid", renormalize
        )
        return y_TD, RouterStats(stat_BS)
    weight_TK, expert_TK, count_BE, stats = route(
        router_logits_TE, top_k, score=score, renormalize=renormalize, counted_T=counted_T
    )
    return expert_mlp(x_TD, weight_TK, expert_TK, gate_up_E2FD, down_EDF, count_BE=count_BE), stats


def modality_logits(is_image_T: torch.Tensor) -> torch.Tensor:
    """Router logits [T, 2] of hard routing by modality: text to expert 0, image patches to expert 1, with weight 1.

    The modality-aware baseline of arXiv 2504.07951, section 4: the softmax of (0, -inf) is exactly (1, 0), so
    that one path serves learned and hard routing. For top-1.
    """
    wrong_T2 = torch.stack((is_image_T, ~is_image_T), dim=-1)
    return torch.zeros(wrong_T2.shape, device=is_image_T.device).masked_fill(wrong_T2, float("-inf"))
