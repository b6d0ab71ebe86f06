"""Cost of snapshots: capture and restore beside a plain memory copy of the same bytes, rounds interleaved.

Run with ``python benchmarks/snapshots.py``; ``--small`` leaves the 25 M-parameter model out.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from kalmanguard.snapshots.disk import CheckpointStore
from kalmanguard.snapshots.state import TrainingState


def mlp() -> nn.Module:
    """Make the 26 k-parameter network on 64 inputs."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


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


def measure(label: str, model: nn.Module, width: int, rounds: int, inner: int) -> None:
    """Measure one model and print a table."""
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
    print(f"\n{label}: {state.bytes_per_slot() / 1e6:.1f} MB in {len(sources)} tensors")
    for name, seconds in medians.items():
        reference = medians["plain copy" if name in ("plain copy", "capture") else "plain copy back"]
        print(f"  {name:16s} {seconds * 1e6:12.1f} us   {seconds / reference:5.2f} x")
    digest = interleaved({"digest": lambda: state.digest(slot)}, max(3, rounds // 10), 1)["digest"]
    print(f"  {'digest':16s} {digest * 1e6:12.1f} us")
    with tempfile.TemporaryDirectory() as folder, CheckpointStore(Path(folder)) as store:
        blocked, written = [], []
        for step in range(4):
            start = time.perf_counter()
            store.save(step, slot, {})
            blocked.append(time.perf_counter() - start)
            store.flush()
            written.append(time.perf_counter() - start)
        print(f"  {'checkpoint':16s} {statistics.median(written) * 1e6:12.1f} us in the background, ", end="")
        print(f"blocks {statistics.median(blocked) * 1e6:.1f} us")


def main() -> None:
    """Parse the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="leave the 25 M-parameter model out")
    parser.add_argument("--threads", type=int, default=1, help="intra-op threads")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    measure("MLP, 26 k parameters, AdamW", mlp(), 64, rounds=60, inner=50)
    if not arguments.small:
        measure("24 layers, 25 M parameters, AdamW", large(), 1020, rounds=25, inner=1)


if __name__ == "__main__":
    main()
