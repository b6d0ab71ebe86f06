"""Direct lines between ranks: a few hundred numbers added up over all of them, in tens of microseconds."""

from __future__ import annotations

import os
import secrets
import socket
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Self, TypeVar, final

import numpy as np

from kalmanguard.records import FloatArray

T = TypeVar("T")
#: Seconds in which all lines must be laid.
_PATIENCE_S = 20.0
_TOKEN_BYTES = 16
_HELLO = struct.Struct(f"!{_TOKEN_BYTES}sI")
_HEAD = struct.Struct("!QI")


class _Post(NamedTuple):
    """Where a rank can be called."""

    host: str
    address: str
    port: int
    token: bytes


@final
class Lines:
    """Connections to the ranks with which sums are exchanged: log2(n) of n ranks.

    Sums are built by recursive doubling: in round k rank r swaps what it has with rank r xor 2^k. Both add the same two
    numbers, so the sum has the same bits on every rank, whatever the numbers. Ranks beyond the largest power of two
    hand theirs in before, and get the sum after.

    Notes
    -----
    Why not a collective of the process group: it hands every message from thread to thread, which takes ten times as
    long as the message (``python -m benchmarks scaling``), and its rounds grow with the number of ranks, not with its
    logarithm. Only numbers are read from a line, and only from one that has shown the token which the ranks got through
    their process group. What cannot be connected (a firewall, another network) is no error: `laid` returns ``None``,
    and the process group does the work.

    References
    ----------
    Thakur, Rabenseifner, Gropp, "Optimization of collective communication operations in MPICH", IJHPCA 19 (2005),
    section 4.5.
    """

    def __init__(self, rank: int, size: int, lines: dict[int, socket.socket]) -> None:
        self._lines = lines
        self._half = _largest_power(size)
        self._rank, self._size = rank, size
        self._turn = 0

    @classmethod
    def laid(
        cls,
        rank: int,
        size: int,
        *,
        tell: Callable[[_Post | None], Sequence[_Post | None]],
        agree: Callable[[bool], bool],
        timeout_s: float,
    ) -> Self | None:
        """Connect the ranks; ``None`` on all of them where one could not be.

        Parameters
        ----------
        rank, size
            Of this process, and how many there are.
        tell
            Given this rank's value, returns those of all.
        agree
            Whether something is true on all ranks.
        timeout_s
            Seconds to wait for another rank in an exchange.
        """
        listener, own = None, None
        with suppress(OSError):
            # Where torchrun says that all ranks are on this machine, nobody else is to hear of it.
            alone = os.environ.get("LOCAL_WORLD_SIZE") == str(size)
            listener = socket.create_server(("127.0.0.1" if alone else "", 0), backlog=128)
            own = _Post(_host(), _address(), listener.getsockname()[1], secrets.token_bytes(_TOKEN_BYTES))
        posts = [post for post in tell(own) if post is not None]
        lines: dict[int, socket.socket] = {}
        try:
            if listener is not None and len(posts) == size:
                _connect(lines, rank, size, posts, listener)
        except OSError:
            pass  # `done` says so
        finally:
            if listener is not None:
                listener.close()
        done = len(lines) == len(partners(rank, size)) > 0
        if not agree(done):
            for line in lines.values():
                line.close()
            return None
        for line in lines.values():
            line.settimeout(timeout_s)
        return cls(rank, size, lines)

    def add(self, numbers: FloatArray) -> FloatArray:
        """The sum over all ranks, the same bits on each.

        Raises
        ------
        OSError
            A rank has hung up, does not answer in time, or tells something else.
        """
        self._turn += 1
        total = np.array(numbers, dtype=np.float64)
        extra = self._rank + self._half
        if self._rank >= self._half:
            self._send(self._rank - self._half, total)
            return self._receive(self._rank - self._half, len(total))
        if extra < self._size:
            total = total + self._receive(extra, len(total))
        distance = 1
        while distance < self._half:
            partner = self._rank ^ distance
            self._send(partner, total)
            total = total + self._receive(partner, len(total))
            distance *= 2
        if extra < self._size:
            self._send(extra, total)
        return total

    def close(self) -> None:
        """Hang up."""
        for line in self._lines.values():
            line.close()

    def _send(self, partner: int, numbers: FloatArray) -> None:
        self._lines[partner].sendall(_HEAD.pack(self._turn, len(numbers)) + numbers.tobytes())

    def _receive(self, partner: int, length: int) -> FloatArray:
        turn, count = _HEAD.unpack(_read(self._lines[partner], _HEAD.size))
        if (turn, count) != (self._turn, length):
            raise OSError(f"rank {partner} tells {count} numbers in exchange {turn}, not {length} in {self._turn}")
        return np.frombuffer(_read(self._lines[partner], 8 * length))


def partners(rank: int, size: int) -> list[int]:
    """Ranks that this one exchanges numbers with.

    Examples
    --------
    >>> partners(1, 6), partners(5, 6), partners(2, 6)
    ([0, 3, 5], [1], [3, 0])
    """
    half = _largest_power(size)
    if rank >= half:
        return [rank - half]
    found, distance = [], 1
    while distance < half:
        found.append(rank ^ distance)
        distance *= 2
    return found + ([rank + half] if rank + half < size else [])


def _largest_power(size: int) -> int:
    """The largest power of two that is not above ``size``."""
    return 1 << (size.bit_length() - 1)


def _connect(
    lines: dict[int, socket.socket], rank: int, size: int, posts: Sequence[_Post], listener: socket.socket
) -> None:
    """Call the lower ranks, and let the higher ones in."""
    deadline = time.monotonic() + _PATIENCE_S
    token = posts[0].token
    for other in partners(rank, size):
        if other < rank:
            post = posts[other]
            address = "127.0.0.1" if post.host == posts[rank].host else post.address
            line = socket.create_connection((address, post.port), timeout=_PATIENCE_S)
            line.sendall(_HELLO.pack(token, rank))
            lines[other] = line
    expected = {other for other in partners(rank, size) if other > rank}
    while expected - lines.keys():
        listener.settimeout(max(0.0, deadline - time.monotonic()) or 1e-3)
        line, _ = listener.accept()
        line.settimeout(1.0)
        known, caller = b"", -1
        with suppress(OSError):
            known, caller = _HELLO.unpack(_read(line, _HELLO.size))
        if secrets.compare_digest(known, token) and caller in expected:
            lines[caller] = line
        else:
            line.close()
    for line in lines.values():
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _read(line: socket.socket, length: int) -> bytes:
    data = bytearray(length)
    view, got = memoryview(data), 0
    while got < length:
        count = line.recv_into(view[got:])
        if not count:
            raise ConnectionResetError("the other rank has hung up")
        got += count
    return bytes(data)


def _host() -> str:
    """What two processes have in common that can call each other on the loopback address."""
    boot, network = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/net")
    try:
        return f"{boot.read_text()}{os.readlink(network)}"
    except OSError:
        return socket.gethostname()


def _address() -> str:
    """Address of this machine on the network that leads to the first rank."""
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ.get("MASTER_ADDR", ""), 9))  # sends nothing
        return str(probe.getsockname()[0])
    return socket.gethostbyname(socket.gethostname())
