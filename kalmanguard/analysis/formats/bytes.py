"""Files opened safely: compressed or not, never executed, never expanded beyond bounds."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from kalmanguard.errors import TrajectoryError

#: A compressed log may expand to this many times its size once it is beyond so many bytes: logs compress 5 to 30 times,
#: and a file made to fill memory a thousand times.
_MOST_RATIO, _FREE_BYTES = 300, 1 << 26
#: Longest line.
LONGEST_LINE = 1 << 22
_OPENERS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}


def head(path: Path, size: int = 4096) -> bytes:
    """The first bytes, decompressed where the file is compressed."""
    with opened(path) as file:
        try:
            return bytes(file.read(size))
        except (OSError, EOFError, zlib.error, lzma.LZMAError):
            return b""


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Open for reading, decompressing by content.

    Raises
    ------
    TrajectoryError
        The file cannot be opened.
    """
    try:
        with open(path, "rb") as raw:
            start = raw.read(6)
        opener = next((o for magic, o in _OPENERS.items() if start.startswith(magic)), open)
        file = opener(path, "rb")
    except OSError as error:
        raise TrajectoryError(f"{path} cannot be read: {error.strerror or error}.") from None
    with file:
        yield file


def lines(path: Path, notes: list[str]) -> Iterator[str]:
    """The lines of a text file, without their ends; a damaged tail is left out and noted.

    Raises
    ------
    TrajectoryError
        It is no text, a line is longer than 4 MiB, or it expands beyond all bounds.
    """
    size = path.stat().st_size
    with opened(path) as file:
        compressed = not isinstance(file, io.BufferedReader)
        read = 0
        number = 0
        while True:
            try:
                line = file.readline(LONGEST_LINE + 1)
            except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
                if number == 0:
                    raise TrajectoryError(f"{path} is damaged: {error}.") from None
                notes.append(f"The file is damaged after line {number:,} ({error}); what comes before it was read.")
                return
            if not line:
                return
            number += 1
            read += len(line)
            if len(line) > LONGEST_LINE:
                raise TrajectoryError(f"Line {number:,} of {path} is longer than {LONGEST_LINE:,} bytes: it is no log.")
            if compressed and read > _FREE_BYTES and read > _MOST_RATIO * size:
                raise TrajectoryError(
                    f"{path} expands to more than {_MOST_RATIO} times its {size:,} bytes: it is no log. Decompress it "
                    "by hand if it is one after all."
                )
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise TrajectoryError(f"Line {number:,} of {path} is no UTF-8 text: it is no log of text.") from None
            if "\0" in text:
                raise TrajectoryError(f"Line {number:,} of {path} holds zero bytes: it is no log of text.")
            yield text
