"""The endless stream of packed batches: encoded in parallel, packed in order, resumed exactly."""

import logging
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from nmm_serve.errors import ConfigError, DataError, NMMError
from nmm_serve.processor import NMMProcessor
from nmm_serve.train.data.documents import Objective
from nmm_serve.train.data.encoding import Piece, encode_document
from nmm_serve.train.data.mixture import Item, Mixture, Walk
from nmm_serve.train.data.packing import LOOKAHEAD, Batch, Key, Packer, collate
from nmm_serve.train.data.parallel import Bad, Chunks, EncodedDocuments, encoded_documents
from nmm_serve.train.data.sources import Source, Visit

logger = logging.getLogger(__name__)

MIN_DOCUMENTS = 100
"""A source's share of bad documents is judged from this many on."""
MAX_IN_A_ROW = 32
"""So many bad documents of one source in a row stop the run at once: its folder has vanished."""
STATE_VERSION = 2


@dataclass
class LoaderStats:
    """Counts that go on over a resume, but for `wait_seconds`, the time spent waiting for encoded documents.

    `documents` and `bad` are by source; `documents` includes the bad ones.
    """

    documents: Counter[str] = field(default_factory=Counter)
    bad: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    padding: int = 0
    wait_seconds: float = 0.0

    @property
    def padding_share(self) -> float:
        """Padding over all positions; 0 before the first batch."""
        positions = self.tokens + self.padding
        return self.padding / positions if positions else 0.0

    @classmethod
    def over(cls, parts: Iterable["LoaderStats"]) -> "LoaderStats":
        """The sums over several loaders."""
        total = cls()
        for part in parts:
            total.documents += part.documents
            total.bad += part.bad
            total.tokens += part.tokens
            total.padding += part.padding
            total.wait_seconds += part.wait_seconds
        return total


