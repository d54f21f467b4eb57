"""Connections that must not be held: clients that send nothing, send slowly, or do not read.

uvicorn closes a connection that is idle after an answer, and no other. Its class for HTTP/1.1 is extended by a time for
each thing that a client can drag out. The body of a request is the application's (`Endpoints`).
"""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 20.0
"""From the opening of a connection, or the end of an answer, to a whole request head."""
READ_S = 60.0
"""How long a client may leave what was sent to it unread."""
MAX_CONNECTIONS = 512
"""With more, the one that has waited longest for a request is closed; if none waits, the new one is refused."""
REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class ClientConnection(H11Protocol):
    """One client's connection."""

    _head: asyncio.TimerHandle | None = None
    _read: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS and not self._make_room():
            transport.write(REFUSAL)
            transport.close()
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._read = self.loop.call_later(READ_S, self.cut)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._read = _cancelled(self._read)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._head, self._read = _cancelled(self._head), _cancelled(self._read)

    def cut(self) -> None:
        """Close without waiting for what is still to be sent."""
        self.transport.abort()

    @property
    def waits(self) -> bool:
        """Whether no request is being answered. An answer that was given but not read counts as none."""
        return self.cycle is None or self.cycle.response_complete

    def _watch(self) -> None:
        if not self.waits:
            self._head = _cancelled(self._head)
        elif self._head is None:
            self._head = self.loop.call_later(HEAD_S, self.cut)

    def _make_room(self) -> bool:
        others = [other for other in self.connections if other is not self and isinstance(other, ClientConnection)]
        idle = [other for other in others if other.waits and other._head is not None]
        if idle:
            min(idle, key=lambda other: other._head.when() if other._head else 0.0).cut()
        return bool(idle)


def _cancelled(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Nothing, in the timer's place."""
    if timer is not None:
        timer.cancel()
    return None
