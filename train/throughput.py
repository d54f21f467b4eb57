"""How much work a batch is, and how much this machine could do: tokens, FLOPs, and the measured matrix-product rate."""

import time
from collections.abc import Collection

import torch

from nmm_serve.config import NMMConfig
from nmm_serve.sizing import ALL_PARTS, training_flops
from nmm_serve.train.data.packing import Batch

GEMM_SIZE = {"cpu": 1024, "cuda": 8192}
"""Of the square product that is the ceiling: large enough that its launch and its edges take no time to speak of."""


def gemm_rate(device: str, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of a square matrix product here and now: the ceiling that MFU is a fraction of."""
    size = GEMM_SIZE[device]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(2):
        a @ b
    _synchronize(device)
    begin, products = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        for _ in range(4):
            a @ b
        _synchronize(device)
        products += 4
    return products * 2 * size**3 / (time.perf_counter() - begin)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def batch_work(config: NMMConfig, batch: Batch, trained: Collection[str] = ALL_PARTS) -> dict[str, int]:
    """Tokens and training FLOPs (matrix products, attention included) of one packed batch; padding is no work."""
    document_BT = batch["document_ids"]
    rows_B1 = torch.arange(document_BT.shape[0])[:, None] * (int(document_BT.max()) + 1)
    numbered = (document_BT + rows_B1)[document_BT > 0]
    documents = torch.unique_consecutive(numbered, return_counts=True)[1].tolist()
    images = [] if batch["image_grid"] is None else batch["image_grid"].prod(-1).tolist()
    labels = count_labels(batch)
    return {
        "tokens": sum(documents),
        "image_tokens": sum(map(config.image_tokens, images)),
        "labels": labels,
        "flops": training_flops(config, images, documents, logits=labels, trained=trained),
    }


def count_labels(batch: Batch) -> int:
    """Positions that carry loss; the first column has no position before it to be predicted from."""
    return int((batch["labels"][:, 1:] != -100).sum())
