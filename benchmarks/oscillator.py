"""The oscillator: bias, spread and coverage of damping ratio and frequency at known poles, and what it calls none."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import numpy as np
from scipy.signal import lfilter

from benchmarks.benchmark import Benchmark, Result
from benchmarks.markdown import number, table
from kalmanguard.analysis.cramer_rao import cramer_rao
from kalmanguard.analysis.free_decay import free_decay
from kalmanguard.analysis.noisy_autoregression import NoisyAutoregression
from kalmanguard.analysis.oscillator import oscillator
from kalmanguard.analysis.second_order import Pair
from kalmanguard.analysis.yule_walker import modified_yule_walker
from kalmanguard.detectors.damping import second_order

_DAMPINGS = (0.05, 0.1, 0.2, 0.3, 0.5)
#: Frequency, steps, signal-to-noise ratio: the first is the reference, the others change one thing.
_SETTINGS = (
    (0.5, 1000, 10.0),
    (0.2, 1000, 10.0),
    (1.0, 1000, 10.0),
    (1.5, 1000, 10.0),
    (0.5, 1000, 1.0),
    (0.5, 200, 10.0),
)
#: A damping at which a pair is hardly told from two real poles.
_HARD = 0.8
#: Series for the methods that are only compared.
_FEWER = 100


class OscillatorBenchmark(Benchmark):
    """Known poles, and processes that have none."""

    name = "oscillator"
    summary = "damping ratio and frequency offline: error against the Cramer-Rao bound, coverage, false oscillations"

    def run(self, options: argparse.Namespace) -> Result:
        runs = 20 if options.quick else options.seeds or 500
        cells = [
            known(damping, *setting, runs=runs) for setting in _SETTINGS[: 1 if options.quick else None]
            for damping in _DAMPINGS
        ]  # fmt: skip
        cells.append(known(_HARD, *_SETTINGS[0], runs=runs))
        others = [peers(damping, runs=min(runs, _FEWER)) for damping in _DAMPINGS]
        nothing = [none(name, runs=runs) for name in _NOTHING]
        return {"runs": runs, "cells": cells, "peers": others, "none": nothing}

    def markdown(self, result: Result) -> str:
        rows = [
            [
                f"{c['damping']:g}, {c['frequency']:g}, {c['n']:,}, {c['snr']:g}",
                f"{100 * c['identified']:.1f} %",
                *_cells(c, 0),
                *_cells(c, 1),
                f"{number(1e3 * c['seconds'])} ms",
            ]
            for c in result["cells"]
        ]
        peers_ = [[f"{p['damping']:g}", *(number(p[name]) for name in _METHODS)] for p in result["peers"]]
        nothing = [[n["name"], f"{100 * n['identified']:.1f} %"] for n in result["none"]]
        return "\n\n".join([
            f"{result['runs']} simulated series each, of an autoregression with the poles of zeta and omega_n that "
            "white noise drives, and white measurement noise; the signal-to-noise ratio is the power of the process "
            "over the variance of the noise. *Error*: median of its absolute value; *share*: that over 0.6745 times "
            "the Cramer-Rao bound, what a normal estimate at the bound would have. *Covered*: by the 95 % interval. "
            "Where no oscillation is identified there is neither error nor interval.",
            table(
                [
                    "zeta, omega_n, n, SNR", "identified", "bias of zeta", "error", "share", "covered",
                    "bias of omega_n", "error", "share", "covered", "processor time",
                ],
                rows,
            ),
            f"Median absolute error of zeta by method, {min(result['runs'], _FEWER)} of the series with omega_n 0.5, "
            "n = 1,000, SNR 10. Modified Yule-Walker with lags 3 to 4 and 3 to 16, where it finds no pair counts as "
            "zeta 1; the matrix pencil is for free decays, and is shown on a driven process to say so; least squares "
            "is a plain autoregression.",
            table(["zeta", *_METHODS], peers_),
            f"Oscillations identified where there is none, {result['runs']} series of 1,000 steps each:",
            table(["process", "identified"], nothing),
        ])  # fmt: skip


def _cells(cell: Result, which: int) -> list[str]:
    if not cell["identified"]:
        return ["–"] * 4
    shown = [number(cell[name][which]) for name in ("bias", "typical", "share")]
    return [*shown, f"{100 * cell['covered'][which]:.1f} %"]


def process(damping: float, frequency: float, n: int, snr: float, seed: int) -> np.ndarray:
    """Simulate one series, shape ``(n,)``."""
    rng = np.random.default_rng([seed, n, int(1000 * damping), int(1000 * frequency), int(10 * snr)])
    pair = Pair.of(damping, frequency)
    f, s = pair.coefficients()
    burn = int(20 / pair.decay)
    x = lfilter([1.0], [1.0, -f, -s], rng.normal(size=n + burn))[burn:]
    power = NoisyAutoregression(f, s, 0.0).variances()[0]
    return x + rng.normal(size=n) * math.sqrt(power / snr)


def known(damping: float, frequency: float, n: int, snr: float, *, runs: int) -> Result:
    """Errors and coverage at known poles; pairs are for zeta and omega_n."""
    truth = np.array([damping, frequency])
    errors, covered, seconds = [], [], []
    for seed in range(runs):
        values = process(damping, frequency, n, snr, seed)
        started = time.process_time()
        found = oscillator(values)
        seconds.append(time.process_time() - started)
        if found.identified:
            intervals = (found.damping, found.frequency)
            errors.append([v.estimate - t for v, t in zip(intervals, truth, strict=True)])
            covered.append([v.low <= t <= v.high for v, t in zip(intervals, truth, strict=True)])
    common = {
        "damping": damping, "frequency": frequency, "n": n, "snr": snr, "identified": len(errors) / runs,
        "seconds": float(np.median(seconds)),
    }  # fmt: skip
    if not errors:
        return common
    typical = np.median(np.abs(errors), axis=0)
    bound = np.array(cramer_rao(damping, frequency, n=n, snr=snr))
    return {
        **common,
        "bias": np.mean(errors, axis=0).tolist(),
        "typical": typical.tolist(),
        "share": (typical / (0.6745 * bound)).tolist(),
        "covered": np.mean(covered, axis=0).tolist(),
    }


def _least_squares(values: np.ndarray) -> tuple[complex, ...]:
    phi = np.linalg.lstsq(np.stack([values[1:-1], values[:-2]], axis=1), values[2:], rcond=None)[0]
    return tuple(np.roots([1.0, *-phi]))


_METHODS: dict[str, Callable[[np.ndarray], float]] = {
    "maximum likelihood": lambda v: oscillator(v).damping.estimate,
    "Yule-Walker, 4": lambda v: second_order(modified_yule_walker(v, last_lag=4))[0],
    "Yule-Walker, 16": lambda v: second_order(modified_yule_walker(v, last_lag=16))[0],
    "matrix pencil": lambda v: second_order(tuple(free_decay(v)))[0],
    "least squares": lambda v: second_order(_least_squares(v))[0],
}


def peers(damping: float, *, runs: int) -> Result:
    """Median absolute error of zeta by each method, on the same series."""
    series = [process(damping, 0.5, 1000, 10.0, seed) for seed in range(runs)]
    result: Result = {"damping": damping}
    for name, method in _METHODS.items():
        estimates = np.array([method(values - values.mean()) for values in series])
        result[name] = float(np.median(np.abs(np.where(np.isnan(estimates), 1.0, estimates) - damping)))
    return result


def _poles(*poles: float) -> Callable[[np.random.Generator], np.ndarray]:
    def make(rng: np.random.Generator) -> np.ndarray:
        x = lfilter([1.0], np.poly(poles), rng.normal(size=1500))[500:]
        return x + math.sqrt(x.var() / 10.0) * rng.normal(size=1000)

    return make


_NOTHING: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "white noise": lambda rng: rng.normal(size=1000),
    "white noise, Student's t with 3 degrees of freedom": lambda rng: rng.standard_t(3, size=1000),
    "one pole at 0.9": _poles(0.9),
    "one pole at -0.5": _poles(-0.5),
    "poles at 0.9 and 0.7 (overdamped)": _poles(0.9, 0.7),
    "two poles at 0.8 (critical)": _poles(0.8, 0.8),
    "random walk": lambda rng: np.cumsum(rng.normal(size=1000)),
}


def none(name: str, *, runs: int) -> Result:
    """How often an oscillation is identified in a process without one."""
    found = [oscillator(_NOTHING[name](np.random.default_rng([seed, 1]))).identified for seed in range(runs)]
    return {"name": name, "identified": float(np.mean(found))}
