"""Calibration: coverage on held-out runs, adaptive coverage, shift between plants, exchangeability, suspicions."""

from __future__ import annotations

import argparse
import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom, binomtest, rankdata
from scipy.stats import t as student

from benchmarks.benchmark import Benchmark, Result
from benchmarks.markdown import number, table
from kalmanguard.calibration import load
from kalmanguard.calibration.aci import AdaptiveConformal
from kalmanguard.calibration.conformal import (
    evenly_spaced,
    hierarchical_threshold,
    one_per_run,
    pooled_threshold,
    split_threshold,
)
from kalmanguard.calibration.corpus import Corpus, RunScores
from kalmanguard.calibration.exchangeability import conformal_p_values, martingale_test, permutation_p_value
from kalmanguard.calibration.thresholds import LEVELS, Calibration, fit, thresholds
from kalmanguard.cli.fleet import Sortie, fly, plan, pool
from kalmanguard.cli.plants import make_plant
from kalmanguard.cli.training import Lane
from kalmanguard.detectors.drift import RATES, DriftState, DriftTest
from kalmanguard.detectors.tail import TailState, TailTest
from kalmanguard.errors import ConfigurationError
from kalmanguard.estimators.trend import TrendFilter, TrendState
from kalmanguard.healthy import read_run, read_runs
from kalmanguard.journal import JournalReader
from kalmanguard.records import FloatArray, Innovation
from kalmanguard.settings import Settings

#: The sources of the default calibration, as `kalmanguard calibrate --plants` takes them.
PLANTS = (
    *("mlp", "mlp:batch_size=8", "mlp:optimizer=sgd:momentum=0", "mlp:schedule=warmup-cosine"),
    *("cnn:steps=500", "chartransformer:size=small:steps=300"),
)
#: Sources that it does not know.
STRANGERS = ("mlp:batch_size=2", "mlp:schedule=warm-restarts", "cnn:optimizer=sgd:momentum=0:steps=500")
_STEPS, _HELD_OUT_FROM, _PROBE_EVERY = 800, 100, 10
_SHOWN = (0.5, 0.8, 0.9, 0.95, 0.99, 0.999)
_RATE = 1.5e-4
#: One threshold for all channels, as it was before there was a calibration.
_COMMON = 8.0
#: Faults that are mild enough for thresholds to matter, on plants of the default calibration.
_FAULT_STEP, _FAULT_STEPS, _SOON = 149, 170, 10
FAULTS = (
    *("lr_spike:3@149:steps=5", "lr_spike:10@149:steps=5", "gradient_scale:3@149", "gradient_scale:10@149"),
    *("garbage_batch@149", "moments_zeroed@149"),
)
_FAULTY = ("mlp", "mlp:batch_size=8", "cnn")
_TESTED = ("loss", "gradient", "gain", "trajectory")
_Scores = list[FloatArray]


