"""The machine and PyTorch: interpreter, threads, cores, memory, accelerators, backends for several processes."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

from kalmanguard.cli.checkup.check import Check, Verdict, gibibytes

_GROUP = "Environment"
_LITTLE_MEMORY = 2**30
_BACKENDS = ("gloo", "nccl", "mpi", "xccl", "ucc")


def check_environment(root: Path = Path("/")) -> Iterator[Check]:
    """Look at what training would run on; ``root`` is where ``proc`` and ``sys`` are found."""
    yield _python()
    torch, failure = _import_torch()
    if torch is None:
        yield Check(
            _GROUP,
            "torch",
            Verdict.PROBLEM,
            f"PyTorch cannot be imported: {failure}.",
            "Install it (pip install torch), or install again what it says is missing. Journals can be read, verified "
            "and replayed without it.",
        )
    else:
        yield _torch(torch)
    yield _cores(torch, root)
    yield _memory(root)
    if torch is not None:
        yield _accelerators(torch)
        yield _backends(torch)


def _python() -> Check:
    version = platform.python_version()
    tested = _tested_pythons()
    here = ".".join(version.split(".")[:2])
    text = f"{platform.python_implementation()} {version} on {platform.system()}, {platform.machine()}"
    if tested and here not in tested:
        return Check(
            _GROUP, "python", Verdict.NOTE, f"{text}; tested are {', '.join(tested)}",
            "It may work; where it does not, use a tested version.", {"version": version, "tested": tested},
        )  # fmt: skip
    return Check(_GROUP, "python", Verdict.OK, text, values={"version": version, "tested": tested})


def _tested_pythons() -> list[str]:
    prefix = "Programming Language :: Python :: "
    try:
        found = metadata("kalmanguard").get_all("Classifier") or []
    except PackageNotFoundError:
        return []
    names = [text.removeprefix(prefix) for text in found if text.startswith(prefix)]
    return [name for name in names if "." in name]


def _import_torch() -> tuple[ModuleType | None, str]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library that is missing or of another machine
        return None, str(error).splitlines()[0] if str(error) else type(error).__name__
    return torch, ""


def _torch(torch: Any) -> Check:
    build = "CPU only"
    if torch.version.cuda:
        build = f"for CUDA {torch.version.cuda}"
    elif getattr(torch.version, "hip", None):
        build = f"for ROCm {torch.version.hip}"
    values = {"version": torch.__version__, "cuda": torch.version.cuda, "threads": torch.get_num_threads()}
    return Check(_GROUP, "torch", Verdict.OK, f"PyTorch {torch.__version__}, built {build}", values=values)


def _cores(torch: Any | None, root: Path) -> Check:
    present, usable = os.cpu_count() or 1, usable_cores(root)
    values: dict[str, Any] = {"cores": present, "usable": usable}
    text = f"{usable:g} of {present} CPU cores may be used"
    threads = torch.get_num_threads() if torch is not None else None
    if threads is None:
        return Check(_GROUP, "cores", Verdict.OK, text, values=values)
    values["threads"] = threads
    text += f"; PyTorch computes with {threads} {'thread' if threads == 1 else 'threads'}"
    if threads > max(1.0, usable):
        advice = f"More threads than cores slow each other down: set OMP_NUM_THREADS={max(1, int(usable))}."
        return Check(_GROUP, "cores", Verdict.NOTE, text, advice, values)
    return Check(_GROUP, "cores", Verdict.OK, text, values=values)


def usable_cores(root: Path = Path("/")) -> float:
    """Cores that this process may use: its affinity, and the quotas of all control groups above it."""
    try:
        cores = float(len(os.sched_getaffinity(0)))
    except AttributeError:  # no affinity on this system
        cores = float(os.cpu_count() or 1)
    return min([cores, *_quotas(root)])


def _quotas(root: Path) -> Iterator[float]:
    for folder in _groups(root, "cpu"):
        words = _read(folder / "cpu.max").split()
        if len(words) != 2:  # version 1 keeps the two numbers apart
            words = [_read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip()]
        if all(word.isdigit() for word in words) and int(words[1]) > 0:
            yield int(words[0]) / int(words[1])


def memory_limit(root: Path = Path("/")) -> int | None:
    """Smallest memory limit in bytes of the control groups above this process; ``None`` without any."""
    limits = []
    for folder in _groups(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            word = _read(folder / name).strip()
            if word.isdigit() and int(word) < 1 << 60:  # version 1 says "none" with a number near 2**63
                limits.append(int(word))
    return min(limits, default=None)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of our control group and of those above it; in a container our own path may not be mounted."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controller if controllers else "")
        relative = PurePosixPath(path.lstrip("/"))
        relative = PurePosixPath() if ".." in relative.parts else relative
        yield from (mount / part for part in (relative, *relative.parents))


def _memory(root: Path) -> Check:
    try:
        from kalmanguard.snapshots.memory import free_host_bytes
    except ImportError:  # the package of the snapshots needs PyTorch
        return Check(_GROUP, "memory", Verdict.NOTE, "How much is free is not known without PyTorch.")
    free, limit = free_host_bytes(root), memory_limit(root)
    values = {"free_bytes": free, "limit_bytes": limit}
    text = f"{gibibytes(free)} free to this process"
    text += f", limited by its control group to {gibibytes(limit)}" if limit is not None else ""
    text += f"; snapshots take up to {gibibytes(free / 4)}, unless snapshot_bytes says otherwise"
    if free < _LITTLE_MEMORY:
        advice = "Snapshots of a large model will not fit: free memory, or give a run_dir, to which they spill."
        return Check(_GROUP, "memory", Verdict.NOTE, text, advice, values)
    return Check(_GROUP, "memory", Verdict.OK, text, values=values)


def _accelerators(torch: Any) -> Check:
    if torch.cuda.is_available():
        found = []
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            found.append({"name": properties.name, "bytes": properties.total_memory})
        text = ", ".join(f"{device['name']} with {gibibytes(device['bytes'])}" for device in found)
        return Check(_GROUP, "accelerator", Verdict.OK, text, values={"devices": found})
    if torch.version.cuda or getattr(torch.version, "hip", None):
        return Check(
            _GROUP, "accelerator", Verdict.NOTE, "PyTorch is built for GPUs, but sees none",
            "On a machine with a GPU: check its driver, CUDA_VISIBLE_DEVICES, and that the job asked for one.",
            {"devices": []},
        )  # fmt: skip
    mps = torch.backends.mps.is_available()
    text = "Apple GPU (MPS); not tested" if mps else "none; training runs on the CPU"
    return Check(_GROUP, "accelerator", Verdict.OK, text, values={"devices": ["mps"] if mps else []})


def _backends(torch: Any) -> Check:
    distributed = torch.distributed
    if not distributed.is_available():
        return Check(_GROUP, "distributed", Verdict.NOTE, "this build of PyTorch has no torch.distributed",
                     "Several processes cannot be supervised together; one process can.", {"backends": []})  # fmt: skip
    found = [name for name in _BACKENDS if getattr(distributed, f"is_{name}_available", lambda: False)()]
    text = f"backends for several processes: {', '.join(found) or 'none'}"
    return Check(_GROUP, "distributed", Verdict.OK, text, values={"backends": found})


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
