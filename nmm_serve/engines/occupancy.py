"""How full an engine was kept while it answered a stream of requests."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

DEFINITIONS = {
    "asking_s": "seconds from the start of the first question to the last answer; kept answers cost nothing here",
    "full_batch_share": "share of asking_s in which the batch was full",
    "steady_full_batch_share": "the same without the two ends: from the moment when the batch was first full to the "
    "moment when the last question was admitted",
    "ramp_up_s": "seconds until the batch was first full",
    "drain_s": "seconds from the admission of the last question, after which nothing can fill the batch any more",
    "full_batch": "how many requests make a batch full, and how that is seen",
}


class Occupancy:
    """The clock of one stream of requests. Engines write it; threads may.

    An engine that runs steps itself calls `admitted` and `full`; one that sees requests come and go uses `in_flight`.
    """

    def __init__(self) -> None:
        self.begin_s = time.perf_counter()
        self.end_s: float | None = None
        self.limit: int | None = None
        self.seen_by = ""
        self.asked = False
        self.reason: str | None = "nothing was asked: all answers were kept from an earlier run"
        """Why there is no share."""
        self._num_in_flight = 0
        self._told = False
        self.full_s = 0.0
        self.first_full_s: float | None = None
        self.last_admitted_s = self.begin_s
        self._full_when_admitted_s = 0.0
        self._full_since_s: float | None = None
        self._lock = threading.Lock()

    def start(self, limit: int, seen_by: str, *, told: bool = False) -> None:
        """`limit` requests make a full batch; `seen_by` says in words what is counted, and by whom. `told`: somebody
        else calls `full`, and `in_flight` only tells when requests are admitted."""
        self.limit, self.seen_by, self.reason, self.asked = limit, seen_by, None, True
        self._told = told
        self.begin_s = self.last_admitted_s = time.perf_counter()

    def unknown(self, reason: str) -> None:
        self.reason, self.asked = reason, True
        self.begin_s = time.perf_counter()

    def end(self) -> None:
        self.end_s = time.perf_counter()

    def admitted(self, now_s: float) -> None:
        self.last_admitted_s, self._full_when_admitted_s = now_s, self.full_s

    def full(self, start_s: float, end_s: float) -> None:
        """The batch was full in this time."""
        if self.first_full_s is None:
            self.first_full_s = start_s
        self.full_s += end_s - start_s

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        """Around each request, in its thread."""
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        with self._lock:
            now = time.perf_counter()
            if self._full_since_s is not None:
                self.full(self._full_since_s, now)
            self._num_in_flight += change
            is_full = self._num_in_flight == self.limit and not self._told
            self._full_since_s = now if is_full else None
            if change > 0:
                self.admitted(now)

    def section(self) -> dict[str, Any]:
        """What a record says of it. A share that cannot be told is null, with the reason."""
        end_s = time.perf_counter() if self.end_s is None else self.end_s
        asking_s = end_s - self.begin_s if self.asked else 0.0
        shares: dict[str, Any] = {"full_batch_share": None, "steady_full_batch_share": None}
        ends: dict[str, Any] = {"ramp_up_s": None, "drain_s": None}
        if self.reason is not None:
            return {"asking_s": asking_s, **shares, "full_batch_reason": self.reason, **ends}
        shares["full_batch_share"] = self.full_s / asking_s
        reason: dict[str, str] = {}
        if self.first_full_s is None:
            reason["full_batch_reason"] = f"there were never {self.limit} requests at once, so no steady part"
        elif self.last_admitted_s <= self.first_full_s:
            reason["full_batch_reason"] = "all questions fitted into the first full batch, so no steady part"
        else:
            steady_s = self.last_admitted_s - self.first_full_s
            shares["steady_full_batch_share"] = self._full_when_admitted_s / steady_s
            ends = {"ramp_up_s": self.first_full_s - self.begin_s, "drain_s": end_s - self.last_admitted_s}
        return {
            "asking_s": asking_s,
            **shares,
            **reason,
            **ends,
            "full_batch": {"limit": self.limit, "seen_by": self.seen_by},
            "definitions": DEFINITIONS,
        }
