"""A document to pieces of tokens with labels, none longer than the context."""

import random
from dataclasses import dataclass

import numpy as np
import torch

from nmm_serve.errors import DataError
from nmm_serve.images import load_image
from nmm_serve.processor import NMMProcessor
from nmm_serve.train.data.augment import Augmentation, random_resized_crop
from nmm_serve.train.data.documents import Document, ImageSource, Kind, Objective

NO_LOSS = -100


@dataclass(frozen=True, slots=True)
class Piece:
    """A document, or a part of a long text, as one span of a row.

    `input_ids` and `labels` are int32 of the same length; labels[t] is the label OF token t (the model shifts) or -100.
    `pixel_values` [P, K] and `image_grid` [I, 2] are None without images. Only the former is a tensor: it is large, and
    small arrays cross between processes more cheaply.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    kind: Kind
    starts_document: bool = True
    num_image_tokens: int = 0
    pixel_values: torch.Tensor | None = None
    image_grid: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.input_ids)


def encode_document(
    document: Document,
    processor: NMMProcessor,
    *,
    objective: Objective,
    context_length: int,
    augment: Augmentation | None = None,
    rng: random.Random | None = None,
) -> list[Piece]:
    """Tokenise, read the images, and set labels.

    The first token of a piece has no label, since nothing of the same document precedes it. A text longer than the
    context becomes several pieces, with nothing lost between them.

    Raises ImageError for an image that cannot be read, DataError for a document with images that does not fit.
    """
    crop = None
    if augment is not None:
        assert rng is not None, "augmentation needs a seeded generator"

        def crop(image: ImageSource) -> np.ndarray:
            return np.array(random_resized_crop(load_image(image), processor.image_processor, rng))

    prompt, ends = processor.prompt_of_parts([part for _, part in document.parts], document.images, crop)
    encoded = processor.to_tensors(prompt)
    ids = np.array(encoded.input_ids, dtype=np.int32)
    has_loss = ids != processor.image_token_id
    num_image_tokens = len(ids) - int(has_loss.sum())
    if objective == "sft":
        start = 0
        for (role, _), end in zip(document.parts, ends, strict=True):
            if role != "assistant":
                has_loss[start:end] = False
            start = end
    labels = np.where(has_loss, ids, NO_LOSS).astype(np.int32)
    if not document.images:
        starts = range(0, len(ids), context_length)
        spans = [slice(start, start + context_length) for start in starts]
        return [_piece(ids[span], labels[span], document.kind, span.start == 0) for span in spans]
    if len(ids) > context_length:
        raise DataError(
            f"{len(ids)} tokens with its images, over the context_length of {context_length}; "
            "raise context_length, lower image_size, or put fewer images or questions into a document"
        )
    grid = None if encoded.image_grid is None else encoded.image_grid.numpy()
    return [_piece(ids, labels, document.kind, True, num_image_tokens, encoded.pixel_values, grid)]


def _piece(ids: np.ndarray, labels: np.ndarray, *rest) -> Piece:
    labels = labels.copy()
    labels[0] = NO_LOSS
    return Piece(ids, labels, *rest)
