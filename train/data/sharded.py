"""The rows of a step, divided: among streams of documents (shards), and among the processes that train on them.

A step is a grid of `accumulate` passes of `rows` rows. Shards and processes divide that grid by the same rule. So a
step is the same grid, row for row, whatever the number of processes, and processes whose number divides that of the
shards read documents of their own.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

from nmm_serve.errors import ConfigError
from nmm_serve.train.data.encoding import Piece
from nmm_serve.train.data.loader import LoaderStats, PackedLoader
from nmm_serve.train.data.packing import Batch

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Division:
    """A grid of passes and rows in `parts` parts: whole passes while they last, then every n-th row of a pass."""

    accumulate: int
    rows: int
    parts: int

    @property
    def pass_groups(self) -> int:
        return gcd(self.accumulate, self.parts)

    @property
    def sharing(self) -> int:
        """Parts that a pass is divided among."""
        return self.parts // self.pass_groups

    @property
    def passes(self) -> int:
        """Passes of one part."""
        return self.accumulate // self.pass_groups

    def part(self, pass_number: int, row: int) -> int:
        """The part that a cell of the grid belongs to. Parts sharing a pass are numbered one after the other."""
        return pass_number % self.pass_groups * self.sharing + row % self.sharing

    @property
    def is_even(self) -> bool:
        return self.rows % self.sharing == 0

    def check(self, name: str) -> None:
        """Raise ConfigError naming `name` when there is no even division."""
        if not self.is_even:
            total = self.rows * self.accumulate
            fitting = [n for n in range(1, total + 1) if Division(self.accumulate, self.rows, n).is_even]
            raise ConfigError(
                f"accumulate {self.accumulate} passes of rows {self.rows} cannot be divided evenly among {self.parts} "
                f"{name}; these can: {', '.join(map(str, fitting))}. Change {name}, rows or accumulate"
            )


class ShardedLoader(Iterator[Batch]):
    """The passes of process `rank`, for ever, out of the one order of steps.

    Each shard is a stream that packs every n-th document. A process opens the streams that its rows come from, which
    share its `num_workers` workers, and leaves the rows of other processes out.
    """

    def __init__(
        self,
        open_stream: Callable[..., PackedLoader],
        *,
        accumulate: int,
        rows: int,
        shards: int = 1,
        rank: int = 0,
        processes: int = 1,
        num_workers: int = 0,
        state: Sequence[dict[str, Any]] | None = None,
    ) -> None:
        """`open_stream` takes rank, world_size, num_workers and state, as PackedLoader does.

        Raises ConfigError when the grid cannot be divided evenly, DataError for a state of another run.
        """
        self._streams_of = Division(accumulate, rows, shards)
        self._parts_of = Division(accumulate, rows, processes)
        self._streams_of.check("data.shards")
        self._parts_of.check("processes")
        self._rank = rank
        if shards % processes and rank == 0:
            logger.warning(
                "data.shards %d is not a multiple of %d processes: some documents are read by several processes, which "
                "leave the rows of others out; a new run could set data.shards=%d", shards, processes, processes,
            )  # fmt: skip
        grid = [(t, r) for t in range(accumulate) for r in range(rows)]
        numbers = sorted({self._streams_of.part(*cell) for cell in grid if self._parts_of.part(*cell) == rank})
        readers = {s: min(self._parts_of.part(*c) for c in grid if self._streams_of.part(*c) == s) for s in numbers}
        self._own = [s for s in numbers if readers[s] == rank]  # the streams whose place this process tells
        workers = -(-num_workers // len(numbers))
        self._streams = {
            s: open_stream(
                rank=s, world_size=shards, num_workers=workers, state=None if state is None else state[s]
            )
            for s in numbers
        }  # fmt: skip
        self._next_pass = 0

    def __next__(self) -> Batch:
        """This process's rows of its next pass."""
        batch: Batch | None = None
        streams, parts = self._streams_of, self._parts_of
        for _ in range(parts.pass_groups):  # of the passes of one round, one is ours
            rows: list[tuple[int, list[Piece]]] = []
            for number, stream in self._streams.items():
                places = [r for r in range(streams.rows) if streams.part(self._next_pass, r) == number]
                if places:
                    rows += zip(places, stream.next_rows(len(places)), strict=True)
            rows.sort(key=lambda pair: pair[0])
            mine = [row for place, row in rows if parts.part(self._next_pass, place) == self._rank]
            if mine:
                assert batch is None
                batch = next(iter(self._streams.values())).collate(mine)
            self._next_pass = (self._next_pass + 1) % streams.accumulate
        assert batch is not None
        return batch

    @property
    def wait_seconds(self) -> float:
        """Time spent waiting for encoded documents since the loader was made."""
        return sum(stream.stats.wait_seconds for stream in self._streams.values())

    def counts(self) -> LoaderStats:
        """What this process's own streams have counted; over all processes each document counts once."""
        return LoaderStats.over(self._streams[number].stats for number in self._own)

    def state_dict(self) -> dict[int, dict[str, Any]]:
        """The place of this process's own streams after the last step, by number."""
        return {number: self._streams[number].state_dict() for number in self._own}

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()
