"""Command line of the benchmarks."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from pathlib import Path

import torch

from benchmarks.ablation import Ablation
from benchmarks.benchmark import Benchmark, Result
from benchmarks.calibration import CalibrationBenchmark as Calibration
from benchmarks.catalogue import Catalogue
from benchmarks.cost import Cost
from benchmarks.dashboard import DashboardBenchmark as Dashboard
from benchmarks.data_quality import DataQualityBenchmark as DataQuality
from benchmarks.forensics import ForensicsBenchmark, ForensicsHealthy
from benchmarks.healthy import Healthy
from benchmarks.journal import Journal
from benchmarks.markdown import insert
from benchmarks.offline import Offline
from benchmarks.organic.benchmark import Organic
from benchmarks.oscillator import OscillatorBenchmark as Oscillator
from benchmarks.persistent import Persistent
from benchmarks.plot import PLOTTED, plot
from benchmarks.predictor import Predictor
from benchmarks.probe_clock import ProbeClock
from benchmarks.ranks import Ranks
from benchmarks.real_curves import RealCurves
from benchmarks.recovery import Recovery
from benchmarks.replica import Replica
from benchmarks.scaling import Scaling
from benchmarks.sketch import SketchBenchmark as Sketch
from benchmarks.snapshots import Snapshots
from benchmarks.spectrum import Spectrum
from benchmarks.stress import Stress
from benchmarks.thermostat import Thermostat

BENCHMARKS: tuple[Benchmark, ...] = (
    Recovery(),
    Catalogue(),
    Persistent(),
    Ablation(),
    Healthy(),
    Organic(),
    Calibration(),
    Replica(),
    Predictor(),
    RealCurves(),
    Offline(),
    Cost(),
    Ranks(),
    Scaling(),
    Sketch(),
    ProbeClock(),
    Snapshots(),
    Journal(),
    Dashboard(),
    DataQuality(),
    ForensicsBenchmark(),
    ForensicsHealthy(),
    Spectrum(),
    Thermostat(),
    Oscillator(),
    Stress(),
)
#: Options, each with a value, that decide where a result goes or comes from, not what it is.
_WHERE = ("--json", "--plot", "--write", "--cache", "--processes", "--load", "--corpus", "--runs")


def main(arguments: list[str]) -> int:
    """List the benchmarks, or run one."""
    parser = _parser()
    if not arguments:
        parser.print_help()
        return 0
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # inherited by worker processes, for libraries other than torch
    benchmark: Benchmark = options.benchmark
    if options.load is not None:
        result = json.loads(options.load.read_text(encoding="utf-8"))
    else:
        result = benchmark.run(options)
        result = {"benchmark": benchmark.name, "command": _command(arguments), "machine": _machine(), **result}
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if options.plot is not None:
        plot(result, options.plot)
    section = _section(benchmark, result)
    if options.write is not None:
        insert(options.write, benchmark.name, section)
    else:
        print(section)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure kalmanguard. Without --write the section of docs/benchmarks.md is printed.",
    )
    commands = parser.add_subparsers(metavar="NAME", required=True)
    for benchmark in BENCHMARKS:
        command = commands.add_parser(benchmark.name, help=benchmark.summary, description=benchmark.summary)
        command.add_argument("--seeds", type=int, metavar="N", help="seeds 0 to N - 1")
        command.add_argument("--quick", action="store_true", help="a short look; not for the page")
        command.add_argument("--json", type=Path, metavar="FILE", help="write the raw result there")
        command.add_argument("--load", type=Path, metavar="FILE", help="take a raw result from there, run nothing")
        command.add_argument("--write", type=Path, metavar="PAGE", help="put the section between its markers in PAGE")
        if benchmark.name in PLOTTED:
            command.add_argument("--plot", type=Path, metavar="FILE", help="draw the result there (PNG or SVG)")
        else:
            command.set_defaults(plot=None)
        command.add_argument("--processes", type=int, default=2, metavar="N", help="worker processes (default 2)")
        command.add_argument(
            "--cache", type=Path, metavar="FILE", help="keep results of runs there, and go on from them"
        )
        benchmark.add_options(command)
        command.set_defaults(benchmark=benchmark)
    return parser


def _command(arguments: list[str]) -> str:
    kept, rest = [], iter(arguments)
    for argument in rest:
        name = argument.split("=")[0]
        if name not in _WHERE:
            kept.append(argument)
        elif "=" not in argument:
            next(rest, None)  # its value
    return shlex.join(["python", "-m", "benchmarks", *kept])


def _machine() -> str:
    return f"{os.cpu_count()} shared cores, torch {torch.__version__}, one thread a process"


def _section(benchmark: Benchmark, result: Result) -> str:
    return f"`{result['command']}` on {result['machine']}.\n\n{benchmark.markdown(result)}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