class PackedLoader(Iterator[Batch]):
    """Batches of `rows` rows of `context_length` tokens, for ever.

    `rank` of `world_size` processes reads every world_size-th document of one common order.

    Bad documents (an image that is missing, damaged or of no use, no text, too long with images) are logged by
    name, counted in `stats.bad` and left out. When more than `max_bad_share` of a source's documents are bad, judged
    from its first 100 on, or 32 of a source in a row, iteration raises DataError.
    """

    def __init__(
        self,
        mixture: Mixture,
        processor: NMMProcessor,
        *,
        context_length: int,
        rows: int,
        objective: Objective,
        seed: int,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        max_bad_share: float = 0.01,
        state: dict[str, Any] | None = None,
    ) -> None:
        """Raises ConfigError for values out of range, DataError for a `state` of another run."""
        for name, value, least in (
            ("context_length", context_length, 2),
            ("rows", rows, 1),
            ("num_workers", num_workers, 0),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ConfigError(f"{name} is {value}; expected {least} or more")
        if not 0 <= max_bad_share <= 1:
            raise ConfigError(f"max_bad_share is {max_bad_share}; expected a share from 0 to 1")
        assert 0 <= rank < world_size
        self.stats = LoaderStats()
        self._mixture = mixture
        self._dataset = EncodedDocuments(mixture, processor, objective, context_length, seed)
        self._rows = rows
        self._pad_id = processor.tokenizer.pad_token_id
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._num_workers = num_workers
        self._max_bad_share = max_bad_share
        self._packer = Packer(context_length)
        self._walk = Walk(mixture, seed)
        self._items: dict[int, Item] = {}  # of the documents in the packer, by position
        self._in_a_row: Counter[str] = Counter()
        self._last_bad: deque[str] = deque(maxlen=3)
        self._restored: dict[int, set[int]] = {}  # position -> pieces that were pending
        self._stream: Iterator[tuple[Item, list[Piece] | Bad]] | None = None
        if state is not None:
            self._restore(state)
        self._state = self._snapshot([]) if state is None else state

    def __next__(self) -> Batch:
        return self.collate(self.next_rows(self._rows))

    def next_rows(self, count: int) -> list[list[Piece]]:
        """The next `count` rows, not yet a batch."""
        try:
            rows = self._next_rows(count)
        except BaseException:
            # an error keeps its frames, and so the loader, alive: do not let it keep the workers too
            self.close()
            raise
        self._state = self._snapshot(self._packer.pending())
        return rows

    def collate(self, rows: list[list[Piece]]) -> Batch:
        """Rows as one batch."""
        return collate(rows, self._packer.context_length, self._pad_id)

    def _next_rows(self, count: int) -> list[list[Piece]]:
        if self._stream is None:
            pending = [self._items[position] for position in self._restored]
            walk = Walk(self._mixture, self._seed, self._walk.position, self._walk.counts)
            order = Chunks(pending, walk, self._rank, self._world_size)
            self._stream = encoded_documents(self._dataset, order, self._num_workers)
        rows = []
        for _ in range(count):
            # the buffer is filled before each row, so that batches of other sizes hold the same rows
            while len(self._packer) < LOOKAHEAD or self._restored:
                self._take(*self._next_document())
            rows.append(self._packer.row())
        waiting = {position for position, _ in self._packer.pending()}
        self._items = {position: item for position, item in self._items.items() if position in waiting}
        tokens = sum(len(piece) for row in rows for piece in row)
        self.stats.tokens += tokens
        self.stats.padding += count * self._packer.context_length - tokens
        return rows

    def state_dict(self) -> dict[str, Any]:
        """The place after the last rows, as JSON: a loader made with it goes on with exactly the next ones, with any
        number of workers and rows. Small: the documents that wait in the packing buffer are read again."""
        return self._state

    def close(self) -> None:
        """End the worker processes. Iterating on goes on after the last batch."""
        self._stream = None
        self._packer = Packer(self._packer.context_length)
        self._restore(self._state)

    def _snapshot(self, pending: list[Key]) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            "run": self._identity(),
            "position": self._walk.position,
            "counts": dict(zip(self._mixture.names, self._walk.counts, strict=True)),
            "pending": [[*self._items[position], number] for position, number in pending],
            "documents": dict(self.stats.documents),
            "bad": dict(self.stats.bad),
            "tokens": self.stats.tokens,
            "padding": self.stats.padding,
        }

    def _identity(self) -> dict[str, Any]:
        """What must not change between saving and resuming."""
        return {
            "seed": self._seed,
            "objective": self._dataset.objective,
            "context_length": self._packer.context_length,
            "rank": self._rank,
            "world_size": self._world_size,
            "sources": [[s.source.name, s.weight, len(s.source), s.augment or "none"] for s in self._mixture.sources],
        }

    def _restore(self, state: dict[str, Any]) -> None:
        if state.get("version") != STATE_VERSION:
            raise DataError(f"the data state has version {state.get('version')!r}; this release reads {STATE_VERSION}")
        for key, value in self._identity().items():
            if state["run"].get(key) != value:
                raise DataError(
                    f"the data order cannot be continued: {key} was {state['run'].get(key)!r} and is now {value!r}; "
                    "restore it or start a new run"
                )
        counts = [state["counts"][name] for name in self._mixture.names]
        self._walk = Walk(self._mixture, self._seed, state["position"], counts)
        self._items, self._restored = {}, {}
        for position, source, draw, number in state["pending"]:
            self._items[position] = Item(position, source, draw)
            self._restored.setdefault(position, set()).add(number)
        self.stats.documents = Counter(state["documents"])
        self.stats.bad = Counter(state["bad"])
        self.stats.tokens, self.stats.padding = state["tokens"], state["padding"]

    def _next_document(self) -> tuple[Item, list[Piece] | Bad]:
        assert self._stream is not None
        started = time.monotonic()
        document = next(self._stream)
        self.stats.wait_seconds += time.monotonic() - started
        return document

    def _take(self, item: Item, result: list[Piece] | Bad) -> None:
        """Count a document and put its pieces into the packer."""
        wanted = self._restored.pop(item.position, None)
        name = self._mixture.sources[item.source].source.name
        if wanted is None:
            while self._walk.position <= item.position:
                next(self._walk)
            self.stats.documents[name] += 1
        if isinstance(result, Bad):
            self._report(name, result)
        else:
            self._in_a_row[name] = 0
            self._items[item.position] = item
            for number, piece in enumerate(result):
                if wanted is None or number in wanted:
                    self._packer.add((item.position, number), piece)
        self._check_share(name)

    def _report(self, source: str, bad: Bad) -> None:
        reason = bad.reason if bad.name in bad.reason else f"{bad.name}: {bad.reason}"
        logger.warning("bad document: %s", reason)
        self.stats.bad[source] += 1
        self._in_a_row[source] += 1
        self._last_bad.append(reason)

    def _check_share(self, source: str) -> None:
        count, total = self.stats.bad[source], self.stats.documents[source]
        too_many = total >= MIN_DOCUMENTS and count > self._max_bad_share * total
        if too_many or self._in_a_row[source] >= MAX_IN_A_ROW:
            raise DataError(
                f"{count} of {total} documents of source {source!r} are bad, over max_bad_share "
                f"{self._max_bad_share:g} or {MAX_IN_A_ROW} in a row; the last: {'; '.join(self._last_bad)}"
            )


def evaluation_batches(
    source: Source,
    processor: NMMProcessor,
    *,
    context_length: int,
    rows: int,
    n: int,
    objective: Objective = "pretrain",
) -> list[Batch]:
    """The first `n` documents of a source (fewer when it has fewer), packed: the same batches every time.

    The last batch may have fewer rows. Raises DataError for a document that cannot be used: a validation loss over
    the rest would be another number.
    """
    packer = Packer(context_length)
    visit = Visit("evaluation", 0, objective)
    packed: list[list[Piece]] = []
    for index in range(min(n, len(source))):
        try:
            document = source.document(index, visit)
            pieces = encode_document(document, processor, objective=objective, context_length=context_length)
        except (NMMError, OSError) as error:
            raise DataError(f"validation document {source.item_name(index)} cannot be used: {error}") from None
        for number, piece in enumerate(pieces):
            packer.add((index, number), piece)
        while len(packer) > LOOKAHEAD:
            packed.append(packer.row())
    while len(packer):
        packed.append(packer.row())
    return [
        collate(packed[start : start + rows], context_length, processor.tokenizer.pad_token_id)
        for start in range(0, len(packed), rows)
    ]