class CalibrationBenchmark(Benchmark):
    """Fit on the runs of the default calibration, judge on others."""

    name = "calibration"
    summary = "coverage on held-out runs, adaptive coverage, shift, exchangeability, false suspicions, run length"

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--held-out", type=int, default=None, metavar="N", help="held-out seeds (default 10)")
        parser.add_argument("--runs", type=Path, metavar="FOLDER", help="keep the runs there, and use those that are")

    def run(self, options: argparse.Namespace) -> Result:
        seeds = options.seeds or (3 if options.quick else 17)
        held_out = options.held_out or (3 if options.quick else 10)
        steps = 200 if options.quick else _STEPS
        with ExitStack() as stack:
            place = options.runs or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            names = ("mlp", "mlp:batch_size=8") if options.quick else PLANTS
            strangers = STRANGERS[:1] if options.quick else STRANGERS
            later = range(_HELD_OUT_FROM, _HELD_OUT_FROM + held_out)
            groups = [
                _train(names, range(seeds), steps, place, options.processes),
                _train(names, later, steps, place, options.processes),
                _train(strangers, later[:5], steps, place, options.processes),
            ]
            known = read_runs([sortie.folder for sortie in groups[0]]).corpus
            # Every held-out run counts, also one that an alarm would make unhealthy.
            new = _corpus(groups[1], known.channels)
            strange = _corpus(groups[2], known.channels)
            raw = [_raw_innovations(sortie.folder) for sortie in groups[1]]
            faults = {fault: _broken(fault, 2 if options.quick else 5, place, known.channels) for fault in FAULTS}
        calibration = fit(known)
        splits = 10 if options.quick else 100
        return {
            "calibrated_on": [len(known.runs), known.steps],
            "held_out": [len(new.runs), new.steps],
            "shipped": load("default").corpus == known.digest,
            "coverage": _coverage(calibration, new),
            "methods": _methods(known, new, splits),
            "splits": splits,
            "adaptive": _adaptive(known, new),
            "shift": _shift(known, new),
            "exchangeability": _exchangeability(known, new, raw, repeats=5 if options.quick else 20),
            "suspicions": [*_suspicions(calibration, new, ""), *_suspicions(calibration, strange, "unknown: ")],
            "tail": thresholds(calibration, _RATE),
            "detection": [_detection(fault, calibration, broken) for fault, broken in faults.items()],
            "run_length": _run_lengths(quick=options.quick),
        }

    def markdown(self, result: Result) -> str:
        runs, steps = result["calibrated_on"]
        held, held_steps = result["held_out"]
        same = "the shipped ones" if result["shipped"] else "not those of the shipped file"
        parts = [
            f"Thresholds ({same}) from {runs} healthy runs ({steps:,} steps after warm-up), judged on {held} other "
            f"runs ({held_steps:,} steps) of the same sources with seeds from {_HELD_OUT_FROM} on.",
            "**Coverage on held-out runs.** *All steps*: share of the steps below the threshold, every run weighing "
            "the same, with the 95 % interval over runs (Student; steps of a run are not independent). *One step a "
            "run*: how many of the runs are below at one step drawn at random, with the exact binomial range in which "
            "95 % of such counts lie if coverage is nominal. `*`: from pooled steps.",
            _coverage_table(result["coverage"]),
            _outside(result["coverage"]),
            f"**Methods**, over {result['splits']} random halvings of all these runs, which makes the halves "
            "exchangeable by construction. Coverage of all steps of the other half, mean ± standard deviation over "
            "halvings, all channels but `buffers` (few runs have any) together. *One a run*: split-conformal on one "
            "random step a run. *Hierarchical*: all steps, runs as the unit. *Pooled*: equally many steps of every "
            "run. –: not supported by so many runs.",
            table(
                ["level", "one a run", "hierarchical", "pooled"],
                [[_percent(row["level"]), *(_spread(row[m]) for m in _METHODS)] for row in result["methods"]],
            ),
            "**Adaptive conformal inference** over all held-out steps, one run after the other (gamma 0.005, but at "
            "most half of the rate), against the thresholds of the same calibration scores held fixed: coverage of all "
            "steps, the binomial range for as many independent steps, and the share of steps with an infinite "
            "threshold. *Anew*: begun anew in each run.",
            table(
                ["channel", "level", "steps", "fixed", "adaptive", "95 % range", "infinite", "anew"],
                [
                    [r["channel"], _percent(r["level"]), f"{r['steps']:,}", *map(_percent, (r["fixed"], r["adaptive"])),
                     f"{_percent(r['low'])} to {_percent(r['high'])}", *map(_percent, (r["infinite"], r["anew"]))]
                    for r in result["adaptive"]
                ],
            ),
            _adaptive_summary(result["adaptive"]),
            "**Shift**: calibrated without a plant, coverage on the held-out runs of that plant. No guarantee covers "
            "this; it is shown as it comes out.",
            table(
                ["left out", "channel", *(_percent(level) for level in (0.9, 0.99)), "adaptive 90 %", "adaptive 99 %"],
                [
                    [r["plant"], r["channel"], *(_percent(r[key]) for key in ("90", "99", "aci90", "aci99"))]
                    for r in result["shift"]
                ],
            ),
            "**Exchangeability**, rejections at 5 %. *Between runs*: one random step of each calibrated run and then "
            "of each held-out run, as ranks, the sources in turn; repeated with other steps (repetitions share the "
            "runs). *Within a run*: conformal p-values of its steps in order, the first 400 (for the permutation test "
            "120, evenly spaced over the run).",
            table(
                ["what", "tests", "permutation test", "jumper martingale"],
                [[r["what"], r["tests"], r["permutation"], r["martingale"]] for r in result["exchangeability"]],
            ),
            "**False suspicions** of the tail tests, steps with one per 1,000 held-out steps, at the common threshold "
            f"8 and at those calibrated at the tests' rate of {_RATE:g} a step and channel ("
            + ", ".join(f"{name} {number(value)}" for name, value in result["tail"].items())
            + "); thresholds adapt from there in both. *Floor*: the calibrated ones, but not below 6. The tests alone: "
            "no episodes, which count a lasting shift once.",
            table(
                ["source", "runs", "steps", "at 8", "calibrated", "floor 6"],
                [
                    [r["source"], r["runs"], f"{r['steps']:,}", *(_rate(r[k], r["steps"]) for k in _CHOICES)]
                    for r in result["suspicions"]
                ],
            ),
            f"**Detection** with the same thresholds: runs in which a tail test fires within {_SOON} steps of a mild "
            "fault; the supervisor only observes.",
            table(
                ["fault", "runs", "at 8", "calibrated", "floor 6"],
                [[f"`{r['fault']}`", r["runs"], *(r[k] for k in _CHOICES)] for r in result["detection"]],
            ),
            "**Run length to a false drift alarm** (Shiryaev-Roberts), mean over simulations with its 95 % interval. "
            "*Edge*: independent bets of mean zero, the edge of the null hypothesis, bounded by 1 in size; the "
            "guarantee is that the mean is at least the stated run length. *Detector*: the whole detector on "
            "independent normal losses; simulations that ended without an alarm count with their length, so the mean "
            "is too small.",
            table(
                ["null", "stated", "simulations", "mean run length", "95 % interval", "without alarm"],
                [
                    [r["null"], f"{r['stated']:,}", r["n"], f"{r['mean']:,.0f}",
                     f"{r['low']:,.0f} to {r['high']:,.0f}", r["censored"]]
                    for r in result["run_length"]
                ],
            ),
        ]  # fmt: skip
        return "\n\n".join(parts)


