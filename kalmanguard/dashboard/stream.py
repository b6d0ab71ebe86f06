"""Server-sent events: every viewer of a run is sent its summary when it changes, made once for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final, final

from kalmanguard.dashboard.answers import encode, summary
from kalmanguard.dashboard.library import Entry, Library

#: Seconds between two messages at least, between two looks at whether a run has gone silent, and between signs of life.
SHORTEST_S: Final = 0.25
_LOOK_S, _ALIVE_S = 2.0, 15.0
#: Streams that are served at once.
MOST_STREAMS: Final = 200


@final
class Streams:
    """Sends summaries to whoever listens; all methods but `told` belong to the server's own loop.

    Parameters
    ----------
    library
        The runs.
    """

    def __init__(self, library: Library) -> None:
        self._library = library
        library.told = self.told
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changes: dict[str, asyncio.Event] = {}
        self._made: dict[str, tuple[tuple[object, ...], bytes]] = {}
        self._closed = False
        self.open = 0

    def start(self) -> None:
        """Take the running loop for one's own."""
        self._loop = asyncio.get_running_loop()

    def told(self, key: str | None) -> None:
        """A run has changed, or the list has (``None``); from any thread."""
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self._wake, key)

    def close(self) -> None:
        """End all streams."""
        self._closed = True
        self._wake(None)

    def _wake(self, key: str | None) -> None:
        for known in list(self._changes) if key is None else [key]:
            if (change := self._changes.pop(known, None)) is not None:
                change.set()

    def body(self, entry: Entry) -> bytes:
        """A run's summary, encoded; made anew only when it has changed."""
        certificate = self._library.certificates.get(entry.key)
        course = entry.course
        now = asyncio.get_running_loop().time()
        # What the clock changes (live, silent) is looked at every two seconds.
        state = (id(course), course.revision, course.behind, certificate.made_at, certificate.pending, now // _LOOK_S)
        known = self._made.get(entry.key)
        if known is None or known[0] != state:
            known = self._made[entry.key] = (state, encode(summary(entry, certificate)))
        return known[1]

    async def messages(self, entry: Entry) -> AsyncIterator[bytes]:
        """The stream of one viewer of one run, as it goes over the wire."""
        loop = asyncio.get_running_loop()
        self.open += 1
        try:
            sent, alive = b"", loop.time()
            yield b"retry: 2000\n\n"
            while not self._closed:
                self._library.get(entry.key)  # somebody is still looking
                change = self._changes.setdefault(entry.key, asyncio.Event())
                body = self.body(entry)
                if body != sent:
                    sent, alive = body, loop.time()
                    yield b"event: summary\ndata: " + body + b"\n\n"
                elif loop.time() - alive > _ALIVE_S:
                    alive = loop.time()
                    yield b": alive\n\n"
                await asyncio.sleep(SHORTEST_S)
                if self._closed:
                    return
                try:
                    await asyncio.wait_for(change.wait(), _LOOK_S)
                except TimeoutError:
                    continue
        finally:
            self.open -= 1
