"""Ray Train, where it is installed: the example, and that both workers did what it says.

Ray is no dependency of development, since it is large.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kalmanguard.certificate.verify import verify
from kalmanguard.replay import replay

pytest.importorskip("ray")
EXAMPLE = Path(__file__).parents[1] / "examples" / "ray_train.py"


@pytest.mark.slow
def test_a_fault_is_undone_on_both_workers_and_a_killed_one_resumes(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "300"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2_000:]
    told = {rank: re.findall(rf"^rank {rank} (.*)$", done.stdout, re.MULTILINE) for rank in (0, 1)}
    assert [line for line in told[1] if line.startswith("is killed")] == ["is killed in step 225"]
    shared = [line for line in told[1] if not line.startswith("is killed")]
    assert told[0] == shared  # digests and decisions are those of both
    undone = [line for line in shared if re.search(r"the state of step \d+ is restored", line)]
    assert undone
    assert undone[0].startswith("has ")
    assert shared.index(undone[0]) < len(shared) - 2
    resumed = re.fullmatch(r"resumes from step (\d+) with \w{12}", shared[-2])
    assert resumed is not None
    assert 0 < int(resumed[1]) < 225
    assert shared[-1].startswith("ends with ")
    run = Path(re.findall(r"^The journal of both lives of the run is (.*)\.$", done.stdout, re.MULTILINE)[0])
    assert replay(run).identical
    assert not any(claim.status == "FAILED" for claim in verify(run).claims)
