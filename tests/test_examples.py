"""The examples run, in small, as a reader would start them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: Arguments that make them short.
SMALL: dict[str, list[str]] = {
    "analyze_a_log": ["300"],
    "damping_study": ["--tiny"],
    "data_parallel": ["150"],
    "elastic": ["120"],
    "estimate": ["600"],
    "finetune_with_trainer": ["30"],
    "gan": ["120"],
    "lora_with_peft": ["40"],
    "policy_gradient": ["60"],
    "ray_train": ["200"],
    "sharded_pretraining": ["60"],
    "vit": ["60"],
    "what_if": ["120"],
}
#: Packages that some of them need.
NEEDS: dict[str, str] = {"finetune_with_trainer": "transformers", "lora_with_peft": "peft", "ray_train": "ray"}
#: Warnings of those packages themselves, with each other's newest versions.
NOISY: dict[str, list[str]] = {
    "lora_with_peft": ["FutureWarning"],
    "ray_train": ["DeprecationWarning", "FutureWarning", "ResourceWarning"],
}


def test_every_example_is_run() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == set(SMALL)


#: It starts seven processes, one after the other, that import torch.
SLOW = {"elastic"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in sorted(SMALL)]
)
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    warnings = ["-W", "error", *(part for kind in NOISY.get(name, ()) for part in ("-W", f"ignore::{kind}"))]
    done = subprocess.run(
        [sys.executable, *warnings, str(ROOT / "examples" / f"{name}.py"), *SMALL[name]],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2_000:]
    assert done.stdout.strip()
