"""The transformer block that the decoder and the ViT share: pre-norm attention with QK-norm, SwiGLU or experts.

Legend: B batch, T tokens, S keys, D hidden size, H query heads, G key/value heads, C head size, F feed-forward size,
N = B*T, E experts. A `mask` is a tensor [B, 1, T, S] or `DocumentMasks`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from nmm_serve.kernels.moe import RouterStats, modality_logits, moe_mlp
from nmm_serve.models.masks import DocumentMasks

Rope = tuple[torch.Tensor, torch.Tensor]


class RMSNorm(nn.Module):
    """Gain-only root-mean-square norm."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_tables(position_BT: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rope:
    """cos and sin, each [B, 1, T, C/2], in the halves (NeoX) layout.

    Computed from positions at every call: a non-persistent buffer would be uninitialised after `from_pretrained`.
    """
    exponent = torch.arange(0, head_dim, 2, device=position_BT.device, dtype=torch.float32) / head_dim
    angle_BTC = position_BT[:, :, None].float() * theta**-exponent
    return angle_BTC.cos().to(dtype)[:, None], angle_BTC.sin().to(dtype)[:, None]


def apply_rope(x_BHTC: torch.Tensor, rope: Rope) -> torch.Tensor:
    cos, sin = rope
    a, b = x_BHTC.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attend(q_BHTC, k_BGSC, v_BGSC, mask: torch.Tensor | DocumentMasks | None) -> torch.Tensor:
    """Softmax attention, [B, H, T, C]; with `DocumentMasks` each document by itself."""
    if not isinstance(mask, list):
        gqa = q_BHTC.shape[1] != k_BGSC.shape[1]
        return F.scaled_dot_product_attention(q_BHTC, k_BGSC, v_BGSC, attn_mask=mask, enable_gqa=gqa)
    rows = []
    for q_HTC, k_GTC, v_GTC, masks in zip(q_BHTC, k_BGSC, v_BGSC, mask, strict=True):
        lengths = [m.shape[-1] for m in masks]
        documents = zip(*(x[None].split(lengths, dim=2) for x in (q_HTC, k_GTC, v_GTC)), masks, strict=True)
        rows.append(torch.cat([attend(*document) for document in documents], dim=2))
    return torch.cat(rows)


class Attention(nn.Module):
    """Multi-head attention, with per-head QK-norm or without. `rope=None`: positions were added to the input (ViT)."""

    def __init__(self, config, num_key_value_heads: int, layer_idx: int, qk_norm: bool = True):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        width = config.hidden_size
        self.qkv_proj = nn.Linear(width, (self.num_heads + 2 * num_key_value_heads) * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, width, bias=False)
        self.q_norm, self.k_norm = (
            RMSNorm(self.head_dim, config.rms_norm_eps) if qk_norm else nn.Identity() for _ in range(2)
        )

    def forward(self, x_BTD, mask, rope: Rope | None = None, cache=None):
        B, T, _ = x_BTD.shape
        heads = (self.num_heads, self.num_key_value_heads, self.num_key_value_heads)
        q, k, v = self.qkv_proj(x_BTD).view(B, T, sum(heads), self.head_dim).split(heads, dim=2)
        q_BHTC = self.q_norm(q).transpose(1, 2)
        k_BGTC = self.k_norm(k).transpose(1, 2)
        v_BGTC = v.transpose(1, 2)
        if rope is not None:
            q_BHTC, k_BGTC = apply_rope(q_BHTC, rope), apply_rope(k_BGTC, rope)
        if cache is not None:
            k_BGTC, v_BGTC = cache.update(k_BGTC, v_BGTC, self.layer_idx)
        out_BHTC = attend(q_BHTC, k_BGTC, v_BGTC, mask)
        return self.o_proj(out_BHTC.transpose(1, 2).reshape(B, T, -1))


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x); gate and up are one matrix."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x_BTD):
        gate_BTF, up_BTF = self.gate_up_proj(x_BTD).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate_BTF) * up_BTF)


class Experts(nn.Module):
    """Stacked expert weights, in the layout that transformers and vLLM share: [E, out, in]."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))


class TokenMarks(NamedTuple):
    """What a router may know of a token beside its hidden state."""

    is_image_N: torch.Tensor
    counted_N: torch.Tensor | None
    """False for padding, which the router's losses leave out. None: all count."""


class RouterOutput(NamedTuple):
    logits_NE: torch.Tensor
    stats: RouterStats


class SparseMoE(nn.Module):
    """Token-choice mixture of SwiGLU experts, dropless (arXiv 2504.07951, section 4), or, with `router="modality"`,
    its baseline of one expert for text and one for image patches."""

    def __init__(self, config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.renormalize = config.norm_topk_prob
        self.gate = None
        if config.router == "learned":
            self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = Experts(config.num_experts, config.hidden_size, config.intermediate_size)

    def forward(self, x_BTD, marks: TokenMarks) -> tuple[torch.Tensor, RouterOutput]:
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        logits_NE = modality_logits(marks.is_image_N) if self.gate is None else self.gate(x_ND)
        y_ND, stats = moe_mlp(
            x_ND, logits_NE, self.experts.gate_up_proj, self.experts.down_proj,
            top_k=self.top_k, renormalize=self.renormalize, counted_T=marks.counted_N,
        )  # fmt: skip
        return y_ND.view_as(x_BTD), RouterOutput(logits_NE, stats)


class EncoderLayer(nn.Module):
    """A ViT block: full attention inside one image."""

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, config.num_attention_heads, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, x_BTD, mask_B1TT):
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), mask_B1TT)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class DecoderLayer(nn.Module):
    """A decoder block, dense or sparse. Returns the residual stream and what the router did (None when dense)."""

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, config.num_key_value_heads, layer_idx, config.qk_norm)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SparseMoE(config) if config.num_experts else SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, x_BTD, mask, rope: Rope, cache, marks: TokenMarks):
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), mask, rope, cache)
        h_BTD = self.post_attention_layernorm(x_BTD)
        if isinstance(self.mlp, SparseMoE):
            y_BTD, router = self.mlp(h_BTD, marks)
            return x_BTD + y_BTD, router
        return x_BTD + self.mlp(h_BTD), None
