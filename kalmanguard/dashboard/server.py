"""The dashboard as a server: one socket, one loop, one reading thread."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import final
from urllib.parse import quote

import uvicorn

from kalmanguard.dashboard.api import application
from kalmanguard.dashboard.library import Library
from kalmanguard.dashboard.security import SHORTEST_TOKEN, Guard, allowed_hosts, is_loopback
from kalmanguard.dashboard.stream import Streams
from kalmanguard.errors import ConfigurationError


@final
class Dashboard:
    """Serves a live page over the journals of runs; reads, and writes nothing.

    Parameters
    ----------
    runs
        Run folders, journals, or folders that are searched for runs.
    host, port
        Where it listens; port 0 takes a free one. An address that others can reach needs a token.
    token
        What viewers must bring, at least 16 characters of letters, digits, ``-`` and ``_``. ``None``: one is made up,
        if the address can be reached from other machines; on loopback none is asked for.
    allow_hosts
        Further names that browsers may call this server by, behind a proxy.

    Raises
    ------
    ConfigurationError
        A folder does not exist, the address cannot be listened on, or the token could be guessed.

    Notes
    -----
    On loopback every user of the machine can look, if no token is set. Traffic is not encrypted: on a network that is
    not trusted use a tunnel.
    """

    def __init__(
        self,
        runs: Sequence[Path],
        *,
        host: str = "127.0.0.1",
        port: int = 8765,
        token: str | None = None,
        allow_hosts: Sequence[str] = (),
    ) -> None:
        if token is not None and (
            len(token) < SHORTEST_TOKEN or not all(c.isascii() and (c.isalnum() or c in "-_") for c in token)
        ):
            raise ConfigurationError(
                f"The token must have at least {SHORTEST_TOKEN} letters, digits, - or _; without one, it is made up."
            )
        self.token = token if token is not None or is_loopback(host) else secrets.token_urlsafe(24)
        self.library = Library(runs)
        try:
            self._socket = _listen(host, port)
        except BaseException:
            self.library.close()
            raise
        self.port: int = self._socket.getsockname()[1]
        name = f"[{host}]" if ":" in host else host
        self._name = "localhost" if name in ("0.0.0.0", "[::]") else name
        streams = Streams(self.library)
        app = Guard(
            application(self.library, streams),
            hosts=allowed_hosts(host, allow_hosts),
            token=self.token,
            any_address=host in ("0.0.0.0", "::"),
        )
        self._server = _Server(
            streams,
            uvicorn.Config(
                app, log_level="warning", access_log=False, server_header=False, ws="none", http="h11",
                h11_max_incomplete_event_size=16_384, timeout_keep_alive=30, timeout_graceful_shutdown=2,
                limit_concurrency=600,
            )
        )  # fmt: skip

    @property
    def url(self) -> str:
        """The address to open first, with the token when there is one."""
        address = f"http://{self._name}:{self.port}/"
        return address if self.token is None else f"{address}?token={quote(self.token)}"

    def serve(self, ready: Callable[[], None] = lambda: None) -> None:
        """Serve until interrupted; ``ready`` is called right before."""
        try:
            ready()
            self._server.run(sockets=[self._socket])
        finally:
            self.close()

    def stop(self) -> None:
        """Have `serve` come to its end; from any thread."""
        self._server.should_exit = True

    def close(self) -> None:
        """Let go of socket, threads and journals. Closing twice is harmless."""
        self._socket.close()
        self.library.close()


class _Server(uvicorn.Server):
    """Ends the streams before it waits for its answers to be finished, which streams never are."""

    def __init__(self, streams: Streams, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._streams = streams

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Come to an end."""
        self._streams.close()
        await super().shutdown(sockets)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        detail = getattr(error, "strerror", None) or str(error)
        raise ConfigurationError(
            f"The dashboard cannot listen on {host}, port {port} ({detail}): take another --port, or 0 for a free one."
        ) from None
