"""Documents encoded in order, in this process or in workers.

Workers take chunks of documents by turns and torch's DataLoader puts the chunks back in order, so what comes out does
not depend on how many workers there are.
"""

import contextlib
import dataclasses
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset

from nmm_serve.errors import DataError, NMMError
from nmm_serve.processor import NMMProcessor
from nmm_serve.train.data.documents import Objective
from nmm_serve.train.data.encoding import Piece, encode_document
from nmm_serve.train.data.mixture import Item, Mixture, Walk, place_of
from nmm_serve.train.data.sources import Visit

CHUNK = 8
"""Documents that a worker encodes at a time."""
PREFETCH = 2
"""Chunks that each worker keeps ready."""


@dataclass(frozen=True, slots=True)
class Bad:
    """A document that cannot be used, and why."""

    name: str
    reason: str


class EncodedDocuments(Dataset):
    """Item -> pieces, or why there are none. Lives in the workers."""

    def __init__(
        self, mixture: Mixture, processor: NMMProcessor, objective: Objective, context_length: int, seed: int
    ) -> None:
        self.mixture, self.processor = mixture, processor
        self.objective, self.context_length, self.seed = objective, context_length, seed

    def __getitem__(self, item: Item) -> tuple[Item, list[Piece] | Bad]:
        entry = self.mixture.sources[item.source]
        index, epoch = place_of(item, self.mixture, self.seed)
        visit = Visit(f"{self.seed}/{entry.source.name}", epoch, self.objective)
        try:
            return item, encode_document(
                entry.source.document(index, visit),
                self.processor,
                objective=self.objective,
                context_length=self.context_length,
                augment=entry.augment,
                rng=visit.rng("augment", index) if entry.augment else None,
            )
        except (NMMError, OSError) as error:
            return item, Bad(entry.source.item_name(index), str(error))


class Chunks:
    """Batch sampler: the items of this rank, a chunk at a time."""

    def __init__(self, pending: list[Item], walk: Walk, rank: int, world_size: int) -> None:
        self._pending, self._walk, self._rank, self._world_size = pending, walk, rank, world_size

    def __iter__(self) -> Iterator[list[Item]]:
        chunk = []
        for item in self._items():
            chunk.append(item)
            if len(chunk) == CHUNK:
                yield chunk
                chunk = []

    def _items(self) -> Iterator[Item]:
        yield from self._pending
        for item in self._walk:
            if item.position % self._world_size == self._rank:
                yield item


def encoded_documents(
    dataset: EncodedDocuments, order: Chunks, num_workers: int
) -> Iterator[tuple[Item, list[Piece] | Bad]]:
    """Encoded documents in order. A function without the loader in sight: a cycle between the two would keep
    worker processes alive after the loader is gone, and children forked later would inherit their handles."""
    loader = DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=num_workers,
        collate_fn=_share,
        prefetch_factor=PREFETCH if num_workers else None,
        worker_init_fn=_ignore_interrupts,
        # its own generator: the default draws from torch's global one, whose state belongs to the model
        generator=torch.Generator(),
    )
    try:
        with _quiet_fork(), _own_child_signals():
            chunks = iter(loader)
        for chunk, patches in chunks:
            yield from _unshare(chunk, patches)
    except (RuntimeError, EOFError, ConnectionError) as error:
        # the last two: it died while its patches were being handed over
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"a data worker ended unexpectedly ({error or type(error).__name__}); out of memory? "
            "Try a smaller num_workers, or 0"
        ) from None


Chunk = list[tuple[Item, list[Piece] | Bad]]


def _share(chunk: Chunk) -> tuple[Chunk, torch.Tensor | None]:
    """All patches of a chunk as one tensor: it crosses to the trainer in shared memory, one handle for all."""
    if torch.utils.data.get_worker_info() is None:
        return chunk, None
    patches: list[torch.Tensor] = []
    stripped: Chunk = []
    for item, result in chunk:
        if not isinstance(result, Bad):
            patches += [piece.pixel_values for piece in result if piece.pixel_values is not None]
            result = [dataclasses.replace(piece, pixel_values=None) for piece in result]
        stripped.append((item, result))
    return stripped, torch.cat(patches) if patches else None


def _unshare(chunk: Chunk, patches: torch.Tensor | None) -> Iterator[tuple[Item, list[Piece] | Bad]]:
    """Give the pieces their patches back."""
    if patches is None:
        yield from chunk
        return
    start = 0
    for item, result in chunk:
        if not isinstance(result, Bad):
            restored = []
            for piece in result:
                # by the grid: a pooled image is one token and still all of its patches
                end = start + (0 if piece.image_grid is None else int(piece.image_grid.prod(axis=-1).sum()))
                restored.append(dataclasses.replace(piece, pixel_values=patches[start:end]) if end > start else piece)
                start = end
            result = restored
        yield item, result


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches the whole process group; the trainer alone answers it, and ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def _own_child_signals() -> Iterator[None]:
    """Keep torch from raising at any line of the trainer when a worker dies: it also looks while it waits for one."""
    handler = signal.getsignal(signal.SIGCHLD)
    # None: installed from C, which Python cannot put back
    if threading.current_thread() is not threading.main_thread() or handler is None:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)


@contextlib.contextmanager
def _quiet_fork() -> Iterator[None]:
    """Tell the tokenizers library not to use its threads in forked workers, without touching a user's own choice."""
    name = "TOKENIZERS_PARALLELISM"
    if name in os.environ:
        yield
        return
    os.environ[name] = "false"
    try:
        yield
    finally:
        del os.environ[name]
