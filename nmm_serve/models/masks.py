"""Who may look at whom: causal text, bidirectional images, no sight of other documents.

Legend: B batch, T new tokens, S keys (cached and new), L tokens of one document.
"""

import torch


def image_spans(is_image_BT: torch.Tensor) -> torch.Tensor:
    """Number the runs of image tokens in each row: 1, 2, ... inside an image, 0 elsewhere. [B, T] int64.

    Two images never touch, since each stands between its own start and end token.
    """
    starts_BT = is_image_BT & ~torch.nn.functional.pad(is_image_BT, (1, 0))[:, :-1]
    return starts_BT.cumsum(-1) * is_image_BT


def attention_mask(
    span_BT: torch.Tensor,
    num_keys: int,
    padding_BS: torch.Tensor | None = None,
    document_BT: torch.Tensor | None = None,
) -> torch.Tensor:
    """The mask of arXiv 2504.07951, section 2.1: allow (i, j) if j <= i, or i and j are patches of one image.

    Args:
        span_BT: image numbers of the new tokens, from `image_spans`. The new tokens are the last T of the S keys;
            an image is never split between the cache and the new tokens.
        num_keys: S.
        padding_BS: 1 or True for real tokens, 0 for padding.
        document_BT: document numbers when several documents share a row (needs S == T).

    Returns:
        [B, 1, T, S] bool, True where attention is allowed. A padding token sees itself, so that no row is empty.
    """
    T = span_BT.shape[1]
    offset = num_keys - T
    query_T = torch.arange(offset, num_keys, device=span_BT.device)
    key_S = torch.arange(num_keys, device=span_BT.device)
    causal_TS = key_S <= query_T[:, None]
    same_image_BTT = (span_BT[:, :, None] == span_BT[:, None, :]) & (span_BT[:, :, None] > 0)
    if offset:
        same_image_BTT = torch.nn.functional.pad(same_image_BTT, (offset, 0))
    allowed_BTS = causal_TS | same_image_BTT
    if document_BT is not None:
        assert offset == 0, "packed documents are never continued from a cache"
        allowed_BTS = allowed_BTS & (document_BT[:, :, None] == document_BT[:, None, :])
    if padding_BS is not None:
        itself_TS = key_S == query_T[:, None]
        allowed_BTS = (allowed_BTS & padding_BS.bool()[:, None, :]) | itself_TS
    return allowed_BTS[:, None]


def additive(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where attention is allowed, -inf elsewhere. Made once: attention would turn a bool mask into this in every
    layer, forward and backward."""
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, float("-inf"))


DocumentMasks = list[list[torch.Tensor]]
"""For each row the additive masks [1, 1, L, L] of its documents, one after the other."""


def document_masks(span_BT: torch.Tensor, document_BT: torch.Tensor, dtype: torch.dtype) -> DocumentMasks:
    """What `attention_mask` allows in packed rows, document by document; padding is one as well.

    A run of equal numbers is a document. On a CPU many small products cost less than one of which most is masked: a
    row of d documents then does a d-th of the work.
    """
    masks = []
    for span_T, document_T in zip(span_BT, document_BT, strict=True):
        lengths = torch.unique_consecutive(document_T, return_counts=True)[1].tolist()
        spans = span_T.split(lengths)
        masks.append([additive(attention_mask(s[None], len(s)), dtype) for s in spans])
    return masks
