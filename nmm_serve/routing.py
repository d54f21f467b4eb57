"""Which expert was given how many tokens, counted from the router's logits: for training logs and for evaluation.

Legend: N tokens, E experts, K experts a token, L layers, G groups of tokens (such as image and text).
"""

from collections.abc import Sequence

import torch

IMAGE, TEXT = 0, 1
"""Groups of `modality_groups`."""


def modality_groups(is_image: torch.Tensor, is_real: torch.Tensor) -> torch.Tensor:
    """IMAGE for patches, TEXT for all other tokens (special ones too), -1 for padding; flat, int64 [N]."""
    return torch.where(is_real.bool(), torch.where(is_image, IMAGE, TEXT), -1).reshape(-1)


@torch.no_grad()
def count_routed(
    router_logits: Sequence[torch.Tensor], group_N: torch.Tensor, num_groups: int, top_k: int
) -> torch.Tensor:
    """Tokens of each group that each expert of each layer was given, one a chosen expert: int64 [L, G, E].

    Args:
        router_logits: [N, E] of each layer.
        group_N: which group a token belongs to; a negative one is not counted.
    """
    counted_N = group_N >= 0
    counts = []
    for logits_NE in router_logits:
        E = logits_NE.shape[1]
        expert_NK = logits_NE.float().softmax(-1).topk(top_k, dim=-1).indices
        cell_NK = group_N[:, None] * E + expert_NK
        counts.append(torch.bincount(cell_NK[counted_N].reshape(-1), minlength=num_groups * E).view(num_groups, E))
    return torch.stack(counts)
