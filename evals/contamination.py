"""Whether an evaluation set was in the training data: the same images, nearly the same images, the same words.

The evaluation set is held in memory, the training data stream past it, so that the latter may be large.
"""

import os
import string
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from nmm_serve.errors import ImageError, NMMError
from nmm_serve.evals.image_hash import NEAR_BITS, NEAR_COLOUR, Fingerprint, ImageSource, NearIndex, fingerprint_all

NGRAM = 13
NAMED = 5
"""Training items that are named for each evaluation item; all are counted."""
_BATCH = 1024

DEFINITIONS = {
    "exact image": "the evaluation image and a training image have the same size and the same pixels, decoded",
    "near image": f"not exact; their perceptual hashes (pHash, 64 bits) differ in at most {NEAR_BITS} bits, and nine "
    f"in ten values of their 8 x 8 thumbnails, scaled to one brightness, by at most {NEAR_COLOUR:g} of 255; images of "
    "one colour have no such hash",
    "text": f"some {NGRAM} words in a row of the evaluation text stand in a training text, lower-cased and without "
    "punctuation, as lm-eval normalises; a shorter text cannot be checked",
    "share": "of the distinct evaluation images, or of the evaluation texts that can be checked",
}

_NORMALISED = str.maketrans(string.ascii_uppercase, string.ascii_lowercase, string.punctuation)


class Readable(Protocol):
    """A document that has not been read yet. Both callables raise an NMMError for one that cannot be."""

    @property
    def name(self) -> str: ...

    @property
    def read(self) -> Callable[[], Any]: ...

    @property
    def texts(self) -> Callable[[], list[str]]: ...


def ngrams(text: str, n: int = NGRAM) -> list[str]:
    """Every n words in a row, normalised as lm-eval's decontamination does: ASCII lower case, no ASCII punctuation."""
    words = text.translate(_NORMALISED).split()
    return [" ".join(words[start : start + n]) for start in range(len(words) - n + 1)]


@dataclass
class _Found:
    """What was found about one evaluation item."""

    train: list[str] = field(default_factory=list)
    count: int = 0
    detail: Any = None

    def add(self, name: str, detail: Any) -> None:
        self.count += 1
        if self.detail is None or (isinstance(detail, int) and detail < self.detail):
            self.detail = detail
        if len(self.train) < NAMED and name not in self.train:
            self.train.append(name)


class _Side:
    """One of the two data sets as it is read: its images once each, its texts, and what could not be read."""

    def __init__(self, name: str, documents: Iterable[Readable], progress: Callable[[int], None]) -> None:
        self.name = name
        self._documents, self._progress = documents, progress
        self._seen: set[str] = set()
        self.documents = 0
        self.errors: list[dict[str, Any]] = []

    def images(self, take_texts: Callable[[str, list[str]], None]) -> Iterator[tuple[str, ImageSource]]:
        """Every distinct image under a name; the texts of each document are handed on meanwhile."""
        for document in self._documents:
            self.documents += 1
            self._progress(1)
            try:
                images, texts = document.read().images, document.texts()
            except NMMError as error:
                self.fail(document.name, error)
                continue
            take_texts(document.name, texts)
            for position, image in enumerate(images):
                if not isinstance(image, str | Path):
                    yield f"{document.name}#{position}" if position else document.name, image
                elif str(image) not in self._seen:
                    self._seen.add(str(image))
                    yield str(image), image

    def fail(self, name: str, error: Exception) -> None:
        self.errors.append({"id": f"{self.name}: {name}", "error": str(error)})


def check(
    train: Iterable[Readable],
    evaluation: Iterable[Readable],
    *,
    workers: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The record's contamination section, and an item for each evaluation image and text that was found.

    Images are hashed by `workers` processes (default: one a core). What cannot be read is a failed item.
    """
    workers = workers or os.cpu_count() or 1
    held = _Side("evaluation", evaluation, progress)
    texts: list[str] = []
    where: dict[str, list[int]] = {}
    unchecked = 0

    def keep(name: str, of_document: list[str]) -> None:
        nonlocal unchecked
        for text in of_document:
            grams = set(ngrams(text))
            unchecked += not grams
            if grams:
                for gram in grams:
                    where.setdefault(gram, []).append(len(texts))
                texts.append(f"{name}: {text}")

    prints = list(_readable(held, fingerprint_all(held.images(keep), workers)))
    exact: dict[bytes, list[str]] = {}
    for name, found in prints:
        exact.setdefault(found.exact, []).append(name)
    known, near = dict(prints), NearIndex(prints)

    flow = _Side("train", train, progress)
    exact_found: dict[str, _Found] = {}
    near_found: dict[str, _Found] = {}
    text_found: dict[int, _Found] = {}
    num_train_texts = num_train_images = 0

    def look_up(name: str, of_document: list[str]) -> None:
        nonlocal num_train_texts
        for text in of_document:
            num_train_texts += 1
            hits: dict[int, str] = {}
            for gram in ngrams(text):
                for index in where.get(gram, ()):
                    hits.setdefault(index, gram)
            for index, gram in hits.items():
                text_found.setdefault(index, _Found()).add(name, gram)

    def match(batch: list[tuple[str, Fingerprint]]) -> None:
        for name, found in batch:
            for here in exact.get(found.exact, ()):
                exact_found.setdefault(here, _Found()).add(name, 0)
        pixels = dict(batch)
        for here, there, bits in near.matches(batch):
            if pixels[there].exact != known[here].exact:
                near_found.setdefault(here, _Found()).add(there, bits)

    batch: list[tuple[str, Fingerprint]] = []
    for named in _readable(flow, fingerprint_all(flow.images(look_up), workers)):
        num_train_images += 1
        batch.append(named)
        if len(batch) == _BATCH:
            match(batch)
            batch = []
    match(batch)

    by_kind = [
        _items("exact image", exact_found, str),
        _items("near image", near_found, str, "differing_bits"),
        _items("text", text_found, lambda index: texts[index], "words"),
    ]
    errors = held.errors + flow.errors
    counts = {
        "images": {
            "evaluation": len(prints),
            "train": num_train_images,
            "without_near_hash": sum(found.near is None for _, found in prints),
            "exact": _count(exact_found, len(prints)),
            "near": _count(near_found, len(prints)),
        },
        "texts": {
            "evaluation": len(texts) + unchecked,
            "train": num_train_texts,
            "too_short": unchecked,
            "overlapping": _count(text_found, len(texts)),
        },
    }
    section = {
        "definitions": DEFINITIONS,
        "n": held.documents,
        "train_documents": flow.documents,
        "failed": len(errors),
        "errors": errors,
        **counts,
        "interval_reason": "every item was looked at: there is nothing to estimate",
        "examples": [item for items in by_kind for item in items[:NAMED]],
    }
    return section, [item for items in by_kind for item in items]


def _readable(
    side: _Side, results: Iterable[tuple[str, Fingerprint | ImageError]]
) -> Iterator[tuple[str, Fingerprint]]:
    for name, result in results:
        if isinstance(result, ImageError):
            side.fail(name, result)
        else:
            yield name, result


def _count(found: dict[Any, _Found], of: int) -> dict[str, Any]:
    return {"count": len(found), "of": of, "share": len(found) / of if of else None}


def _items(
    kind: str, found: dict[Any, _Found], name: Callable[[Any], str], detail: str | None = None
) -> list[dict[str, Any]]:
    return [
        {
            "task": "contamination",
            "kind": kind,
            "evaluation": name(key),
            "train": hit.train,
            "train_count": hit.count,
            **({detail: hit.detail} if detail else {}),
        }
        for key, hit in sorted(found.items())
    ]
