"""A mixture: sources with weights, and the endless order in which their documents come.

The document at position n of the order comes from the source that a counter-based generator draws for n; a weight is
the probability that a *document* (not a token) comes from its source. Each source is walked in a permutation of its
own, without repeating a document before an epoch is over. All of it follows from the seed.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nmm_serve.errors import ConfigError, unknown_name
from nmm_serve.train.data.augment import Augmentation
from nmm_serve.train.data.options import convert
from nmm_serve.train.data.order import permuted
from nmm_serve.train.data.sources import Source, open_source

BLOCK = 4096
"""Draws made at once. Part of the order: another value is another order."""


@dataclass(frozen=True, slots=True)
class MixtureSource:
    source: Source
    weight: float
    augment: Augmentation | None = None


@dataclass(frozen=True, slots=True)
class Mixture:
    sources: list[MixtureSource]

    @property
    def names(self) -> list[str]:
        return [s.source.name for s in self.sources]

    @property
    def probabilities(self) -> list[float]:
        total = sum(s.weight for s in self.sources)
        return [s.weight / total for s in self.sources]


def parse_mixture(config: Mapping[str, Any], base: Path = Path()) -> Mixture:
    """A mixture from `{"sources": [{"name", "kind", "weight", "augment", ...options of the kind}, ...]}`.

    `weight` defaults to 1; weights need not sum to 1. `augment: paper` is off by default. Relative paths start at
    `base`.

    Raises ConfigError for unknown names and wrong values, DataError for data that is missing.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(f"the mixture is {config!r}; expected a list of sources under 'sources'")
    for key in config:
        if key != "sources":
            raise ConfigError(unknown_name("key of the mixture", str(key), ["sources"]))
    entries = config.get("sources")
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"mixture: 'sources' is {entries!r}; expected a list with at least one source")
    sources = []
    for entry in entries:
        if not isinstance(entry, Mapping):
            raise ConfigError(f"a source is {entry!r}; expected options like 'kind: coco_captions'")
        options = dict(entry)
        where = f"source {options.get('name', options.get('kind'))!r}"
        weight = convert(options.pop("weight", 1.0), float, f"{where}: weight", base)
        if not (0 < weight < math.inf):
            raise ConfigError(f"{where}: weight {weight}; expected a number above 0 (leave the source out instead)")
        augment = convert(options.pop("augment", None), Augmentation | None, f"{where}: augment", base)
        sources.append(MixtureSource(open_source(options, base), weight, augment))
    names = [s.source.name for s in sources]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two sources are named {name!r}; give each a name of its own")
    return Mixture(sources)


class Item(NamedTuple):
    """One place in the order: the `draw`-th document (from 0) of source number `source`, at `position` overall."""

    position: int
    source: int
    draw: int


class Walk(Iterator[Item]):
    """The order from `position` on. `counts` says how often each source came up before, so nothing is replayed."""

    def __init__(self, mixture: Mixture, seed: int, position: int = 0, counts: list[int] | None = None) -> None:
        self.position = position
        self.counts = list(counts) if counts is not None else [0] * len(mixture.sources)
        self._seed = seed
        self._edges = np.cumsum(mixture.probabilities)[:-1]
        self._block = -1
        self._choices: list[int] = []

    def __next__(self) -> Item:
        block, place = divmod(self.position, BLOCK)
        if block != self._block:
            # raw words instead of Generator methods: only these are promised to stay the same between numpy versions
            words = np.random.Philox(key=self._seed, counter=[0, block, 0, 0]).random_raw(BLOCK)
            uniform = (words >> np.uint64(11)) * 2.0**-53
            self._choices = np.searchsorted(self._edges, uniform, side="right").tolist()
            self._block = block
        source = self._choices[place]
        item = Item(self.position, source, self.counts[source])
        self.position += 1
        self.counts[source] += 1
        return item


def place_of(item: Item, mixture: Mixture, seed: int) -> tuple[int, int]:
    """(index, epoch) of an item in its source."""
    source = mixture.sources[item.source].source
    epoch, place = divmod(item.draw, len(source))
    return permuted(place, len(source), f"{seed}/{source.name}/{epoch}"), epoch
