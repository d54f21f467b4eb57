"""Sources of documents: what a kind of data must offer, and the table of kinds."""

import importlib
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nmm_serve.errors import ConfigError, DataError, unknown_name
from nmm_serve.train.data.documents import Document, Kind, Objective
from nmm_serve.train.data.options import checked

KINDS = {
    "builtin": ("builtin_source", "Builtin"),
    "coco_captions": ("coco", "CocoCaptions"),
    "interleaved_jsonl": ("interleaved_source", "InterleavedJsonl"),
    "text": ("text_source", "Text"),
    "vqa_v2": ("coco", "VQAv2"),
    "webdataset": ("tar_source", "TarShards"),
}
"""Source kinds of a mixture file: the module and the class of each."""


@dataclass(frozen=True, slots=True)
class Visit:
    """One reading of a document. Choices that a source leaves open (which caption, which order of questions) follow
    from it, so the same visit gives the same document."""

    seed: str
    epoch: int
    objective: Objective

    def rng(self, *key: object) -> random.Random:
        """A generator for `key` in this epoch."""
        return random.Random("/".join(map(str, (self.seed, self.epoch, *key))))

    def rotate(self, number: int, key: object) -> int:
        """One of range(number): a seeded one in the first epoch, then in turn, so that all come up."""
        return (random.Random(f"{self.seed}/{key}").randrange(number) + self.epoch) % number

    def caption(self, captions: Sequence[str], which: Literal["one", "all"], key: object) -> str:
        """One of an image's captions, another one each epoch; or all of them in a new order, as one text: a picture is
        costly to read, and each caption tells something else of it."""
        if which == "one":
            return captions[self.rotate(len(captions), key)]
        return " ".join(self.rng("captions", key).sample(list(captions), len(captions)))


class Source(ABC):
    """Random access to documents; reading one twice in the same visit gives the same document.

    `kind` is the kind of its documents.
    """

    name: str
    kind: Kind

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def document(self, index: int, visit: Visit) -> Document:
        """Raises DataError for a document that cannot be read."""

    def texts(self, index: int) -> list[str]:
        """Every text that the document can show in any epoch. Raises DataError for a document that cannot be read."""
        return [part for _, part in self.document(index, Visit("0", 0, "sft")).parts if type(part) is str]

    def item_name(self, index: int) -> str:
        """What a log calls the document, also when it cannot be read."""
        return f"{self.name}#{index}"


def open_source(entry: Mapping[str, Any], base: Path = Path()) -> Source:
    """A source from its entry in a mixture file: `kind`, `name` (default: the kind) and the options of the kind.

    Relative paths start at `base`. Raises ConfigError for unknown names and wrong values, DataError for files that are
    missing or of another shape, and for a source without documents.
    """
    if not isinstance(entry, Mapping):
        raise ConfigError(f"a source is {entry!r}; expected options like 'kind: coco_captions'")
    options = dict(entry)
    kind = options.pop("kind", None)
    if kind is None:
        raise ConfigError(f"a source has no kind: {dict(entry)}. Known: {', '.join(KINDS)}")
    if kind not in KINDS:
        raise ConfigError(unknown_name("source kind", str(kind), KINDS))
    name = options.pop("name", kind)
    if not isinstance(name, str) or not name:
        raise ConfigError(f"a source of kind {kind} has the name {name!r}; expected text")
    module, cls_name = KINDS[kind]
    cls = getattr(importlib.import_module(f"nmm_serve.train.data.{module}"), cls_name)
    source = cls(name, **checked(cls, options, f"source {name!r} ({kind})", base))
    if len(source) == 0:
        raise DataError(f"source {name!r} ({kind}) has no documents")
    return source
