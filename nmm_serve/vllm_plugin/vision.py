"""The ViT of late fusion on vLLM's encoder attention, compiled like the decoder: one graph for images of any sizes.

Where `nmm_serve.models.vision` pads images of different sizes, here they lie one after the other, so that every call
has the same form and compiles once. The parameters and all but the attention are those of `nmm_serve.models`.

Legend: P patches of all images, D width, H heads, C head size, I images.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from vllm.compilation.decorators import should_torch_compile_mm_encoder, support_torch_compile
from vllm.model_executor.layers.attention.mm_encoder_attention import MMEncoderAttention
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from nmm_serve.models.blocks import Attention, EncoderLayer, RMSNorm


class Segments(NamedTuple):
    """Which patches are of one image."""

    cu_seqlens: torch.Tensor
    """int32 [I+1]: where each image begins, and the last one ends."""
    max_seqlen: torch.Tensor
    """int32 []: patches of the largest image, at least. On the host, since kernels are launched by its value."""


def segments(lengths: Sequence[int], device: torch.device, *, slots: int = 0) -> Segments:
    """Of images with so many patches each. `slots`: entries for at least so many images, the further ones empty."""
    ends = [0, *accumulate(lengths)]
    ends += ends[-1:] * (slots - len(lengths))
    max_seqlen = torch.tensor(max(lengths), dtype=torch.int32)
    return Segments(async_tensor_h2d(np.array(ends, dtype=np.int32), device=device), max_seqlen)


class EncoderAttention(Attention):
    def __init__(self, config, layer_idx: int):
        super().__init__(config, config.num_attention_heads, layer_idx)
        self.attn = MMEncoderAttention(num_heads=self.num_heads, head_size=self.head_dim)

    def forward(self, x_PD, images: Segments):  # type: ignore[override]  # an encoder layer's, and no other's
        q, k, v = self.qkv_proj(x_PD).view(-1, 3, self.num_heads, self.head_dim).unbind(1)
        out_PHC = self.attn(self.q_norm(q)[None], self.k_norm(k)[None], v[None], *images)[0]
        return self.o_proj(out_PHC.reshape(x_PD.shape))


class Layer(EncoderLayer):
    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn = EncoderAttention(config, layer_idx)


@support_torch_compile(
    dynamic_arg_dims={"x_PD": 0, "cu_seqlens": 0}, enable_if=should_torch_compile_mm_encoder, is_encoder=True
)
class EncoderBody(nn.Module):
    """All layers and the norm: what is compiled."""

    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_PD: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x_PD = layer(x_PD, Segments(cu_seqlens, max_seqlen))
        return self.norm(x_PD)


class NMMVisionEncoder(nn.Module):
    """In the place of `nmm_serve.models.vision.VisionEncoder`."""

    def __init__(self, config):
        super().__init__()
        self.body = EncoderBody(config=config)

    @property
    def attention_backend(self) -> AttentionBackendEnum:
        """What vLLM has chosen for this device and type."""
        first: Any = self.body.layers[0]
        return first.self_attn.attn.attn_backend

    def forward(self, x_PD: torch.Tensor, grid_I2: torch.Tensor) -> torch.Tensor:
        return self.body(x_PD, *segments(grid_I2.prod(-1).tolist(), x_PD.device))
