"""Training with several processes: how they meet and agree, and how a model is spread over them.

The arithmetic is that of one process: a loss is divided by the labels of the whole step and gradients are summed, so
a token weighs the same wherever it is. A process without a strategy goes through the same calls, which then do nothing.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from nmm_serve.errors import ConfigError, TrainingError
from nmm_serve.models import NMMForConditionalGeneration
from nmm_serve.models.blocks import DecoderLayer, EncoderLayer
from nmm_serve.processor import NMMProcessor
from nmm_serve.train.config import ParallelConfig
from nmm_serve.train.data.sharded import Division

TIMEOUT = timedelta(minutes=30)
"""The longest that one process may keep the others waiting: for reading, for writing the final checkpoint."""
_SILENT = ("Connection timed out", "No route to host", "Network is unreachable", r"Timed out waiting \d+ms")
IMAGE_FRONT = ("patch_embed", "vision", "connector")

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them."""

    rank: int = 0
    count: int = 1
    device: str = "cpu"
    strategy: str = "none"

    @property
    def main(self) -> bool:
        """Whether this is the process that logs, shows and publishes."""
        return self.rank == 0

    @property
    def shards(self) -> bool:
        """Whether each process holds a part of the model only."""
        return self.strategy == "fsdp" and self.count > 1

    def from_main(self, work: Callable[[], T]) -> T:
        """What `work` returns in the main process, in every process. When it raises there, all of them end; the main
        process alone says why."""
        if self.count == 1:
            return work()
        box: list[Any] = [False, None]
        try:
            if self.main:
                box = [True, work()]
        finally:
            dist.broadcast_object_list(box, src=0)
        if not box[0]:
            raise SystemExit(1)
        return box[1]

    def fail(self, error: Exception) -> None:
        """Raise an error that every process has met: once, in the main process; the others just end."""
        if self.main:
            raise error
        raise SystemExit(1)

    def gather(self, values: Mapping[str, float]) -> list[dict[str, float]]:
        """The values of every process, by rank. The same names everywhere."""
        if self.count == 1:
            return [dict(values)]
        dtype = torch.int64 if all(isinstance(v, int) for v in values.values()) else torch.float64
        mine = torch.tensor(list(values.values()), dtype=dtype)
        all_of_them = [torch.empty_like(mine) for _ in range(self.count)]
        dist.all_gather(all_of_them, mine)
        return [dict(zip(values, tensor.tolist(), strict=True)) for tensor in all_of_them]

    def sums(self, values: Mapping[str, float]) -> dict[str, Any]:
        gathered = self.gather(values)
        return {name: sum(one[name] for one in gathered) for name in values}

    def highest(self, value: int) -> int:
        return int(max(one["value"] for one in self.gather({"value": value})))

    def sum_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """In place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def merged(self, values: Mapping[Any, T]) -> dict[Any, T]:
        """One mapping out of every process's own."""
        if self.count == 1:
            return dict(values)
        parts: list[Any] = [None] * self.count
        dist.all_gather_object(parts, dict(values))
        return {key: value for part in parts for key, value in part.items()}

    def check_same(self, what: str, value: Callable[[], str]) -> None:
        """Raise TrainingError unless the processes agree."""
        if self.count == 1:
            return
        values = self.merged({self.rank: value()})
        if len(set(values.values())) > 1:
            self.fail(TrainingError(f"the processes do not agree about {what}: {values}; start them all alike"))


@contextlib.contextmanager
def processes(config: ParallelConfig) -> Iterator[Processes]:
    """Meet the other processes that torchrun started; without torchrun there is one.

    Raises ConfigError when there are several and no strategy, or more of them on a machine than GPUs.
    """
    count = int(os.environ.get("WORLD_SIZE", 1))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.strategy == "none":
        if count > 1:
            raise ConfigError(
                f"{count} processes were started but parallel.strategy is none; set it to ddp, or to fsdp to shard "
                "the model, or start one process"
            )
        yield Processes(device=device)
        return
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"process {local_rank} of this machine has no GPU of its own: there are {torch.cuda.device_count()}; "
                "start at most one process a GPU (torchrun --nproc-per-node)"
            )
        torch.cuda.set_device(local_rank)
    if dist.is_initialized():  # by a caller who goes on with the group
        yield Processes(dist.get_rank(), dist.get_world_size(), device, config.strategy)
        return
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=TIMEOUT)
    else:
        dist.init_process_group(backend, timeout=TIMEOUT, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), device, config.strategy)
    except RuntimeError as error:
        lost = _lost(str(error)) if count > 1 else None
        if lost is None:
            raise
        raise TrainingError(f"{lost}; run the same command to go on from the last resume checkpoint") from error
    finally:
        dist.destroy_process_group()


