"""What a server tells of its own load on its /metrics page, read while requests run."""

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator

from nmm_serve.engines.occupancy import Occupancy

EVERY_S = 0.2
GAUGES = {
    "vllm": ("vllm:num_requests_running", "vllm:num_requests_waiting", "nmm_max_num_seqs"),
    "nmm-serve": ("nmm_requests_running", "nmm_requests_waiting", "nmm_requests_limit"),
}
"""By the owner that a server names: requests that run, that wait, and that can run at once."""


def gauge(page: str, name: str) -> float | None:
    """A gauge's value on a page in Prometheus' format, summed over its labels; None where it is not there."""
    found = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", page, re.MULTILINE)
    try:
        return sum(map(float, found)) if found else None
    except ValueError:
        return None


class ServerLoad:
    """Samples of a server's load.

    Args:
        read: gives the /metrics page; None when it cannot be had.
        owner: as the server names it, of `GAUGES`.
    """

    def __init__(self, read: Callable[[], str | None], owner: str):
        self.read, (self.running, self.waiting, self.at_once) = read, GAUGES[owner]

    def limit(self) -> int | None:
        """How many requests the server runs at once; None where it does not tell."""
        found = gauge(self.read() or "", self.at_once)
        return int(found) if found else None

    def is_full(self, limit: int) -> bool | None:
        """Whether the server has a full batch's worth of requests; None when it does not tell.

        vLLM counts after a step, when those that ended in it are gone and those that take their places have not yet
        left the line: it is the sum that its next step will run.
        """
        page = self.read() or ""
        running, waiting = gauge(page, self.running), gauge(page, self.waiting)
        return None if running is None or waiting is None else running + waiting >= limit

    @contextlib.contextmanager
    def watched(self, limit: int, occupancy: Occupancy) -> Iterator[None]:
        """Sample in a thread; the time between two samples counts as full when both were."""
        stop = threading.Event()

        def sample() -> None:
            before_s, was_full = time.perf_counter(), False
            while not stop.wait(EVERY_S):
                full, now_s = bool(self.is_full(limit)), time.perf_counter()
                if full and was_full:
                    occupancy.full(before_s, now_s)
                before_s, was_full = now_s, full

        thread = threading.Thread(target=sample, name="server-load", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
