"""Bidirectional attention inside images for vLLM's CPU attention, which by itself is causal or not for a whole request.

The kernel takes causality per request. A prompt is therefore presented as several requests over the same cache blocks,
one a segment: causal for text, not causal for an image. The sequence of an image's request ends where the image ends,
so its patches see the text before, all of their image, and nothing after.
"""

import dataclasses

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)


def split_segments(
    num_computed: int, num_new: int, images: list[tuple[int, int]] | None
) -> list[tuple[int, int, bool]]:
    """Cut the new tokens of a request at the borders of its images.

    Args:
        num_computed: tokens already in the cache.
        num_new: tokens of this step.
        images: first and last position of each image.

    Returns:
        For each segment its number of new tokens, the position where it ends, and whether it is causal.
    """
    segments = []
    position, end = num_computed, num_computed + num_new
    for first, last in sorted(images or ()):
        stop = last + 1
        if stop <= position or first >= end:
            continue
        assert stop <= end, "the scheduler never splits an image"
        if first > position:
            segments.append((first - position, first, True))
            position = first
        segments.append((stop - position, stop, False))
        position = stop
    if position < end:
        segments.append((end - position, end, True))
    return segments


class CPUPrefixLMMetadataBuilder(CPUAttentionMetadataBuilder):
    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CPUAttentionMetadata:
        metadata = common_attn_metadata
        images = metadata.mm_req_doc_ranges
        if images and any(images.values()) and metadata.causal is True:
            metadata = self.split(metadata, images)
        return super().build(common_prefix_len, metadata, fast_build)

    def split(
        self, metadata: CommonAttentionMetadata, images: dict[int, list[tuple[int, int]]]
    ) -> CommonAttentionMetadata:
        starts, lengths = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
        requests, query_starts, seq_lens, causal = [], [0], [], []
        for i in range(metadata.num_reqs):
            num_new = starts[i + 1] - starts[i]
            for num_tokens, end, is_causal in split_segments(lengths[i] - num_new, num_new, images.get(i)):
                requests.append(i)
                query_starts.append(query_starts[-1] + num_tokens)
                seq_lens.append(end)
                causal.append(int(is_causal))
        if all(causal):
            return metadata
        return dataclasses.replace(
            metadata,
            num_reqs=len(requests),
            query_start_loc=torch.tensor(query_starts, dtype=torch.int32),
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
            causal=torch.tensor(causal, dtype=torch.int32),  # the kernel reads int32; bool is refused
            block_table_tensor=metadata.block_table_tensor[requests].contiguous(),
        )


class CPUPrefixLMBackend(CPUAttentionBackend):
    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return True

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return CPUPrefixLMMetadataBuilder
