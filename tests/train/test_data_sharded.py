from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmm_serve.errors import ConfigError
from nmm_serve.train.data.sharded import Division, ShardedLoader


class Stream:
    """Stands for a PackedLoader: row n of stream s is (s, n)."""

    def __init__(self, rank, world_size, num_workers, state):
        self.number, self.next, self.workers = rank, state or 0, num_workers
        self.stats = SimpleNamespace(wait_seconds=0.0)

    def next_rows(self, count):
        self.next += count
        return [(self.number, n) for n in range(self.next - count, self.next)]

    def collate(self, rows):
        return rows

    def state_dict(self):
        return self.next


@st.composite
def grids(draw):
    accumulate, rows = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    parts = [n for n in range(1, accumulate * rows + 1) if Division(accumulate, rows, n).is_even]
    return accumulate, rows, *(draw(st.sampled_from(parts)) for _ in range(3))


def step_of(loaders):
    """The grid of a step: what was read where, by (pass, row)."""
    cells = {}
    for rank, loader in enumerate(loaders):
        division = loader._parts_of
        for turn in range(division.passes):
            number = turn * division.pass_groups + rank // division.sharing
            for place, row in enumerate(next(loader)):
                cells[number, place * division.sharing + rank % division.sharing] = row
    return cells


def loaders(accumulate, rows, shards, processes, state=None):
    return [
        ShardedLoader(
            Stream, accumulate=accumulate, rows=rows, shards=shards, rank=rank, processes=processes, state=state
        )
        for rank in range(processes)
    ]


@given(grids())
def test_a_step_is_the_same_grid_for_any_number_of_processes(grid):
    accumulate, rows, shards, first, second = grid
    alone, many = loaders(accumulate, rows, shards, 1), loaders(accumulate, rows, shards, first)
    expected = [step_of(alone) for _ in range(3)]
    assert [step_of(many) for _ in range(2)] == expected[:2]
    assert sorted(expected[0]) == [(t, r) for t in range(accumulate) for r in range(rows)]
    # each stream's place is told once, and any other number of processes goes on from it
    places = [place for loader in many for place in loader.state_dict().items()]
    assert sorted(number for number, _ in places) == list(range(shards))
    others = loaders(accumulate, rows, shards, second, [place for _, place in sorted(places)])
    assert step_of(others) == expected[2]


@given(grids())
def test_processes_that_divide_the_shards_read_documents_of_their_own(grid):
    accumulate, rows, shards, count, _ = grid
    read = [set(loader._streams) for loader in loaders(accumulate, rows, shards, count)]
    if shards % count == 0:
        assert sum(map(len, read)) == shards
    assert set().union(*read) == set(range(shards))


def test_a_division_with_a_rest_is_refused_with_those_that_fit():
    with pytest.raises(ConfigError, match="2 passes of rows 3 .* among 4 processes; these can: 1, 2, 3, 6"):
        loaders(2, 3, 1, 4)
    with pytest.raises(ConfigError, match=r"among 4 data\.shards"):
        loaders(2, 3, 4, 1)


def test_workers_are_shared_among_the_streams_of_a_process():
    (loader,) = [
        ShardedLoader(Stream, accumulate=1, rows=4, shards=4, num_workers=6),
    ]
    assert [stream.workers for stream in loader._streams.values()] == [2] * 4
