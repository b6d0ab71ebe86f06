"""Recording a run without supervising it. Oracle: the bare twin, bit for bit, and what the loop itself has seen."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from kalmanguard import ConfigurationError
from kalmanguard.analysis import Trajectory
from kalmanguard.errors import TrajectoryError
from kalmanguard.models import load_plant
from kalmanguard.sensors.sketch import Sketch


def train(steps: int, path: Path | None) -> tuple[list[torch.Tensor], list[object], list[float], list[np.ndarray]]:
    """Parameters, random states, losses and sketches of a run, recorded or bare."""
    torch.manual_seed(3)
    plant = load_plant("cnn")(seed=3, steps=steps)  # dropout and BatchNorm: a trace would show
    sketch = Sketch([(n, p) for n, p in plant.model.named_parameters() if p.requires_grad])
    losses, sketches = [], [sketch()]
    recorder = None if path is None else Trajectory.record(path, plant.model, plant.optimizers)
    for _ in range(steps):
        loss = plant.train_step(next(plant.loader))
        losses.append(float(loss))
        sketches.append(sketch())
        if recorder is not None:
            recorder.log(loss=loss, extra=1)
    if recorder is not None:
        recorder.close()
    state = [p.detach().clone() for p in plant.model.state_dict().values()]
    return state, [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()], losses, sketches


def test_a_recorded_run_is_the_bare_run(tmp_path: Path) -> None:
    bare, streams, *_ = train(12, None)
    recorded, after, losses, sketches = train(12, tmp_path / "run.jsonl")
    assert all(torch.equal(a, b) for a, b in zip(bare, recorded, strict=True))
    assert torch.equal(streams[0], after[0])  # type: ignore[arg-type]
    assert streams[1:] == after[1:]
    trajectory = Trajectory.load(tmp_path / "run.jsonl")
    assert trajectory.series("loss")[1].tolist() == losses
    assert trajectory.velocities is not None
    np.testing.assert_array_equal(trajectory.velocities, np.diff(sketches, axis=0))
    assert set(trajectory.channels) == {"learning_rate", "gradient_norm", "buffer_norm", "loss", "extra"}


def test_nothing_stays_behind(tmp_path: Path) -> None:
    from torch.optim import optimizer as hooks

    before = len(hooks._global_optimizer_pre_hooks), len(hooks._global_optimizer_post_hooks)
    train(2, tmp_path / "run.jsonl")
    assert (len(hooks._global_optimizer_pre_hooks), len(hooks._global_optimizer_post_hooks)) == before


def test_a_recording_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with Trajectory.record(path) as recorder:
        recorder.log(loss=2.0)
        recorder.log(loss=1.0, probe=1.5)
    with pytest.raises(TrajectoryError, match="append=True"):
        Trajectory.record(path)
    with Trajectory.record(path, append=True) as recorder:
        recorder.log(loss=0.5)
        recorder.log(10, loss=0.25)
    assert Trajectory.load(path).series("loss")[0].tolist() == [1, 2, 3, 10]


def test_a_recording_goes_on_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text('{"step":1,"loss":2.0}\n{"step":2,"los', encoding="utf-8")
    with Trajectory.record(path, append=True) as recorder:
        recorder.log(loss=0.5)
    assert Trajectory.load(path).series("loss")[1].tolist() == [2.0, 0.5]


def test_what_is_no_number_is_left_out_and_training_goes_on(tmp_path: Path) -> None:
    with Trajectory.record(tmp_path / "run.jsonl") as recorder:
        with pytest.warns(UserWarning, match="is no number"):
            recorder.log(loss="high", probe=torch.tensor(1.0), vector=None)
        with pytest.warns(UserWarning, match="is no number"):
            recorder.log(loss=math.nan, histogram=torch.ones(3))
    trajectory = Trajectory.load(tmp_path / "run.jsonl")
    assert math.isnan(trajectory.series("loss")[1][0])
    assert set(trajectory.channels) == {"loss", "probe"}


def test_every_row_is_there_at_once(tmp_path: Path) -> None:
    """A process that is killed loses none: rows do not wait in a buffer."""
    path = tmp_path / "run.jsonl"
    recorder = Trajectory.record(path)
    recorder.log(loss=1.0)
    assert len(Trajectory.load(path)) == 1
    recorder.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_warns_once_and_training_goes_on(tmp_path: Path) -> None:
    recorder = Trajectory.record(tmp_path / "run.jsonl")
    recorder._file.close()
    recorder._file = open("/dev/full", "w")  # noqa: SIM115 - closed by the recorder
    with pytest.warns(UserWarning, match="Training goes on"):
        recorder.log(loss=1.0)
    recorder.log(loss=0.5)
    recorder.close()


def test_what_cannot_be_recorded_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"suffix \.jsonl"):
        Trajectory.record(tmp_path / "run.csv")
    with pytest.raises(TrajectoryError, match="cannot be written"):
        Trajectory.record(tmp_path / "nowhere" / "run.jsonl")


def test_what_cannot_be_written_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    with Trajectory.record(path) as recorder:
        recorder.log(loss=10**400, run=1.0, velocity=2.0)
        with pytest.warns(UserWarning, match="no whole number"):
            recorder.log(-1, loss=1.0)
        with pytest.warns(UserWarning, match="no whole number"):
            recorder.log(loss=0.5, step="x")
        recorder.log(loss=0.25, step=10)
    read = Trajectory.load(path)
    assert read.steps.tolist() == [1, 2, 3, 10]
    assert read.series("loss")[1].tolist() == [math.inf, 1.0, 0.5, 0.25]
    assert read.series("run (column)")[1].tolist() == [1.0]
    assert read.series("velocity (column)")[1].tolist() == [2.0]
