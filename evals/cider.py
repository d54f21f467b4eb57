"""CIDEr-D over many bootstrap resamples at once.

CIDEr weighs n-grams by how many of the evaluated images' references hold them, so its value depends on the set: drawing
images again means weighing again, and averaging the old per-image scores would be another statistic. pycocoevalcap
needs seconds for one set of 5,000 images. Here the n-gram counts are laid out once as flat arrays, and a resample only
recomputes the weights. On the set itself the result equals pycocoevalcap's (tested).

Shape suffixes: I images, P pairs (hypothesis, reference), V distinct n-grams, O orders (1- to 4-grams), E entries.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

ORDERS = 4
_SIGMA = 6.0
_SCALE = 10.0


def _ngrams(tokens: str) -> Counter[tuple[str, ...]]:
    words = tokens.split()
    return Counter(tuple(words[i : i + n]) for n in range(1, ORDERS + 1) for i in range(len(words) - n + 1))


def _num_bigrams(grams: Counter[tuple[str, ...]]) -> int:
    """CIDEr-D's length of a caption."""
    return sum(count for gram, count in grams.items() if len(gram) == 2)


class _Sparse:
    """Rows of (n-gram, value) entries; `dot` weighs them by a vector over n-grams and sums per row and order."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._cells: list[int] = []
        self._columns: list[int] = []
        self._values: list[float] = []

    def add(self, row: int, order: int, column: int, value: float) -> None:
        self._cells.append(row * ORDERS + order)
        self._columns.append(column)
        self._values.append(value)

    def freeze(self) -> None:
        self._cells_E = np.array(self._cells, dtype=np.int64)
        self._columns_E = np.array(self._columns, dtype=np.int64)
        self._values_E = np.array(self._values, dtype=float)

    def dot(self, weights_V: Array) -> Array:
        terms_E = self._values_E * weights_V[self._columns_E]
        flat = np.bincount(self._cells_E, weights=terms_E, minlength=self._num_rows * ORDERS)
        return flat.astype(float).reshape(self._num_rows, ORDERS)  # of no entries at all, bincount makes integers


class CiderResampler:
    """CIDEr-D (scale 0 to 10) of any draw of the images.

    `hypotheses` holds one tokenised caption per image, `references` the tokenised references, both in the same order.
    """

    def __init__(self, hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        num_images = len(hypotheses)
        num_pairs = sum(map(len, references))
        vocabulary: dict[tuple[str, ...], int] = {}
        self._num_images = num_images
        self._overlap, self._norm_ref = _Sparse(num_pairs), _Sparse(num_pairs)
        self._norm_hyp = _Sparse(num_images)
        document_images: list[int] = []
        document_ngrams: list[int] = []
        image_of_pair: list[int] = []
        length_gap: list[int] = []
        pair = 0
        for image, (hypothesis, refs) in enumerate(zip(hypotheses, references, strict=True)):
            hyp = _ngrams(hypothesis)
            for gram, count in hyp.items():
                self._norm_hyp.add(image, len(gram) - 1, vocabulary.setdefault(gram, len(vocabulary)), count**2)
            in_references: set[int] = set()
            for ref in map(_ngrams, refs):
                for gram, count in ref.items():
                    column = vocabulary.setdefault(gram, len(vocabulary))
                    in_references.add(column)
                    self._norm_ref.add(pair, len(gram) - 1, column, count**2)
                    if gram in hyp:
                        # CIDEr-D clips the hypothesis's count at the reference's.
                        self._overlap.add(pair, len(gram) - 1, column, min(hyp[gram], count) * count)
                length_gap.append(_num_bigrams(hyp) - _num_bigrams(ref))
                image_of_pair.append(image)
                pair += 1
            document_images += [image] * len(in_references)
            document_ngrams += sorted(in_references)
        for sparse in (self._overlap, self._norm_ref, self._norm_hyp):
            sparse.freeze()
        self._num_ngrams = len(vocabulary)
        self._document_images = np.array(document_images, dtype=np.int64)
        self._document_ngrams = np.array(document_ngrams, dtype=np.int64)
        self._image_of_pair_P = np.array(image_of_pair, dtype=np.int64)
        self._references_I = np.array([len(refs) for refs in references], dtype=float)
        self._penalty_P = np.exp(-(np.array(length_gap, dtype=float) ** 2) / (2 * _SIGMA**2))

    def per_image(self, counts_I: Array) -> Array:
        """CIDEr-D of each image when image i is in the set counts_I[i] times; images drawn 0 times score too."""
        frequency_V = np.bincount(
            self._document_ngrams, weights=counts_I[self._document_images].astype(float), minlength=self._num_ngrams
        )
        weights_V = (np.log(float(counts_I.sum())) - np.log(np.maximum(1.0, frequency_V))) ** 2
        overlap_PO = self._overlap.dot(weights_V)
        norms_PO = (
            np.sqrt(self._norm_ref.dot(weights_V)) * np.sqrt(self._norm_hyp.dot(weights_V))[self._image_of_pair_P]
        )
        similarity_PO = np.divide(overlap_PO, norms_PO, out=overlap_PO, where=norms_PO != 0)
        similarity_P = similarity_PO.mean(axis=1) * self._penalty_P
        sums_I = np.bincount(self._image_of_pair_P, weights=similarity_P, minlength=self._num_images)
        return _SCALE * sums_I / self._references_I

    def scores(self, counts_RI: Array) -> Array:
        """CIDEr-D of each resample: a statistic for `stats.bootstrap`."""
        return np.array([counts_I @ self.per_image(counts_I) / counts_I.sum() for counts_I in counts_RI])
