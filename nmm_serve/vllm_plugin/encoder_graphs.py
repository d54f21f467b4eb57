"""CUDA graphs of the image encoder, by vLLM's interface for them: **never run on a GPU**, and off unless asked for with
`--compilation-config '{"cudagraph_mm_encoder": true}'`.

vLLM captures one graph for each of a few numbers of patches ("token budgets"), packs the images of a step into the
smallest that holds them, and replays it. The patch projection stays outside: it is one launch, and depends on the
images' shapes.

Legend: P patches of all images, D width.
"""

from collections.abc import Hashable
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsEncoderCudaGraph
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.encoder_cudagraph_defs import (
    EncoderCudaGraphCaptureInputs,
    EncoderCudaGraphConfig,
    EncoderCudaGraphReplayBuffers,
    EncoderItemSpec,
)

from nmm_serve.models.vision import image_tokens
from nmm_serve.vllm_plugin.vision import segments

CAPTURABLE = (AttentionBackendEnum.FLASH_ATTN, AttentionBackendEnum.TRITON_ATTN)
"""Encoder attention that reads the images' lengths on the device. vLLM's others read them on the host."""


class EncoderGraphs(SupportsEncoderCudaGraph):
    """The part of `NMMForConditionalGeneration` that vLLM's manager of encoder graphs asks."""

    config: Any
    patch_embed: Any
    vision: Any
    connector: Any

    def get_encoder_cudagraph_config(self) -> EncoderCudaGraphConfig:
        """Raises ValueError where the attention of the encoder cannot be captured."""
        backend = self.vision.attention_backend
        if backend not in CAPTURABLE:
            raise ValueError(
                f"cudagraph_mm_encoder needs an encoder attention of {[b.name for b in CAPTURABLE]}, but this is "
                f"{backend.name}; set --mm-encoder-attn-backend, or leave cudagraph_mm_encoder out"
            )
        return EncoderCudaGraphConfig(
            modalities=["image"], buffer_keys=["x_PD", "cu_seqlens"], out_hidden_size=self.config.hidden_size
        )

    def get_encoder_cudagraph_budget_range(self, vllm_config: VllmConfig) -> tuple[int, int]:
        """Images are scaled to about one size, so that most need the smallest graph for themselves."""
        return self.config.max_image_patches, vllm_config.scheduler_config.max_num_batched_tokens

    def get_encoder_cudagraph_item_specs(self, mm_kwargs: dict[str, Any]) -> list[EncoderItemSpec]:
        return [EncoderItemSpec(patches, patches) for patches in mm_kwargs["image_grid"].prod(-1).tolist()]

    def select_encoder_cudagraph_items(self, mm_kwargs: dict[str, Any], indices: list[int]) -> dict[str, Any]:
        grid_I2 = mm_kwargs["image_grid"]
        images = mm_kwargs["pixel_values"].split(grid_I2.prod(-1).tolist())
        pixels = [images[i] for i in indices] or [mm_kwargs["pixel_values"][:0]]
        return {"pixel_values": torch.cat(pixels), "image_grid": grid_I2[indices]}

    def prepare_encoder_cudagraph_capture_inputs(
        self,
        token_budget: int,
        max_batch_size: int,
        max_frames_per_batch: int,
        device: torch.device,
        dtype: torch.dtype,
        path: str = "default",
        axis_keys: tuple[Hashable, ...] | None = None,
    ) -> EncoderCudaGraphCaptureInputs:
        x_PD = torch.zeros(token_budget, self.config.vision_width, device=device, dtype=dtype)
        # captured with the largest image that fits: its size is baked into the graph
        images = segments([token_budget], device, slots=max_batch_size)
        return EncoderCudaGraphCaptureInputs({"x_PD": x_PD, **images._asdict()})

    def prepare_encoder_cudagraph_replay_buffers(
        self,
        mm_kwargs: dict[str, Any],
        max_batch_size: int,
        max_frames_per_batch: int,
        path: str = "default",
    ) -> EncoderCudaGraphReplayBuffers:
        pixels_PK, grid_I2 = mm_kwargs["pixel_values"], mm_kwargs["image_grid"]
        x_PD = self.patch_embed(pixels_PK, grid_I2.to(pixels_PK.device))
        cu_seqlens, _ = segments(grid_I2.prod(-1).tolist(), x_PD.device, slots=max_batch_size)
        return EncoderCudaGraphReplayBuffers({"x_PD": x_PD, "cu_seqlens": cu_seqlens})

    def encoder_cudagraph_forward(self, inputs: dict[str, torch.Tensor], path: str = "default") -> torch.Tensor:
        x_PD = self.vision.body(inputs["x_PD"], inputs["cu_seqlens"], inputs["max_seqlen"])
        return self.connector(x_PD)

    def encoder_eager_forward(self, mm_kwargs: dict[str, Any], path: str = "default") -> torch.Tensor:
        """All images without a graph: [P, D], or [I, D] where they are pooled."""
        return image_tokens(self, self.config, mm_kwargs["pixel_values"], mm_kwargs["image_grid"])
