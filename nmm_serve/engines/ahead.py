"""Work done in threads ahead of its turn, a bounded number of items at a time and in order."""

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Ahead(Generic[T, R]):
    """`work(item)` of each item, in the order of the items. Close it, or use it as a context manager.

    Args:
        items: taken one at a time in the thread that calls `take`, so it may hold more than fits into memory.
        work: called in other threads. What it raises, `take` raises.
        depth: items at most that are worked on or wait to be taken.
        threads: working at once.
    """

    def __init__(self, items: Iterable[T], work: Callable[[T], R], depth: int, threads: int):
        self._items, self._work, self._depth = iter(items), work, depth
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="ahead")
        self._waiting: deque[Future[R]] = deque()
        self._more = True

    def __enter__(self) -> "Ahead[T, R]":
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def take(self, wait: bool) -> R | None:
        """The next result. None when there are no more, or, unless it may `wait`, when it is not ready."""
        self._fill()
        if not self._waiting or not (wait or self._waiting[0].done()):
            return None
        result = self._waiting.popleft().result()
        self._fill()
        return result

    def _fill(self) -> None:
        while self._more and len(self._waiting) < self._depth:
            try:
                item = next(self._items)
            except StopIteration:
                self._more = False
                return
            self._waiting.append(self._pool.submit(self._work, item))
