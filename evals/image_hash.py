"""Fingerprints of images: exact (every pixel) and near (what survives scaling, recompression and small changes)."""

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from nmm_serve.errors import ImageError, NMMError
from nmm_serve.images import load_image

ImageSource = str | Path | bytes | Image.Image
NEAR_BITS = 8
"""Two images are near when at most so many of the 64 bits of their perceptual hashes differ ..."""
NEAR_COLOUR = 16.0
"""... and nine in ten of the values of their thumbnails, scaled to one brightness, differ by at most so much, of 255.
The hash sees coarse shapes and no colour: alone, it takes any two pictures of one layout for copies."""
FLAT = 4.0
"""Standard deviation of grey values, of 255, below which a perceptual hash is that of noise: such images have none."""
THUMBNAIL = (8, 8)
_CHUNK = 128
_FEW = 512
"""Images that are hashed before another process has even started."""
_CELLS = 4_000_000


@dataclass(frozen=True)
class Fingerprint:
    """`near` (64 bits) and `colours` (of a thumbnail, scaled to a mean of 128) are None for a flat image."""

    exact: bytes
    near: int | None
    colours: bytes | None


def fingerprint(source: ImageSource) -> Fingerprint:
    """Raises ImageError for an image that cannot be read, NMMError where the library for the hashes is missing."""
    try:
        import imagehash
    except ImportError:
        raise NMMError("near-duplicate images need imagehash; pip install 'nmm-serve[evals]'") from None

    image = load_image(source)
    exact = hashlib.sha256(f"{image.width}x{image.height}:".encode() + image.tobytes()).digest()
    if np.asarray(image.convert("L"), dtype=np.float32).std() < FLAT:
        return Fingerprint(exact, None, None)
    bits = np.packbits(imagehash.phash(image).hash.ravel()).tobytes()
    thumbnail = np.asarray(image.resize(THUMBNAIL, Image.Resampling.BOX), dtype=np.float32)
    colours = (thumbnail * (128 / thumbnail.mean())).clip(0, 255).astype(np.uint8)
    return Fingerprint(exact, int.from_bytes(bits, "big"), colours.tobytes())


def fingerprint_all(
    images: Iterable[tuple[str, ImageSource]], workers: int
) -> Iterator[tuple[str, Fingerprint | ImageError]]:
    """(name, fingerprint or what went wrong) of each (name, image), in any order, by `workers` processes.

    Only a few chunks of images are in memory. A handful of images is hashed in this process.
    """
    rest = iter(images)
    few = list(islice(rest, _FEW))
    yield from _fingerprint_chunk(few)
    chunk = list(islice(rest, _CHUNK))
    if not chunk:
        return
    running: set[Future[list[tuple[str, Fingerprint | ImageError]]]] = set()
    # spawned, not forked: this process may have threads (a progress bar), and a fork would copy their locks
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        while chunk or running:
            while chunk and len(running) < 2 * workers:
                running.add(pool.submit(_fingerprint_chunk, chunk))
                chunk = list(islice(rest, _CHUNK))
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield from future.result()


def _fingerprint_chunk(chunk: list[tuple[str, ImageSource]]) -> list[tuple[str, Fingerprint | ImageError]]:
    results: list[tuple[str, Fingerprint | ImageError]] = []
    for name, source in chunk:
        try:
            results.append((name, fingerprint(source)))
        except ImageError as error:
            results.append((name, error))
    return results


class NearIndex:
    """Finds which of the images it was made of are near another one."""

    def __init__(self, fingerprints: Iterable[tuple[str, Fingerprint]]) -> None:
        kept = [(name, f) for name, f in fingerprints if f.near is not None]
        self.names = [name for name, _ in kept]
        self._near = np.array([f.near for _, f in kept], dtype=np.uint64)
        self._colours = _colours([f for _, f in kept])

    def matches(self, others: list[tuple[str, Fingerprint]]) -> Iterator[tuple[str, str, int]]:
        """(name here, name there, differing bits) of every near pair."""
        others = [(name, f) for name, f in others if f.near is not None]
        step = max(1, _CELLS // max(1, len(self.names)))
        for start in range(0, len(others), step):
            part = others[start : start + step]
            near = np.array([f.near for _, f in part], dtype=np.uint64)
            colours = _colours([f for _, f in part])
            distance = _bits(self._near[:, None] ^ near)
            for here, there in np.argwhere(distance <= NEAR_BITS):
                if np.quantile(np.abs(self._colours[here] - colours[there]), 0.9) <= NEAR_COLOUR:
                    yield self.names[here], part[there][0], int(distance[here, there])


def _colours(fingerprints: list[Fingerprint]) -> NDArray[np.int16]:
    width, height = THUMBNAIL
    joined = b"".join(f.colours or b"" for f in fingerprints)
    return np.frombuffer(joined, dtype=np.uint8).reshape(-1, 3 * width * height).astype(np.int16)


_SET_BITS = np.array([bin(value).count("1") for value in range(1 << 16)], dtype=np.uint8)


def _bits(words: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """How many bits are set in each."""
    quarters = [_SET_BITS[(words >> np.uint64(shift)) & np.uint64(0xFFFF)] for shift in (0, 16, 32, 48)]
    return quarters[0] + quarters[1] + quarters[2] + quarters[3]
