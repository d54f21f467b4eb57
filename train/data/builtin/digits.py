"""Real handwriting: scikit-learn's bundled digits, divided once and for all among the splits."""

import functools
import random

import numpy as np

from nmm_serve.errors import DataError

# Of the 1797 images; the rest is training data.
HELD_OUT_SHARE = {"val": 0.15, "test": 0.15}


@functools.cache
def images() -> np.ndarray:
    """All digit images, [1797, 8, 8] float32, ink 0..1. Raises DataError where scikit-learn is missing."""
    return _load()[0]


@functools.cache
def pools(split: str) -> tuple[tuple[int, ...], ...]:
    """For each digit 0..9 the indices into `images()` that `split` may use.

    The division does not depend on the user's seed: a validation set drawn with another seed than the
    training set must still not share a pen stroke with it.
    """
    rng = random.Random("builtin digits")
    by_digit = []
    labels = _load()[1]
    for digit in range(10):
        indices = [int(i) for i in np.flatnonzero(labels == digit)]
        rng.shuffle(indices)
        n_val, n_test = (round(HELD_OUT_SHARE[s] * len(indices)) for s in ("val", "test"))
        part = {
            "val": indices[:n_val],
            "test": indices[n_val : n_val + n_test],
            "train": indices[n_val + n_test :],
        }[split]
        by_digit.append(tuple(part))
    return tuple(by_digit)


@functools.cache
def _load() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits  # seconds to import, and only the built-in data needs it
    except ImportError as error:
        raise DataError(
            f"the built-in data takes its handwriting from scikit-learn ({error}); run pip install 'nmm-serve[train]'"
        ) from None

    bunch = load_digits()
    return (bunch.images / 16).astype(np.float32), bunch.target
