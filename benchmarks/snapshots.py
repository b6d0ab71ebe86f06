"""Cost of snapshots: capture and restore beside a plain memory copy of the same bytes, rounds interleaved."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.benchmark import Benchmark, Result
from benchmarks.markdown import number, table
from kalmanguard.snapshots.disk import CheckpointStore
from kalmanguard.snapshots.state import TrainingState

_WITHOUT_RATIO = (("digest", "digest"), ("blocked", "checkpoint, training waits"), ("written", "checkpoint, in all"))


class Snapshots(Benchmark):
    """Capture, restore, digest and checkpoint."""

    name = "snapshots"
    summary = "snapshots: capture and restore beside a plain memory copy of the same bytes"

    def run(self, options: argparse.Namespace) -> Result:
        torch.manual_seed(0)
        models = [measure("MLP, 26 k parameters, AdamW", mlp(), 64, rounds=60, inner=50)]
        models.append(measure("4 layers, 1 M parameters, AdamW", middle(), 512, rounds=60, inner=5))
        if not options.quick:
            models.append(measure("24 layers, 25 M parameters, AdamW", large(), 1020, rounds=25, inner=1))
        return {"models": models}

    def markdown(self, result: Result) -> str:
        rows = []
        for model in result["models"]:
            s = model["seconds"]
            for name, beside in (("capture", "plain copy"), ("restore", "plain copy back")):
                pair = (_time(s[beside]), _time(s[name]), f"{number(s[name] / s[beside])} x")
                rows.append([f"{model['name']}, {name}", f"{model['bytes'] / 1e6:.1f} MB", *pair])
            for name, label in _WITHOUT_RATIO:
                rows.append([f"{model['name']}, {label}", "", "", _time(s[name]), ""])
        small = result["models"][0]["seconds"]
        fixed = [
            small[name] - small[beside] for name, beside in (("capture", "plain copy"), ("restore", "plain copy back"))
        ]
        note = (
            f"What does not depend on the size (comparing what is there with what was captured, random states): about "
            f"{_time(fixed[0])} a capture and {_time(fixed[1])} a restore, as the smallest model shows; they are the "
            "ratio of models whose copy takes less."
        )
        return "\n\n".join([table(["", "bytes", "plain copy", "time", "ratio"], rows), note])


def _time(seconds: float) -> str:
    return f"{number(1e6 * seconds)} us" if seconds < 1e-3 else f"{number(1e3 * seconds)} ms"


def mlp() -> nn.Module:
    """Make the 26 k-parameter network on 64 inputs."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def middle() -> nn.Module:
    """Make a stack of 4 layers with 1 M parameters."""
    return nn.Sequential(*[nn.Linear(512, 512) for _ in range(4)])


def large() -> nn.Module:
    """Make a stack of 24 layers with 25 M parameters."""
    return nn.Sequential(*[nn.Linear(1020, 1020) for _ in range(24)])


def interleaved(calls: dict[str, Callable[[], object]], rounds: int, inner: int) -> dict[str, float]:
    """Return the median seconds of each call; every round runs all of them, so that a busy machine slows all."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(inner):
                call()
            seconds[name].append((time.perf_counter() - start) / inner)
    return {name: statistics.median(values) for name, values in seconds.items()}


def trained(model: nn.Module, width: int) -> torch.optim.Optimizer:
    """Take one AdamW step, so that the moments exist."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.randn(4, width)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def measure(label: str, model: nn.Module, width: int, rounds: int, inner: int) -> Result:
    """Measure one model: median seconds of everything."""
    optimizer = trained(model, width)
    state = TrainingState(model, optimizers=[optimizer], schedulers=[])
    slot = state.capture()
    sources: list[Tensor] = [*model.parameters()]
    sources += [value for part in optimizer.state.values() for value in part.values()]
    copies = [torch.empty_like(source) for source in sources]
    targets = [source.detach() for source in sources]

    def plain() -> None:
        with torch.no_grad():
            torch._foreach_copy_(copies, sources)

    def plain_back() -> None:
        with torch.no_grad():
            torch._foreach_copy_(targets, copies)

    plain()
    medians = interleaved(
        {
            "plain copy": plain,
            "capture": lambda: state.capture(slot),
            "plain copy back": plain_back,
            "restore": lambda: state.restore(slot),
        },
        rounds,
        inner,
    )
    medians |= interleaved({"digest": lambda: state.digest(slot)}, max(3, rounds // 10), 1)
    with tempfile.TemporaryDirectory() as folder, CheckpointStore(Path(folder)) as store:
        blocked, written = [], []
        for step in range(4):
            start = time.perf_counter()
            store.save(step, slot, {})
            blocked.append(time.perf_counter() - start)
            store.flush()
            written.append(time.perf_counter() - start)
    medians |= {"blocked": statistics.median(blocked), "written": statistics.median(written)}
    return {"name": label, "bytes": state.bytes_per_slot(), "seconds": medians}