_METHODS = ("one", "hierarchical", "pooled")
_CHOICES = ("8", "own", "floor")


def _train(names: Sequence[str], seeds: range, steps: int, place: Path, processes: int) -> list[Sortie]:
    sorties = plan(",".join(names), seeds=seeds, steps=steps, probe_every=_PROBE_EVERY, folder=place)
    with pool(processes) as mapped:
        for _ in mapped(fly, sorted(sorties, key=lambda s: -s.steps * (20 if "transformer" in s.plant else 1))):
            pass
    return sorties


def _corpus(sorties: Sequence[Sortie], channels: tuple[str, ...]) -> Corpus:
    return Corpus(channels, tuple(read_run(sortie.folder, unhealthy=True) for sortie in sorties))


def _raw_innovations(folder: Path) -> FloatArray:
    """Innovations of the training loss before they are divided by their scale, after warm-up."""
    trend, state, found = TrendFilter("loss", floor_frac=1e-3), TrendState(), []
    with JournalReader(folder) as reader:
        for m, _ in reader.steps():
            if m.loss is not None and math.isfinite(m.loss) and m.step > 0:
                state, innovation = trend.step(state, m.loss)
                if m.step > reader.header["settings"]["warmup_steps"]:
                    found.append(innovation.value)
    return np.array(found)


def _coverage(calibration: Calibration, new: Corpus) -> list[Result]:
    rows = []
    for channel, quantiles in calibration.channels.items():
        runs = new.channel(channel)
        drawn = one_per_run(runs, seed=2)
        for q in quantiles:
            if q.level not in _SHOWN:
                continue
            shares = np.array([np.mean(scores <= q.threshold) for scores in runs])
            half = float(student.ppf(0.975, len(shares) - 1) * shares.std(ddof=1) / math.sqrt(len(shares)))
            low, high = binom.interval(0.95, len(runs), q.level)
            rows.append(
                {
                    "channel": channel,
                    "level": q.level,
                    "pooled": q.method == "pooled",
                    "runs": len(runs),
                    "mean": float(shares.mean()),
                    "half": half,
                    "worst": float(shares.min()),
                    "below": int(np.sum(drawn <= q.threshold)),
                    "low": int(low),
                    "high": int(high),
                }
            )
    return rows


