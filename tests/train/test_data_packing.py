"""Packing: nothing lost, nothing twice, and every position says which document it belongs to."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from nmm_serve.train.data.encoding import NO_LOSS, Piece
from nmm_serve.train.data.packing import Packer, collate

PAD = 999_999


@st.composite
def lengths_and_context(draw) -> tuple[list[int], int]:
    context = draw(st.integers(2, 40))
    return draw(st.lists(st.integers(1, context), max_size=60)), context


def make_pieces(lengths: list[int]) -> list[Piece]:
    """Every token has an id of its own; every third piece has patches, every fourth loses half of its labels."""
    pieces, next_id = [], 0
    for number, length in enumerate(lengths):
        ids = np.arange(next_id, next_id + length, dtype=np.int32)
        labels = ids.copy()
        labels[0] = NO_LOSS
        labels[length // 2 :] = NO_LOSS if number % 4 == 0 else labels[length // 2 :]
        patches = torch.full((length // 2, 3), float(number)) if number % 3 == 0 and length > 1 else None
        grid = np.array([[1, length // 2]]) if patches is not None else None
        kind = "caption" if patches is not None else "text"
        pieces.append(Piece(ids, labels, kind, True, 0 if patches is None else length // 2, patches, grid))
        next_id += length
    return pieces


def pack(pieces: list[Piece], context: int) -> list[list[Piece]]:
    packer = Packer(context)
    for position, piece in enumerate(pieces):
        packer.add((position, 0), piece)
    rows = []
    while len(packer):
        rows.append(packer.row())
    return rows


@given(lengths_and_context())
def test_every_token_lands_once_with_its_label_and_place(case):
    lengths, context = case
    pieces = make_pieces(lengths)
    rows = pack(pieces, context)
    batch = collate(rows, context, PAD)
    seen = []
    for r, row in enumerate(rows):
        ids, labels, positions, documents = (
            batch[k][r].tolist() for k in ("input_ids", "labels", "position_ids", "document_ids")
        )
        used = sum(len(piece) for piece in row)
        assert used <= context
        assert ids[used:] == [PAD] * (context - used)
        assert documents[used:] == positions[used:] == [0] * (context - used)
        assert labels[used:] == [NO_LOSS] * (context - used)
        start = 0
        for number, piece in enumerate(row, start=1):
            span = slice(start, start + len(piece))
            assert ids[span] == piece.input_ids.tolist()
            assert labels[span] == piece.labels.tolist()
            assert positions[span] == list(range(len(piece)))
            assert documents[span] == [number] * len(piece)
            start += len(piece)
        seen += ids[:used]
    assert sorted(seen) == list(range(sum(lengths)))


@given(lengths_and_context())
def test_images_come_in_the_order_of_their_pieces(case):
    lengths, context = case
    pieces = make_pieces(lengths)
    rows = pack(pieces, context)
    batch = collate(rows, context, PAD)
    with_images = [piece for row in rows for piece in row if piece.pixel_values is not None]
    if not with_images:
        assert batch["pixel_values"] is None
        assert batch["image_grid"] is None
        return
    assert torch.equal(batch["pixel_values"], torch.cat([p.pixel_values for p in with_images]))
    assert batch["image_grid"].prod(-1).tolist() == [p.num_image_tokens for p in with_images]


@given(lengths_and_context())
def test_counts_add_up(case):
    lengths, context = case
    batch = collate(pack(make_pieces(lengths), context), context, PAD)
    counts = batch["counts"].values()
    assert sum(c["documents"] for c in counts) == len(lengths)
    assert sum(c["tokens"] for c in counts) == sum(lengths) == int((batch["document_ids"] > 0).sum())
    assert sum(c["labels"] for c in counts) == int((batch["labels"] != NO_LOSS).sum())
    patches = batch["pixel_values"]
    assert sum(c["image_tokens"] for c in counts) == (0 if patches is None else len(patches))


@given(lengths_and_context())
def test_the_oldest_piece_never_waits_and_rows_are_maximal(case):
    lengths, context = case
    packer, pieces = Packer(context), make_pieces(lengths)
    for position, piece in enumerate(pieces):
        packer.add((position, 0), piece)
    while len(packer):
        oldest, _ = packer.pending()[0]
        row = packer.row()
        assert row[0] is pieces[oldest]
        space = context - sum(len(piece) for piece in row)
        assert all(lengths[position] > space for position, _ in packer.pending())


def test_longest_that_fits_goes_first_and_of_equals_the_oldest():
    packer = Packer(10)
    pieces = make_pieces([3, 2, 5, 4, 5])
    for position, piece in enumerate(pieces):
        packer.add((position, 0), piece)
    assert packer.row() == [pieces[0], pieces[2], pieces[1]]
    assert packer.pending() == [(3, 0), (4, 0)]
    assert packer.row() == [pieces[3], pieces[4]]
    assert packer.row() == []
