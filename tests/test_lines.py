"""Direct lines between ranks, here between threads: sums with the same bits everywhere, and what goes wrong."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from kalmanguard.distributed import lines as module
from kalmanguard.distributed.lines import Lines, partners


class Meeting:
    """What a process group does for the ranks before there are lines: everyone tells, everyone hears."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=30.0)
        self._told: list[Any] = [None] * size

    def tell(self, rank: int, value: Any) -> list[Any]:
        self._told[rank] = value
        self._barrier.wait()
        heard = list(self._told)
        self._barrier.wait()
        return heard


def together(size: int, run: Callable[[int, Lines | None], Any], timeout_s: float = 20.0) -> list[Any]:
    """What ``run(rank, lines)`` returns on each of ``size`` ranks."""
    meeting = Meeting(size)

    def rank(number: int) -> Any:
        lines = Lines.laid(
            number,
            size,
            tell=lambda value: meeting.tell(number, value),
            agree=lambda mine: all(meeting.tell(number, mine)),
            timeout_s=timeout_s,
        )
        try:
            return run(number, lines)
        finally:
            if lines is not None:
                lines.close()

    with ThreadPoolExecutor(size) as pool:
        return [future.result() for future in [pool.submit(rank, number) for number in range(size)]]


def called(lines: Lines | None) -> Lines:
    assert lines is not None
    return lines


@pytest.mark.parametrize("size", [2, 3, 4, 6, 8])
def test_a_sum_has_the_same_bits_on_every_rank(size: int) -> None:
    numbers = np.random.default_rng(size).normal(size=(size, 5)) * 10.0 ** np.arange(-8, 12, 4)
    sums = together(size, lambda rank, lines: [called(lines).add(numbers[rank] * turn) for turn in (1, 2, 3)])
    for turn in range(3):
        assert len({found[turn].tobytes() for found in sums}) == 1
        np.testing.assert_allclose(sums[0][turn], (turn + 1) * numbers.sum(axis=0), rtol=1e-12)


@pytest.mark.parametrize("size", range(2, 20))
def test_partners_know_each_other(size: int) -> None:
    for rank in range(size):
        assert all(rank in partners(other, size) for other in partners(rank, size))
        assert len(partners(rank, size)) <= size.bit_length()


def test_infinity_and_nan_arrive_as_they_are() -> None:
    rows = np.array([[np.inf, 1.0, np.nan], [1.0, np.inf, 2.0]])
    for found in together(2, lambda rank, lines: called(lines).add(rows[rank])):
        assert found[:2].tolist() == [np.inf, np.inf]
        assert np.isnan(found[2])


def repeat(lines: Lines) -> None:
    """The first message to someone who has hung up may still leave; not so the ones after it."""
    for _ in range(3):
        lines.add(np.zeros(3))


def test_a_rank_that_hangs_up_is_noticed_at_once() -> None:
    def run(rank: int, lines: Lines | None) -> str:
        if rank == 1:
            called(lines).close()
            return ""
        with pytest.raises(OSError, match=r"hung up|reset|Broken pipe") as told:
            repeat(called(lines))
        return str(told.value)

    assert together(2, run, timeout_s=600.0)[0]


def test_a_rank_that_does_not_answer_is_given_up() -> None:
    done = threading.Event()

    def run(rank: int, lines: Lines | None) -> None:
        if rank == 1:
            assert done.wait(30.0)
            return
        with pytest.raises(TimeoutError):
            called(lines).add(np.zeros(3))
        done.set()

    together(2, run, timeout_s=0.2)


def test_a_rank_that_tells_something_else_is_noticed() -> None:
    def run(rank: int, lines: Lines | None) -> None:
        with pytest.raises(OSError, match=r"tells \d numbers in exchange 1, not \d"):
            called(lines).add(np.zeros(3 + rank))

    together(2, run)


def test_strangers_are_not_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Someone who calls with a wrong token, or says nothing, is hung up on; the ranks find each other all the same."""
    plain = module._connect

    def disturbed(lines: Any, rank: int, size: int, posts: Any, listener: socket.socket) -> None:
        with socket.create_connection(("127.0.0.1", posts[rank].port)) as stranger:
            stranger.sendall(module._HELLO.pack(b"x" * 16, 1))
            silent = socket.create_connection(("127.0.0.1", posts[rank].port))
            try:
                plain(lines, rank, size, posts, listener)
            finally:
                silent.close()

    monkeypatch.setattr(module, "_connect", disturbed)
    assert [found.tolist() for found in together(2, lambda _, lines: called(lines).add(np.ones(1)))] == [[2.0], [2.0]]


def test_where_one_cannot_be_reached_none_uses_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(lines: Any, rank: int, size: int, posts: Any, listener: socket.socket) -> None:
        if rank == 1:
            raise ConnectionRefusedError

    monkeypatch.setattr(module, "_connect", unreachable)
    assert together(3, lambda _, lines: lines) == [None, None, None]
