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
    if counted_T is not None:
        counted_T = counted_T.contiguous()
    weight_TK, expert_TK, count_BE, stat_BS = moe_ops.route(
        logits_TE.contiguous(), counted_T, top_k, score == "sigmoid", renormalize
    )
    return Routing(weight_TK, expert_TK, count_BE, RouterStats(stat_BS))


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
    T, D = x_TD.shape
    E, F2, _ = gate_up_E2FD.shape
    expected = {"gate_up_E2FD": (E, F2, D), "down_EDF": (E, D, F2 // 2), "expert_TK": tuple(weight_TK.shape)}
    given = {"gate_up_E2FD": gate_up_E2FD, "down_EDF": down_EDF, "expert_TK": expert_TK}
    for name, shape in expected.items():
        if tuple(given[name].shape) != shape:
            raise ValueError(f"{name} must be {list(shape)} beside x {[T, D]}, not {list(given[name].shape)}")
    if expert_TK.shape[0] != T:
        raise ValueError(f"expert_TK must have {T} rows, one a token of x, not {expert_TK.shape[0]}")
    device = x_TD.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x_TD, gate_up_E2FD, down_EDF = x_TD.to(dtype), gate_up_E2FD.to(dtype), down_EDF.to(dtype)
    if not x_TD.dtype == gate_up_E2FD.dtype == down_EDF.dtype:
        raise ValueError(f"x is {x_TD.dtype}, gate_up {gate_up_E2FD.dtype} and down {down_EDF.dtype}: give one type")
    expert_TK = expert_TK.to(torch.int32).contiguous()
    if count_BE is None:
        count_BE = moe_ops.count_experts(expert_TK, E)
    differentiable = (x_TD, weight_TK, gate_up_E2FD, down_EDF)
    training = torch.is_grad_enabled() and any(t.requires_grad for t in differentiable)
    x_TD, weight_TK, gate_up_E2FD, down_EDF = (t.contiguous() for t in differentiable)
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
    """`route`, then `expert_mlp`: the whole layer after the router's logits, and the statistics of its losses."""
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
