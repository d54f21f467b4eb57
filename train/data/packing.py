"""Pack documents into rows of one length, with attention kept inside documents.

Legend: B rows, T context length, P patches of all images, K numbers in a patch, I images.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from typing import TypedDict

import numpy as np
import torch

from nmm_serve.train.data.documents import KINDS, Kind
from nmm_serve.train.data.encoding import NO_LOSS, Piece

LOOKAHEAD = 64
"""Pieces to choose from. More would pad less and mix the order of documents more."""

Key = tuple[int, int]
"""(position of the document in the order, number of the piece in the document)."""


class KindCounts(TypedDict):
    """What a batch holds of one kind. `labels` counts the tokens with loss."""

    documents: int
    tokens: int
    image_tokens: int
    labels: int


class Batch(TypedDict):
    """`input_ids`, `labels`, `position_ids`, `document_ids` [B, T] int64: labels[t] is the label OF token t or -100,
    positions restart with each document, documents count 1, 2, ... in a row and 0 is padding. `pixel_values` [P, K]
    (float32 patches, or uint8 pixels for a GPU) and `image_grid` [I, 2] int64 are None without images. `counts` by
    kind of document.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    document_ids: torch.Tensor
    pixel_values: torch.Tensor | None
    image_grid: torch.Tensor | None
    counts: dict[Kind, KindCounts]


class Packer:
    """A buffer of pieces from which rows are filled.

    A row takes the oldest piece first, so that none waits for ever, and then again and again the longest
    that still fits (of equal ones the oldest).
    """

    def __init__(self, context_length: int) -> None:
        self.context_length = context_length
        self._pieces: dict[Key, Piece] = {}  # in order of arrival
        self._by_length: list[tuple[int, int, int]] = []  # (length, -position, -number)

    def __len__(self) -> int:
        return len(self._pieces)

    def pending(self) -> list[Key]:
        """Keys of the pieces in no row yet, oldest first."""
        return list(self._pieces)

    def add(self, key: Key, piece: Piece) -> None:
        """Keys must come in ascending order."""
        assert 0 < len(piece) <= self.context_length
        self._pieces[key] = piece
        insort(self._by_length, (len(piece), -key[0], -key[1]))

    def row(self) -> list[Piece]:
        """The pieces of the next row; empty when there are none."""
        row: list[Piece] = []
        space = self.context_length
        while self._pieces:
            if not row:
                key = next(iter(self._pieces))
                place = bisect_left(self._by_length, (len(self._pieces[key]), -key[0], -key[1]))
            else:
                place = bisect_left(self._by_length, (space + 1,)) - 1
                if place < 0:
                    break
            _, position, number = self._by_length.pop(place)
            piece = self._pieces.pop((-position, -number))
            row.append(piece)
            space -= len(piece)
        return row


def collate(rows: Sequence[Sequence[Piece]], context_length: int, pad_id: int) -> Batch:
    """Rows of pieces to one batch. Padding has document 0, position 0 and no label."""
    shape = (len(rows), context_length)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, NO_LOSS, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    document_ids = np.zeros(shape, dtype=np.int64)
    for r, row in enumerate(rows):
        start = 0
        for number, piece in enumerate(row, start=1):
            span = slice(start, start + len(piece))
            input_ids[r, span] = piece.input_ids
            labels[r, span] = piece.labels
            position_ids[r, span] = np.arange(len(piece))
            document_ids[r, span] = number
            start += len(piece)
    pieces = [piece for row in rows for piece in row]
    patches = [p.pixel_values for p in pieces if p.pixel_values is not None]
    grids = [p.image_grid for p in pieces if p.image_grid is not None]
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(position_ids),
        document_ids=torch.from_numpy(document_ids),
        pixel_values=torch.cat(patches) if patches else None,
        image_grid=torch.from_numpy(np.concatenate(grids)) if grids else None,
        counts=_counts(pieces),
    )


def _counts(pieces: Iterable[Piece]) -> dict[Kind, KindCounts]:
    counts: dict[Kind, KindCounts] = {
        kind: {"documents": 0, "tokens": 0, "image_tokens": 0, "labels": 0} for kind in KINDS
    }
    for piece in pieces:
        count = counts[piece.kind]
        count["documents"] += piece.starts_document
        count["tokens"] += len(piece)
        count["image_tokens"] += piece.num_image_tokens
        count["labels"] += int((piece.labels != NO_LOSS).sum())
    return {kind: count for kind, count in counts.items() if count["tokens"]}
