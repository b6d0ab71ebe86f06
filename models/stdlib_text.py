"""The Python standard library's own source as text to model: real, large enough, and already on every machine."""

from __future__ import annotations

import sysconfig
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kalmanguard.errors import ConfigurationError

#: Token 0 stands for every character that is not in the vocabulary.
VOCABULARY = ("<unk>", "\n", "\t", *map(chr, range(32, 127)))

_BYTES = 4_000_000
_PROBE_FRAC = 0.1
_HELD_OUT_FRAC = 0.1
_LEAST_BYTES = 500_000
# Tests of the library, other people's packages, programs, and tables that are data rather than source.
_SKIPPED = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "idlelib", "turtledemo", "lib2to3"}
    | {"encodings", "pydoc_data"}
)


class Text(NamedTuple):
    """Tokens of three disjoint, contiguous stretches of the text, as uint8."""

    train: Tensor
    probe: Tensor
    held_out: Tensor


@lru_cache(maxsize=1)
def load_text() -> Text:
    """Read up to 4 MB of source files in the order of their paths: 80 % training, 10 % probe, 10 % held out.

    The splits are contiguous, so that no window of one overlaps another's. The text depends on the Python version.

    Raises
    ------
    ConfigurationError
        This Python comes without the sources of its library.
    """
    root = Path(sysconfig.get_path("stdlib"))
    pieces: list[bytes] = []
    size = 0
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        if size >= _BYTES:
            break
        if _SKIPPED.isdisjoint(path.relative_to(root).parts):
            pieces.append(path.read_bytes())
            size += len(pieces[-1])
    if size < _LEAST_BYTES:
        raise ConfigurationError(
            f"Only {size:,} bytes of Python source were found in {root}; the character transformer needs "
            f"{_LEAST_BYTES:,}. Use a Python that ships its standard library as .py files."
        )
    tokens = torch.from_numpy(_encode(b"".join(pieces)[:_BYTES]))
    held_out = round(len(tokens) * _HELD_OUT_FRAC)
    probe = round(len(tokens) * _PROBE_FRAC)
    train = len(tokens) - probe - held_out
    return Text(*torch.split(tokens, [train, probe, held_out]))


def windows(tokens: Tensor, *, context: int, count: int) -> tuple[Tensor, Tensor]:
    """Take ``count`` evenly spaced windows that do not overlap, as inputs and as targets one token later.

    Raises
    ------
    ConfigurationError
        The text is too short for that many windows.
    """
    stride = len(tokens) // count
    if stride < context + 1:
        raise ConfigurationError(
            f"{count} windows of context = {context} do not fit into {len(tokens):,} tokens; choose a context of at "
            f"most {stride - 1}."
        )
    rows = tokens[: stride * count].view(count, stride)[:, : context + 1].long()
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def _encode(text: bytes) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    table = np.zeros(256, dtype=np.uint8)
    for token, character in enumerate(VOCABULARY[1:], start=1):
        table[ord(character)] = token
    return table[np.frombuffer(text, dtype=np.uint8)]