def _methods(known: Corpus, new: Corpus, splits: int) -> list[Result]:
    """Coverage of the other half, by method and level, over channels and random halvings."""
    rng = np.random.default_rng(7)
    fits: dict[str, Callable[[_Scores, float, int], float]] = {
        "one": lambda runs, level, seed: split_threshold(one_per_run(runs, seed=seed), level),
        "hierarchical": lambda runs, level, _: hierarchical_threshold(runs, level),
        "pooled": lambda runs, level, _: pooled_threshold(runs, level)[0],
    }
    found: dict[tuple[str, float], list[float]] = defaultdict(list)
    for channel in known.channels:
        runs = [*known.channel(channel), *new.channel(channel)]
        if len(runs) < len(known.runs):
            continue
        for split in range(splits):
            order = rng.permutation(len(runs))
            ours = [runs[i] for i in order[: len(runs) // 2]]
            others = [runs[i] for i in order[len(runs) // 2 :]]
            for method, threshold in fits.items():
                for level in _SHOWN:
                    try:
                        h = threshold(ours, level, split)
                    except ConfigurationError:
                        continue
                    found[method, level].append(float(np.mean([np.mean(scores <= h) for scores in others])))
    return [
        {"level": level, **{m: _mean_and_deviation(found[m, level]) for m in _METHODS}}
        for level in _SHOWN
    ]  # fmt: skip


def _mean_and_deviation(values: list[float]) -> list[float] | None:
    return [float(np.mean(values)), float(np.std(values))] if values else None


def _adaptive(known: Corpus, new: Corpus) -> list[Result]:
    rows = []
    for channel in known.channels:
        runs, fixed = new.channel(channel), known.channel(channel)
        if not fixed or not runs:
            continue
        steps = min(map(len, fixed))
        scores = np.concatenate([evenly_spaced(one, steps) for one in fixed])
        stream = np.concatenate(runs)
        for level in _SHOWN:
            aci = AdaptiveConformal(scores, target=1.0 - level)
            state, infinite = aci.init(), 0
            at_start = aci.threshold(state)
            for score in stream.tolist():
                state, result = aci.step(state, score)
                infinite += result is not None and math.isinf(result.threshold)
            low, high = binom.interval(0.95, len(stream), level)
            rows.append(
                {
                    "channel": channel,
                    "level": level,
                    "steps": len(stream),
                    "fixed": float(np.mean(stream <= at_start)),
                    "adaptive": 1.0 - state.exceeded / state.steps,
                    "low": low / len(stream),
                    "high": high / len(stream),
                    "infinite": infinite / len(stream),
                    "anew": _anew(aci, runs),
                }
            )
    return rows


def _anew(aci: AdaptiveConformal, runs: _Scores) -> float:
    exceeded = 0
    for scores in runs:
        state = aci.init()
        for score in scores.tolist():
            state, _ = aci.step(state, score)
        exceeded += state.exceeded
    return 1.0 - exceeded / sum(map(len, runs))


def _shift(known: Corpus, new: Corpus) -> list[Result]:
    rows = []
    families = sorted({_family(run) for run in known.runs})
    for family in families if len(families) > 1 else []:
        rest = Corpus(known.channels, tuple(run for run in known.runs if _family(run) != family))
        left = Corpus(new.channels, tuple(run for run in new.runs if _family(run) == family))
        for channel in known.channels:
            runs, others = left.channel(channel), rest.channel(channel)
            if not runs or not others:
                continue
            row: Result = {"plant": family, "channel": channel}
            steps = min(map(len, others))
            scores = np.concatenate([evenly_spaced(one, steps) for one in others])
            for level in (0.9, 0.99):
                threshold = split_threshold(scores, level)
                row[f"{100 * level:g}"] = float(np.mean([np.mean(one <= threshold) for one in runs]))
                row[f"aci{100 * level:g}"] = _anew(AdaptiveConformal(scores, target=1 - level), runs)
            rows.append(row)
    return rows


def _exchangeability(known: Corpus, new: Corpus, raw: _Scores, *, repeats: int) -> list[Result]:
    rows = []
    for channel in _TESTED:
        # Seed by seed, the sources in turn: an order that says nothing about the scores.
        before, after = _by_seed(known).channel(channel), _by_seed(new).channel(channel)
        pairs = [(one_per_run(before, seed=seed), one_per_run(after, seed=10_000 + seed)) for seed in range(repeats)]
        rows.append(_tested(f"between runs: {channel}", [rankdata(np.concatenate(pair)) for pair in pairs]))
    sorted_by_source = [one_per_run(new.channel("loss"), seed=seed) for seed in range(repeats)]
    rows.append(_tested("between runs, source after source: loss", sorted_by_source))
    chosen = range(0, len(new.runs), max(1, len(new.runs) // 24))
    rows.append(_tested("within a run: raw loss innovations", [raw[i] for i in chosen]))
    for channel in _TESTED:
        pooled, runs = np.concatenate(known.channel(channel)), new.channel(channel)
        rows.append(_tested(f"within a run: {channel}", [conformal_p_values(runs[i], pooled, seed=i) for i in chosen]))
    return rows


def _by_seed(corpus: Corpus) -> Corpus:
    return Corpus(corpus.channels, tuple(sorted(corpus.runs, key=lambda run: (run.seed or 0, run.source))))


def _tested(what: str, sequences: _Scores) -> Result:
    permutation = martingale = 0
    for seed, sequence in enumerate(sequences):
        thin = evenly_spaced(sequence, min(len(sequence), 120))
        permutation += permutation_p_value(thin, permutations=199, seed=seed) <= 0.05
        martingale += martingale_test(sequence[:400], seed=seed).rejected
    return {"what": what, "tests": len(sequences), "permutation": int(permutation), "martingale": int(martingale)}


def _choices(calibration: Calibration, channels: tuple[str, ...]) -> dict[str, dict[str, float]]:
    common = dict.fromkeys(channels, _COMMON)
    own = common | thresholds(calibration, _RATE)
    return {"8": common, "own": own, "floor": {channel: max(6.0, value) for channel, value in own.items()}}


def _broken(fault: str, seeds: int, place: Path, channels: tuple[str, ...]) -> Corpus:
    """Train runs with a fault, in observe mode."""
    runs = []
    later = range(_HELD_OUT_FROM, _HELD_OUT_FROM + seeds)
    for sortie in plan(",".join(_FAULTY), seeds=later, steps=_FAULT_STEPS, probe_every=_PROBE_EVERY, folder=place):
        folder = sortie.folder.with_name(f"{sortie.folder.name}-{fault}")
        if not folder.exists():
            options = {"seed": sortie.seed, "steps": sortie.steps, **dict(sortie.options)}
            settings = Settings(mode="observe", probe_examples=128, probe_every=_PROBE_EVERY)
            plant, seed = make_plant(sortie.plant, options), sortie.seed
            with Lane(sortie.plant, plant, faults=[fault], seed=seed, settings=settings, run_dir=folder) as lane:
                for _ in range(sortie.steps):
                    lane.advance()
        runs.append(read_run(folder, unhealthy=True))
    return Corpus(channels, tuple(runs))


def _detection(fault: str, calibration: Calibration, broken: Corpus) -> Result:
    row: Result = {"fault": fault, "runs": len(broken.runs)}
    # Scores begin after warm-up and end with the run.
    for key, chosen in _choices(calibration, broken.channels).items():
        fired = [_fired(run, broken.channels, chosen)[_FAULT_STEP - 1 - run.steps :] for run in broken.runs]
        row[key] = sum(bool(one[:_SOON].any()) for one in fired)
    return row


def _suspicions(calibration: Calibration, corpus: Corpus, prefix: str) -> list[Result]:
    choices = _choices(calibration, corpus.channels)
    groups: dict[str, list[RunScores]] = defaultdict(list)
    for run in corpus.runs:
        groups[f"{prefix}{run.source}"].append(run)
    return [
        {
            "source": source,
            "runs": len(runs),
            "steps": sum(len(run.scores) for run in runs),
            **{
                key: sum(int(_fired(run, corpus.channels, chosen).sum()) for run in runs)
                for key, chosen in choices.items()
            },
        }
        for source, runs in groups.items()
    ]


def _fired(run: RunScores, channels: tuple[str, ...], chosen: dict[str, float]) -> NDArray[np.bool_]:
    """Say of each step of a run whether any tail test fires there."""
    fired = np.zeros(len(run.scores), dtype=bool)
    for column, channel in enumerate(channels):
        test, state = TailTest(channel, threshold=chosen[channel], rate=_RATE), TailState()
        for index, score in enumerate(run.scores[:, column].tolist()):
            if not math.isnan(score):
                state, evidence = test.step(state, Innovation(channel, score, 1.0))
                fired[index] |= evidence is not None
    return fired


def _run_lengths(*, quick: bool) -> list[Result]:
    cases = ((200, 100), (1_000, 100)) if quick else ((200, 1_000), (2_000, 1_000), (20_000, 400))
    rows = [_edge(stated, n) for stated, n in cases]
    rows.append(_detector(200, 20 if quick else 100, 4_000 if quick else 20_000))
    return rows


def _edge(stated: int, n: int) -> Result:
    """Run the statistic on bets that are -1, 0 or 1 with mean zero, each simulation until its alarm."""
    rng = np.random.default_rng(stated)
    rates = np.array(RATES)[:, None]
    wealth, lengths, step = np.zeros((len(RATES), n)), np.zeros(n), 0
    alive = np.arange(n)
    while alive.size:
        step += 1
        x = rng.integers(-1, 2, size=alive.size)
        wealth = (1.0 + rates * x) * (wealth + 1.0)
        alarm = wealth.mean(axis=0) >= stated
        if alarm.any():
            lengths[alive[alarm]] = step
            alive, wealth = alive[~alarm], wealth[:, ~alarm]
    return _lengths("edge", stated, lengths, 0)


def _detector(stated: int, n: int, most: int) -> Result:
    rng = np.random.default_rng(stated + 1)
    test, lengths, censored = DriftTest(run_length=stated), np.zeros(n), 0
    for index in range(n):
        state = DriftState()
        for step, loss in enumerate(rng.normal(1.0, 0.1, size=most).tolist(), start=1):
            state, _, evidence = test.step(state, loss)
            lengths[index] = step
            if evidence is not None:
                break
        else:
            censored += 1
    return _lengths("detector", stated, lengths, censored)


def _lengths(null: str, stated: int, lengths: FloatArray, censored: int) -> Result:
    mean, half = float(lengths.mean()), 1.96 * float(lengths.std(ddof=1)) / math.sqrt(len(lengths))
    return {"null": null, "stated": stated, "n": len(lengths), "mean": mean, "low": mean - half, "high": mean + half,
            "censored": censored}  # fmt: skip


def _family(run: RunScores) -> str:
    return run.source.partition(":")[0]


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %" if share > 0.985 or share < 0.01 else f"{100 * share:.1f} %"


def _spread(pair: list[float] | None) -> str:
    return "–" if pair is None else f"{100 * pair[0]:.2f} ± {100 * pair[1]:.2f} %"


def _coverage_table(rows: list[Result]) -> str:
    return table(
        ["channel", "level", "runs", "all steps", "worst run", "one step a run", "95 % range"],
        [
            [
                r["channel"],
                _percent(r["level"]) + (" *" if r["pooled"] else ""),
                r["runs"],
                f"{_percent(r['mean'])} ± {100 * r['half']:.2f}",
                _percent(r["worst"]),
                r["below"],
                f"{r['low']} to {r['high']}",
            ]
            for r in rows
        ],
    )


def _outside(rows: list[Result]) -> str:
    by_step = sum(not r["low"] <= r["below"] <= r["high"] for r in rows)
    below = sum(r["mean"] + r["half"] < r["level"] for r in rows)
    return (
        f"One step a run: {by_step} of {len(rows)} counts lie outside their range; about one in twenty would by "
        "chance (cells of one channel share their runs). All steps: coverage is significantly below nominal in "
        f"{below} of them."
    )


def _adaptive_summary(rows: list[Result]) -> str:
    inside = sum(r["low"] <= r["adaptive"] <= r["high"] for r in rows)
    fixed = sum(r["low"] <= r["fixed"] <= r["high"] for r in rows)
    anew = sum(r["low"] <= r["anew"] <= r["high"] for r in rows)
    return (
        f"Inside the range: adaptive {inside} of {len(rows)}, fixed {fixed}, begun anew in each run {anew}. The "
        "range is that of independent steps, which fixed thresholds need not meet."
    )


def _rate(count: int, steps: int) -> str:
    interval = binomtest(count, steps).proportion_ci(0.95, method="exact")
    return (
        f"{count}: {number(1_000 * count / steps, 2)} "
        f"({number(1_000 * interval.low, 2)} to {number(1_000 * interval.high, 2)})"
    )


#: Levels of the page are among those that are fitted.
assert set(_SHOWN) <= set(LEVELS)
