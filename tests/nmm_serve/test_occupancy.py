"""How full an engine was kept: the arithmetic, and work done ahead."""

import threading

import pytest

from nmm_serve.engines import occupancy as module
from nmm_serve.engines.ahead import Ahead
from nmm_serve.engines.occupancy import Occupancy


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

        def perf_counter(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_shares_of_steps(clock):
    occupancy = Occupancy()
    occupancy.start(2, "the test")
    occupancy.admitted(101)
    occupancy.admitted(102)
    occupancy.full(102, 105)
    occupancy.admitted(106)
    occupancy.full(106, 108)
    clock.now = 110
    occupancy.end()
    clock.now = 200
    speed = occupancy.section()
    assert speed["asking_s"] == 10
    assert speed["full_batch_share"] == 0.5
    assert speed["steady_full_batch_share"] == 0.75  # 3 of the 4 seconds from 102 to 106
    assert (speed["ramp_up_s"], speed["drain_s"]) == (2, 4)
    assert speed["full_batch"] == {"limit": 2, "seen_by": "the test"}


def test_shares_of_requests_in_flight(clock):
    occupancy = Occupancy()
    occupancy.start(2, "the test")
    first, second, third = (occupancy.in_flight() for _ in range(3))
    first.__enter__()
    clock.now = 101
    second.__enter__()  # full from here
    clock.now = 104
    first.__exit__(None, None, None)
    clock.now = 105
    third.__enter__()  # and again
    clock.now = 106
    second.__exit__(None, None, None)
    third.__exit__(None, None, None)
    clock.now = 110
    occupancy.end()
    speed = occupancy.section()
    assert speed["full_batch_share"] == 0.4
    assert speed["steady_full_batch_share"] == 0.75
    assert (speed["ramp_up_s"], speed["drain_s"]) == (1, 5)


@pytest.mark.parametrize(
    ("limit", "reason"), [(3, "never 3 requests at once"), (2, "fitted into the first full batch")]
)
def test_no_steady_part(clock, limit, reason):
    occupancy = Occupancy()
    occupancy.start(limit, "the test")
    clock.now = 101
    with occupancy.in_flight(), occupancy.in_flight():
        clock.now = 102
    speed = occupancy.section()
    assert speed["full_batch_share"] == (0 if limit == 3 else 0.5)
    assert speed["steady_full_batch_share"] is None
    assert reason in speed["full_batch_reason"]


def test_nothing_asked():
    speed = Occupancy().section()
    assert (speed["asking_s"], speed["full_batch_share"]) == (0, None)
    assert "all answers were kept" in speed["full_batch_reason"]


@pytest.mark.parametrize("threads", [1, 3])
def test_work_ahead_is_in_order_and_bounded(threads):
    taken, done = [], 0
    items = (taken.append(i) or i for i in range(20))
    with Ahead(items, lambda i: i * i, 4, threads) as ahead:
        while (result := ahead.take(True)) is not None:
            assert result == done * done
            done += 1
            assert len(taken) <= done + 4
        assert done == 20
        assert ahead.take(True) is ahead.take(False) is None


def test_what_is_not_ready_is_waited_for_only_if_asked():
    go = threading.Event()
    with Ahead(["a"], lambda item: go.wait() and item, 4, 1) as ahead:
        assert ahead.take(False) is None
        go.set()
        assert ahead.take(True) == "a"


def test_errors_ahead_are_raised_where_they_are_taken():
    with Ahead([1, 0], lambda i: 1 // i, 4, 1) as ahead:
        assert ahead.take(True) == 1
        with pytest.raises(ZeroDivisionError):
            ahead.take(True)
