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
    num_past: int | None = None,
) -> torch.Tensor:
    """The mask of arXiv 2504.07951, section 2.1: allow (i, j) if j <= i, or i and j are patches of one image.

    Args:
        span_BT: image numbers of the new tokens, from `image_spans`. An image is never split between the cache and the
            new tokens.
        num_keys: S.
        padding_BS: 1 or True for real tokens, 0 for padding; for the keys up to the last new token.
        document_BT: document numbers when several documents share a row (needs S == T).
        num_past: keys before the new tokens; default: S - T. Behind them a static cache has room.

    Returns:
        [B, 1, T, S] bool, True where attention is allowed. A padding token sees itself, so that no row is empty.
    """
    T = span_BT.shape[1]
    num_past = num_keys - T if num_past is None else num_past
    room = num_keys - num_past - T
    query_T = torch.arange(num_past, num_past + T, device=span_BT.device)
    key_S = torch.arange(num_keys, device=span_BT.device)
    span_BS = torch.nn.functional.pad(span_BT, (num_past, room))
    same_image_BTS = (span_BT[:, :, None] == span_BS[:, None, :]) & (span_BT[:, :, None] > 0)
    allowed_BTS = (key_S <= query_T[:, None]) | same_image_BTS
    if document_BT is not None:
        assert num_keys == T, "packed documents are never continued from a cache"
        allowed_BTS = allowed_BTS & (document_BT[:, :, None] == document_BT[:, None, :])
    if padding_BS is not None:
        padding_BS = torch.nn.functional.pad(padding_BS.bool(), (0, room))
        allowed_BTS = (allowed_BTS & padding_BS[:, None, :]) | (key_S == query_T[:, None])
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
