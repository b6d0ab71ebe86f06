"""Shared by all tests: one thread, fixed seeds, no display, GPU tests skipped where there is no GPU."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read by the numerical libraries once, when they are first imported
os.environ["MPLBACKEND"] = "Agg"

import random

import numpy as np
import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

#: A script for a process of its own, which imports what the others must not see patched.
collect_ignore = ["unsloth_run.py"]

settings.register_profile("repeatable", deadline=None, derandomize=True, database=None, max_examples=30)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Start every test from the same random state, whatever ran before it on the same worker."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