def _lost(told: str) -> str | None:
    """What gloo's error says of another process; None for any other error."""
    if "by peer" in told:  # "Connection closed by peer", or "reset"
        return "another process of this run has ended: it has said why, unless it was killed; mend that"
    # a machine that went down or off the network says nothing: the system gives up sending, or TIMEOUT is over
    if "gloo/transport" in told and (found := re.search("|".join(_SILENT), told)):
        return (
            f"another process of this run no longer answers ({found[0]}): look whether its machine and the network are "
            "up, end what still runs there"
        )
    return None


def fingerprint(model: nn.Module, processor: NMMProcessor) -> str:
    """Tells models and tokenizers apart: what processes that start afresh must agree about."""
    digest = hashlib.sha256(processor.tokenizer.backend_tokenizer.to_str().encode())
    for parameter in model.parameters():
        digest.update(str(parameter.detach().double().sum().item()).encode())
    return digest.hexdigest()[:16]


def blocks(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks: what is sharded, and recomputed, one by one. Experts are part of theirs."""
    return [module for module in model.modules() if isinstance(module, (DecoderLayer, EncoderLayer))]


def recompute_activations(model: nn.Module) -> None:
    """Keep the input of each block only and run it again in the backward pass."""
    for block in blocks(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)  # type: ignore[assignment]


def spread(model: NMMForConditionalGeneration, procs: Processes, dtype: torch.dtype, division: Division) -> nn.Module:
    """Put the model on this process's device by the run's strategy. Returns what to call in a training step; the
    parameters stay those of `model`, under their names."""
    if procs.strategy == "none":
        return model.to(procs.device)
    # all must run the same modules, or they would wait for each other's gradients for ever; DDP waits alone, too
    model.model.always_run_image_front = procs.strategy == "ddp" or procs.count > 1
    if procs.count > 1:
        for start in range(0, procs.count, division.sharing):
            ranks = list(range(start, start + division.sharing))
            group = dist.new_group(ranks, timeout=TIMEOUT) if division.sharing > 1 else None
            if procs.rank in ranks:
                model.batch_group = group
    if procs.strategy == "ddp":
        model.to(procs.device)
        encoder = model.config.encoder
        return DistributedDataParallel(
            model,
            gradient_as_bucket_view=True,
            # a pooling head that is not used, say; our own modules all are
            find_unused_parameters=encoder is not None and encoder.pretrained is not None,
        )
    mesh = init_device_mesh(procs.device, (procs.count,))
    policy = (
        MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        if dtype != torch.float32
        else MixedPrecisionPolicy()
    )
    whole = {name: p.detach() for name, p in model.named_parameters()} if procs.main else {}
    for block in blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)  # in place
    if procs.shards:
        hand_out(model, whole, procs)
    return model


@torch.no_grad()
def hand_out(model: nn.Module, whole: Mapping[str, torch.Tensor], procs: Processes) -> None:
    """Give every process its shards of the main process's parameters, one parameter after the other, and its buffers.

    So only one process of all has held the whole model, and each starts from the values of a run by itself.
    """
    if not procs.main:
        model.to_empty(device=procs.device)
    for name, parameter in model.named_parameters():
        full = whole[name] if procs.main else torch.empty(parameter.shape, dtype=parameter.dtype)
        parameter.copy_(sharded_like(full, parameter))
    for buffer in model.buffers():
        dist.broadcast(buffer, src=0)


def accumulating(forward: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
    """For one pass: replicas exchange gradients in the last one only. Shards reduce in each, to stay small."""
    inner = getattr(forward, "_orig_mod", forward)
    if isinstance(inner, DistributedDataParallel) and not last:
        return inner.no_sync()
    return contextlib.nullcontext()


def forget_image_gradients(model: nn.Module) -> None:
    """After a step without any image: as in one process, its optimiser leaves the image front alone."""
    for name, parameter in model.named_parameters():
        if any(part in name.split(".") for part in IMAGE_FRONT):
            parameter.grad = None


def clip_grad_norm(model: nn.Module, limit: float) -> float:
    """Scale gradients down to a global norm of `limit`. Returns the norm before."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def sharded_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A whole tensor, the way the parameter of its shape is spread."""
    if isinstance(parameter, DTensor):
        return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
    return tensor.to(parameter.device)


def whole_model(model: NMMForConditionalGeneration, procs: Processes) -> NMMForConditionalGeneration:
    """The model with all its weights, in the main process; the others, who must call too, get theirs as it is."""
    if procs.strategy == "none":
        return model
    weights: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        if procs.main:
            weights[name] = full.cpu()
    if not procs.main:
        return model
    with torch.device("meta"):
        copy = NMMForConditionalGeneration(model.config)
    copy.load_state_dict(weights, assign=True)
    copy.tie_weights()
    return copy
