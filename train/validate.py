"""Validation: cross-entropy on fixed documents, for each source and their plain mean (the paper's AVG)."""

from pathlib import Path

import torch

from nmm_serve.errors import ConfigError
from nmm_serve.models import NMMForConditionalGeneration
from nmm_serve.processor import NMMProcessor
from nmm_serve.train.config import TrainConfig
from nmm_serve.train.data.loader import evaluation_batches
from nmm_serve.train.data.packing import Batch
from nmm_serve.train.data.sources import open_source
from nmm_serve.train.distributed import Processes
from nmm_serve.train.throughput import count_labels


class Validation:
    """Batches of the validation sources, built once; several processes divide them."""

    def __init__(
        self,
        config: TrainConfig,
        processor: NMMProcessor,
        device: str,
        dtype: torch.dtype,
        procs: Processes | None = None,
    ):
        self.device, self.dtype, self.procs = device, dtype, procs or Processes()
        self.batches: dict[str, list[Batch]] = {}
        for entry in config.data.validation:
            source = open_source(entry, Path(config.data.root))
            if source.name in self.batches:
                raise ConfigError(f"two validation sources are named {source.name!r}; give each its own `name`")
            self.batches[source.name] = list(
                evaluation_batches(
                    source,
                    processor,
                    context_length=config.context_length,
                    rows=config.rows,
                    n=config.data.validation_documents,
                    objective=config.objective,
                )
            )

    @torch.no_grad()
    def losses(self, model: NMMForConditionalGeneration) -> dict[str, float]:
        """`loss_NAME` in nats a token for each source, and `loss_avg`. Empty without validation sources."""
        losses = {}
        model.eval()
        try:
            for name, batches in self.batches.items():
                total, labels = 0.0, 0
                for start in range(0, len(batches), self.procs.count):
                    # every process runs the model as often as the others, who may wait for its shards of it
                    number = start + self.procs.rank
                    batch = batches[min(number, len(batches) - 1)]
                    tensors = {k: v.to(self.device) for k, v in batch.items() if isinstance(v, torch.Tensor)}
                    with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
                        # the loss has logits of its own, where a label is; of the others one position is the least
                        loss = model(**tensors, num_items_in_batch=1, logits_to_keep=1).ce_loss.item()
                    if number < len(batches):
                        total += loss
                        labels += count_labels(batch)
                sums = self.procs.sums({"total": total, "labels": labels})
                losses[f"loss_{name}"] = sums["total"] / sums["labels"]
        finally:
            model.train()
        return losses | ({"loss_avg": sum(losses.values()) / len(losses)} if losses else {})
