"""A journal decides the same elsewhere: other processes, thread counts, instruction sets, releases of numpy.

Oracle: the journal itself. On one build of numpy every bit must come out again; across builds the last bits of some
statistics may differ (dot products are summed in another order), what is proposed may not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kalmanguard
from kalmanguard import FaultInjector, Supervisor
from kalmanguard.models import load_plant

_AVX512 = "AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR"
_REPLAY = """
import json, sys
from kalmanguard.replay import replay
print(json.dumps(replay(sys.argv[1]).to_dict()))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a veto, a rollback and what follows them."""
    folder = tmp_path_factory.mktemp("run")
    plant = load_plant("mlp")(seed=1, steps=260)
    torch.manual_seed(1)
    faults = FaultInjector.parse(("nan_gradient@90", "lr_spike:50@150:steps=5"))
    with (
        Supervisor(plant.model, plant.probe_loader, optimizer=plant.optimizer, run_dir=folder) as supervisor,
        faults.attach(plant.model, plant.optimizer),
    ):
        for _ in range(260):
            supervisor.update(plant.train_step(faults.draw(next(plant.loader))))
        assert supervisor.statistics()["rollbacks"] >= 1
    return folder


def replayed(run: Path, *, python: str = sys.executable, **environment: str) -> dict[str, Any]:
    sources = str(Path(kalmanguard.__file__).parents[1])
    known = {**os.environ, "PYTHONPATH": sources, **environment}
    done = subprocess.run(
        [python, "-c", _REPLAY, str(run)], env=known, capture_output=True, text=True, check=True, timeout=300
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("threads", ["1", "2", "4"])
def test_another_process_and_thread_count_decide_the_same_to_the_last_bit(run: Path, threads: str) -> None:
    found = replayed(run, OMP_NUM_THREADS=threads, OPENBLAS_NUM_THREADS=threads, MKL_NUM_THREADS=threads)
    assert found["identical"], found["differences"][:1]
    assert found["decisions"] > 260
    assert found["recorded"]["ROLLBACK"] >= 1


@pytest.mark.parametrize(
    "environment",
    [{"NPY_DISABLE_CPU_FEATURES": _AVX512}, {"OPENBLAS_CORETYPE": "Haswell"}, {"OPENBLAS_CORETYPE": "Prescott"}],
    ids=["no-avx512", "haswell", "prescott"],
)
def test_another_instruction_set_proposes_the_same(run: Path, environment: dict[str, str]) -> None:
    if "NPY_DISABLE_CPU_FEATURES" in environment:
        known = np._core._multiarray_umath.__cpu_features__  # type: ignore[attr-defined]
        dispatched = np._core._multiarray_umath.__cpu_dispatch__  # type: ignore[attr-defined]
        there = [name for name in _AVX512.split() if known.get(name) and name in dispatched]
        environment = {"NPY_DISABLE_CPU_FEATURES": " ".join(there)}
    found = replayed(run, **environment)
    assert found["differing_actions"] == 0, found["differences"][:1]


@pytest.mark.slow
def test_another_release_of_numpy_proposes_the_same(run: Path, tmp_path: Path) -> None:
    other = "2.1.3" if not np.__version__.startswith("2.1.") else "2.2.6"
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    wanted = [f"numpy=={other}", "pydantic"]
    made = subprocess.run([python, "-m", "pip", "install", "-q", *wanted], capture_output=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"numpy {other} cannot be installed here")
    found = replayed(run, python=str(python))
    assert found["decisions"] > 260
    assert found["differing_actions"] == 0, found["differences"][:1]
