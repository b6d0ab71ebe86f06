"""Trajectories from everything that runs leave behind. Oracle: the arrays that were logged, to the last bit.

One real training run is logged in every format; what others write is written by their own writers where they exist.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import math
import os
import subprocess
import sys
import textwrap
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kalmanguard import ConfigurationError, Supervisor
from kalmanguard.analysis import Trajectory
from kalmanguard.analysis.assembly import Channel, Part, assemble
from kalmanguard.analysis.columns import assign
from kalmanguard.errors import TrajectoryError
from kalmanguard.models import load_plant

STEPS = 60


@pytest.fixture(scope="module")
def rows() -> list[dict[str, float]]:
    """One real run as its loop logs it."""
    torch.manual_seed(0)
    plant = load_plant("mlp")(seed=0, steps=STEPS)
    found = []
    for step in range(1, STEPS + 1):
        loss = plant.backward(next(plant.loader))
        norm = torch.nn.utils.get_total_norm([p.grad for p in plant.model.parameters() if p.grad is not None])
        plant.step()
        row = {"step": step, "loss": float(loss), "grad_norm": float(norm)}
        if step % 10 == 0:
            row["val_loss"] = plant.held_out_loss()
        found.append(row)
    found[30]["loss"] = math.nan  # was logged, and is no number
    return found


def same(trajectory: Trajectory, rows: list[dict[str, float]], *, digits: bool = False) -> None:
    for channel, name in (("loss", "loss"), ("gradient_norm", "grad_norm"), ("probe", "val_loss")):
        steps, values = trajectory.series(channel)
        wanted = [(row["step"], row[name]) for row in rows if name in row]
        assert steps.tolist() == [s for s, _ in wanted]
        np.testing.assert_allclose(values, [v for _, v in wanted], rtol=1e-6 if digits else 0, atol=0)


def csv_text(rows: list[dict[str, float]], names: dict[str, str], delimiter: str = ",") -> str:
    head = delimiter.join(names.values())
    body = [delimiter.join("" if n not in row else repr(row[n]) for n in names) for row in rows]
    return "\n".join([head, *body]) + "\n"


PLAIN = {"step": "step", "loss": "train_loss", "val_loss": "val_loss", "grad_norm": "grad_norm"}


# --- formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opener", [open, gzip.open, bz2.open, lzma.open])
@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_delimited(tmp_path: Path, rows: list[dict[str, float]], opener: object, delimiter: str) -> None:
    path = tmp_path / "log.csv"  # what it is shows in the content, not in the name
    with opener(path, "wt", encoding="utf-8") as file:  # type: ignore[operator]
        file.write(csv_text(rows, PLAIN, delimiter))
    trajectory = Trajectory.load(path)
    same(trajectory, rows)
    assert trajectory.name == "log"
    assert any("'grad_norm' is taken to be the gradient norm" in note for note in trajectory.source.notes)


def test_json_lines_nested_and_as_words(tmp_path: Path, rows: list[dict[str, float]]) -> None:
    path = tmp_path / "log.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps({"config": {"lr": 1e-3}, "name": "x"}) + "\n")  # no step: no row of training
        for row in rows:
            nested = {"_step": row["step"], "train": {"loss": row["loss"], "grad_norm": str(row["grad_norm"])}}
            file.write(json.dumps(nested) + "\n")
            if "val_loss" in row:
                file.write(json.dumps({"_step": row["step"], "eval/loss": row["val_loss"], "note": "eval"}) + "\n")
    same(Trajectory.load(path), rows)


@pytest.mark.parametrize("wrapped", ["list", "history", "columns"])
def test_json_documents(tmp_path: Path, rows: list[dict[str, float]], wrapped: str) -> None:
    path = tmp_path / "log.json"
    if wrapped == "columns":
        data: object = {name: [row.get(name) for row in rows] for name in PLAIN}
    else:
        data = rows if wrapped == "list" else {"version": 3, "history": rows}
    path.write_text(json.dumps(data, indent=2), encoding="utf-8")
    same(Trajectory.load(path), rows)


def test_trainer_state_and_its_folders(tmp_path: Path, rows: list[dict[str, float]]) -> None:
    history = []
    for row in rows:
        history.append({"epoch": 0.1, **{k: row[k] for k in ("step", "loss", "grad_norm")}, "learning_rate": 1e-3})
        if "val_loss" in row:
            history.append({"epoch": 0.1, "step": row["step"], "eval_loss": row["val_loss"], "eval_runtime": 1.0})
    # What the Trainer adds at its end: a mean over the run, under a name that looks like a loss.
    history.append({"epoch": 1.0, "step": STEPS, "train_loss": 99.0, "train_runtime": 3.0, "total_flos": 1e9})
    for step in (20, STEPS):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        state = {"best_metric": None, "log_history": [h for h in history if h["step"] <= step], "max_steps": STEPS}
        (folder / "trainer_state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
    for path in (tmp_path, tmp_path / f"checkpoint-{STEPS}", tmp_path / f"checkpoint-{STEPS}" / "trainer_state.json"):
        trajectory = Trajectory.load(path)
        same(trajectory, rows)
        assert trajectory.source.format == "Hugging Face trainer state"
        assert set(trajectory.series("learning_rate")[1]) == {1e-3}


def test_parquet(tmp_path: Path, rows: list[dict[str, float]]) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pa.table(
        {
            "global_step": [row["step"] for row in rows],
            "loss": pa.array([row["loss"] for row in rows], pa.float64()),
            "grad_norm": [row["grad_norm"] for row in rows],
            "val_loss": [row.get("val_loss") for row in rows],
            "tags": [["a"] for _ in rows],
        }
    )
    parquet.write_table(table, tmp_path / "log.parquet", row_group_size=17)
    trajectory = Trajectory.load(tmp_path / "log.parquet")
    same(trajectory, rows)
    assert any("tags" in note for note in trajectory.source.notes)


def test_tensorboard(tmp_path: Path, rows: list[dict[str, float]]) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    for run in ("one", "two"):
        with SummaryWriter(str(tmp_path / run)) as writer:
            for row in rows:
                writer.add_scalar("train/loss", row["loss"], row["step"])
                writer.add_scalar("train/grad_norm", row["grad_norm"], row["step"], new_style=True)
                if "val_loss" in row:
                    writer.add_scalar("val/loss", row["val_loss"], row["step"])
            writer.add_histogram("weights", torch.ones(10), 3)
            writer.add_text("words", "nothing", 3)
    runs = Trajectory.load_all(tmp_path)
    assert sorted(runs) == ["one", "two"]
    same(runs["two"], rows, digits=True)  # event files hold float32
    with pytest.raises(TrajectoryError, match="2 runs: say which"):
        Trajectory.load(tmp_path)
    event_file = next((tmp_path / "one").glob("*tfevents*"))
    data = event_file.read_bytes()
    event_file.write_bytes(data[: len(data) // 2])
    cut = Trajectory.load(event_file)
    assert 0 < len(cut) < STEPS
    assert any("cut short" in note for note in cut.source.notes)


def test_export_of_a_tracker_with_a_column_for_each_run(tmp_path: Path, rows: list[dict[str, float]]) -> None:
    path = tmp_path / "export.csv"
    names = ["Step"]
    for run in ("lively-sun-1", "calm-moon-2"):
        names += [f"{run} - loss", f"{run} - loss__MIN", f"{run} - loss__MAX"]
    lines = [",".join(f'"{name}"' for name in names)]
    for row in rows:
        y = row["loss"]
        cells = [row["step"], y, y, y, *(("", "", "") if row["step"] % 2 else (2 * y, 2 * y, 2 * y))]
        lines.append(",".join(map(str, cells)))
    path.write_text("\n".join(lines), encoding="utf-8")
    runs = Trajectory.load_all(path)
    assert sorted(runs) == ["calm-moon-2", "lively-sun-1"]
    assert len(runs["lively-sun-1"]) == STEPS
    assert runs["calm-moon-2"].series("loss")[0].tolist() == list(range(2, STEPS + 1, 2))


def test_runs_in_a_column_joined_over_files(tmp_path: Path, rows: list[dict[str, float]]) -> None:
    train = ["run,step,train_loss"] + [f"{run},{r['step']},{r['loss']!r}" for run in ("a", "b") for r in rows]
    val = ["run,step,val_loss"] + [f"{run},{r['step']},{r['val_loss']!r}" for run in ("b", "a") for r in rows[9::10]]
    (tmp_path / "train.csv").write_text("\n".join(train) + "\n", encoding="utf-8")
    with gzip.open(tmp_path / "val.csv.gz", "wt") as file:
        file.write("\n".join(val) + "\n")
    runs = Trajectory.load_all(tmp_path)
    assert sorted(runs) == ["a", "b"]
    for run in runs.values():
        assert len(run) == STEPS
        assert run.series("probe")[0].tolist() == list(range(10, STEPS + 1, 10))
    assert Trajectory.load(tmp_path, run="b").name == "b"
    with pytest.raises(TrajectoryError, match="holds no run 'c'"):
        Trajectory.load(tmp_path, run="c")


def test_journal(tmp_path: Path) -> None:
    plant = load_plant("mlp")(seed=1, steps=40)
    with Supervisor(plant.model, plant.probe_loader, optimizer=plant.optimizer, run_dir=tmp_path) as supervisor:
        losses = []
        for _ in range(40):
            loss = plant.train_step(next(plant.loader))
            losses.append(float(loss))
            supervisor.update(loss)
    trajectory = Trajectory.load(tmp_path)
    assert trajectory.recorded
    assert trajectory.settings.mode == "protect"
    assert trajectory.series("loss")[1].tolist() == losses
    assert trajectory.velocities is not None
    assert trajectory.velocities.shape[1] == 64
    recorded = list(trajectory.measurements())
    assert recorded[0].probe is not None
    assert len(recorded[0].probe.losses) > 1  # per example, as it was recorded
    both = Trajectory.load_all(tmp_path.parent / tmp_path.name)
    assert list(both) == [tmp_path.name]


@pytest.mark.parametrize("kind", ["safetensors", "pt", "folders"])
def test_checkpoints(tmp_path: Path, kind: str) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    plant = load_plant("mlp")(seed=0, steps=40)
    kept = []
    for step in range(0, 41, 10):
        state = {name: p.detach().clone() for name, p in plant.model.state_dict().items()}
        kept.append(state)
        if kind == "safetensors":
            save_file(state, tmp_path / f"model-step{step:04d}.safetensors")
        elif kind == "pt":
            torch.save({"model": state, "epoch": 1}, tmp_path / f"epoch1-{step}.pt")
        else:
            (tmp_path / f"checkpoint-{step}").mkdir()
            save_file(state, tmp_path / f"checkpoint-{step}" / "model.safetensors")
            torch.save({"any": "thing"}, tmp_path / f"checkpoint-{step}" / "optimizer.pt")
        for _ in range(10):
            plant.train_step(next(plant.loader))
    trajectory = Trajectory.load(tmp_path)
    assert trajectory.steps.tolist() == [0, 10, 20, 30, 40]
    moved = [
        math.sqrt(sum(float((b[k].double() - a[k].double()).square().sum()) for k in a)) for a, b in pairwise(kept)
    ]
    np.testing.assert_allclose(trajectory.series("update_norm")[1], moved, rtol=1e-9)
    assert trajectory.velocities is not None
    lengths = np.linalg.norm(trajectory.velocities[1:], axis=1)
    assert ((lengths / moved > 0.5) & (lengths / moved < 1.6)).all()
    assert np.isnan(trajectory.velocities[0]).all()


# --- what columns mean ------------------------------------------------------------------------------------------------


def test_what_is_guessed_and_what_is_not() -> None:
    meaning = assign(["iter", "Train/Loss", "valid_loss", "perplexity", "val_accuracy", "lr-AdamW", "gnorm", "epoch"])
    assert meaning.step == "iter"
    assert dict(meaning.channels) == {
        "Train/Loss": "loss",
        "valid_loss": "probe",
        "lr-AdamW": "learning_rate",
        "gnorm": "gradient_norm",
        "perplexity": "perplexity",
        "val_accuracy": "val_accuracy",
        "epoch": "epoch",
    }
    assert any("rows are taken to be steps" in note for note in assign(["loss"]).notes)
    both = assign(["step", "train_loss", "loss"])
    assert dict(both.channels) == {"train_loss": "train_loss", "loss": "loss"}


def test_columns_can_be_said(tmp_path: Path) -> None:
    path = tmp_path / "odd.csv"
    path.write_text("t,a,b\n1,3,4\n2,5,6\n", encoding="utf-8")
    trajectory = Trajectory.load(path, columns={"step": "t", "loss": "b", "probe": "a"})
    assert trajectory.series("loss")[1].tolist() == [4, 6]
    assert trajectory.series("probe")[1].tolist() == [3, 5]
    with pytest.raises(TrajectoryError, match=r"no column of numbers 'c' for loss; there are 'a', 'b', 't'"):
        Trajectory.load(path, columns={"loss": "c"})


def test_ambiguous_columns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("step,val_loss,eval_loss\n1,2,3\n", encoding="utf-8")
    with pytest.raises(TrajectoryError, match=r"columns=\{'probe': "):
        Trajectory.load(path)
    assert Trajectory.load(path, columns={"probe": "eval_loss"}).series("probe")[1].tolist() == [3]


# --- rows -------------------------------------------------------------------------------------------------------------


def part(*rows: tuple[int, dict[str, float]]) -> Part:
    names = {name for _, row in rows for name in row}
    return Part(
        np.array([step for step, _ in rows]),
        {
            name: Channel(
                np.array([i for i, (_, row) in enumerate(rows) if name in row]),
                np.array([row[name] for _, row in rows if name in row]),
            )
            for name in names
        },
    )


def test_rows_of_one_step_are_one_and_the_last_value_counts() -> None:
    found = assemble([part((1, {"loss": 1.0}), (1, {"probe": 2.0}), (2, {"loss": 3.0}), (2, {"loss": 4.0}))])
    assert found.steps.tolist() == [1, 2]
    assert found.channels["loss"].values.tolist() == [1.0, 4.0]
    assert found.channels["probe"].rows.tolist() == [0]
    assert any("several values at 1 steps" in note for note in found.notes)


def test_a_late_value_finds_its_place_and_a_restart_stays_one() -> None:
    late = assemble([part((1, {"loss": 1.0}), (2, {"loss": 2.0}), (1, {"probe": 9.0}), (3, {"loss": 3.0}))])
    assert late.steps.tolist() == [1, 2, 3]
    assert late.channels["probe"].rows.tolist() == [0]
    back = assemble([part(*((s, {"loss": float(s)}) for s in (1, 2, 3, 4, 2, 3, 4, 5)))])
    assert back.steps.tolist() == [1, 2, 3, 4, 2, 3, 4, 5]
    trajectory = Trajectory("x", back.steps, back.channels)
    assert trajectory.restarts.tolist() == [4]
    assert [trajectory.steps[s].tolist() for s in trajectory.segments()] == [[1, 2, 3, 4], [2, 3, 4, 5]]


@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.dictionaries(st.sampled_from("ab"), st.floats(-9, 9), min_size=1)),
        min_size=1,
        max_size=40,
    ),
    st.integers(1, 40),
)
@settings(max_examples=80, deadline=None)
def test_nothing_is_lost_but_what_was_written_again(rows: list[tuple[int, dict[str, float]]], cut: int) -> None:
    whole = assemble([part(*rows)])
    pieces = assemble([part(*p) for p in (rows[:cut], rows[cut:]) if p])
    assert whole.steps.tolist() == pieces.steps.tolist()  # however it was cut into pieces
    for name, channel in whole.channels.items():
        assert channel.rows.tolist() == pieces.channels[name].rows.tolist()
        assert (np.diff(channel.rows) > 0).all()
        logged = [(step, row[name]) for step, row in rows if name in row]
        kept = list(zip(whole.steps[channel.rows].tolist(), channel.values.tolist(), strict=True))
        assert set(kept) <= set(logged)
        assert {step for step, _ in kept} == {step for step, _ in logged}


def test_steps_that_begin_again_in_every_epoch_are_counted_on(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [
        (e, b, 2.0 + 2.0 * math.exp(-(100 * e + b) / 200) + 0.02 * rng.normal()) for e in range(5) for b in range(100)
    ]
    path = tmp_path / "epochs.csv"
    lines = ["epoch,batch,loss", *(f"{e},{b},{y:.6f}" for e, b, y in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    trajectory = Trajectory.load(path)
    assert trajectory.steps.tolist() == list(range(500))
    assert any("in every epoch" in note for note in trajectory.source.notes)
    result = trajectory.judge()
    assert (result.suspected, result.confirmed, result.restarts) == (0, 0, ())


def test_a_logger_with_a_row_for_each_kind_of_value(tmp_path: Path, rows: list[dict[str, float]]) -> None:
    """As Lightning's CSV logger writes: train rows, then a validation row with the step of the last of them."""
    path = tmp_path / "metrics.csv"
    lines = ["epoch,lr-AdamW,step,train_loss_epoch,train_loss_step,val_loss"]
    for row in rows:
        lines.append(f"{row['step'] // 20},0.001,{row['step']},,{row['loss']!r},")
        if "val_loss" in row:
            lines.append(f"{row['step'] // 20},,{row['step']},0.5,,{row['val_loss']!r}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    trajectory = Trajectory.load(path)
    assert trajectory.series("loss")[1].tolist()[:5] == [row["loss"] for row in rows[:5]]
    assert trajectory.series("probe")[0].tolist() == list(range(10, STEPS + 1, 10))
    assert len(trajectory) == STEPS
    assert "learning_rate" in trajectory.channels


def test_a_run_in_two_files_keeps_both(tmp_path: Path) -> None:
    for name, steps, value in (("a", range(1, 501), 1.0), ("b", range(401, 901), 2.0)):
        lines = [json.dumps({"run": 1700000001, "step": s, "loss": value}) for s in steps]
        lines += [json.dumps({"run": 1700000002, "step": 1, "loss": 9.0})]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    runs = Trajectory.load_all(tmp_path)
    assert sorted(runs) == ["1700000001", "1700000002"]
    steps, values = runs["1700000001"].series("loss")
    assert steps.tolist() == list(range(1, 901))
    assert values.tolist() == [1.0] * 400 + [2.0] * 500


def test_values_without_a_square_are_not_finite() -> None:
    loss = np.ones(300)
    loss[200] = 1e308
    assert Trajectory.from_arrays(loss=loss).judge().events[0].detectors == ("loss-finite",)


def test_gaps_are_told() -> None:
    steps = [*range(1, 100), *range(5000, 5100)]
    trajectory = Trajectory.from_arrays(steps, loss=np.ones(len(steps)))
    assert trajectory.gaps == [(99, 5000)]


# --- writing and reading again ----------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True, width=64), min_size=1, max_size=30),
    st.sets(st.integers(0, 29)),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_json_lines_come_back_to_the_last_bit(
    tmp_path_factory: pytest.TempPathFactory, values: list[float], logged: set[int]
) -> None:
    steps = np.arange(1, len(values) + 1)
    some = [i for i in sorted(logged) if i < len(values)]
    velocities = np.full((len(values), 3), np.nan)
    velocities[::2] = 0.1
    channels: dict[str, object] = {"loss": np.array(values)}
    if some:
        channels["probe"] = (steps[some], np.array([values[i] for i in some]))
    before = Trajectory.from_arrays(steps, velocities=velocities, **channels)
    again = Trajectory.load(before.to_jsonl(tmp_path_factory.mktemp("x") / "run.jsonl"))
    assert again.steps.tolist() == before.steps.tolist()
    assert again.channels.keys() == before.channels.keys()
    for name, channel in before.channels.items():
        assert again.channels[name].rows.tolist() == channel.rows.tolist()
        assert again.channels[name].values.tobytes() == channel.values.tobytes() or np.isnan(channel.values).any()
        np.testing.assert_array_equal(again.channels[name].values, channel.values)
    np.testing.assert_array_equal(again.velocities, before.velocities)  # type: ignore[arg-type]


def test_csv_comes_back(tmp_path: Path, rows: list[dict[str, float]]) -> None:
    (tmp_path / "a.csv").write_text(csv_text(rows, PLAIN), encoding="utf-8")
    first = Trajectory.load(tmp_path / "a.csv")
    same(Trajectory.load(first.to_csv(tmp_path / "b.csv")), rows)
    with pytest.raises(TrajectoryError, match="exists already"):
        first.to_csv(tmp_path / "b.csv")


def test_arrays_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="Channels of one length"):
        Trajectory.from_arrays(loss=[1.0, 2.0], gradient_norm=[1.0])
    with pytest.raises(ConfigurationError, match="do not fit"):
        Trajectory.from_arrays([1, 2, 3], loss=[1.0, 2.0])
    with pytest.raises(ConfigurationError, match="no channel 'probe'"):
        Trajectory.from_arrays(loss=[1.0]).series("probe")
    with pytest.raises(ConfigurationError, match="pair of as many steps"):
        Trajectory.from_arrays(probe=([1, 2], [1.0]))


def test_a_notebook_shows_names_as_text() -> None:
    shown = Trajectory.from_arrays(loss=[1.0, math.nan], name="<b>x</b>")._repr_html_()
    assert "<b>x</b>" not in shown
    assert "&lt;b&gt;" in shown


# --- streams ----------------------------------------------------------------------------------------------------------


def test_a_stream_gives_the_measurements_of_the_whole(tmp_path: Path, rows: list[dict[str, float]]) -> None:
    path = tmp_path / "log.csv"
    path.write_text(csv_text(rows, PLAIN), encoding="utf-8")

    def plain(m: object) -> str:
        return repr((m.step, m.loss, m.gradient_norm, None if m.probe is None else m.probe.mean))  # type: ignore[attr-defined]

    whole = [plain(m) for m in Trajectory.load(path).measurements()]
    assert [plain(m) for m in Trajectory.stream(path).measurements()] == whole


def test_steps_split_over_rows_are_joined_in_a_stream(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for step in range(1, 20_001):  # more than one piece
            file.write(f'{{"step":{step},"loss":2.0}}\n{{"step":{step},"grad_norm":1.0}}\n')
    measured = list(Trajectory.stream(path).measurements())
    assert [m.step for m in measured] == list(range(1, 20_001))
    assert all(m.loss == 2.0 and m.gradient_norm == 1.0 for m in measured)


@pytest.mark.slow
def test_a_long_log_is_judged_in_bounded_memory(tmp_path: Path) -> None:
    """Peak memory of a process that judges a log of 50,000 rows and of one of 400,000."""
    script = textwrap.dedent(
        r"""
        import re, sys
        from kalmanguard.analysis import Trajectory
        result = Trajectory.stream(sys.argv[1]).judge()
        # Not getrusage: its peak is inherited from the process that started this one.
        print(result.rows, re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
        """
    )
    peaks = []
    for count in (50_000, 400_000):
        path = tmp_path / f"{count}.csv"
        with open(path, "w", encoding="utf-8") as file:
            file.write("step,loss\n")
            file.writelines(f"{n},{2.0 + 0.01 * ((n * 7919) % 13)}\n" for n in range(1, count + 1))
        done = subprocess.run(
            [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        judged, peak = map(int, done.stdout.split())
        assert judged == count
        peaks.append(peak)
    assert peaks[1] < 1.15 * peaks[0]


# --- what people's logs look like -------------------------------------------------------------------------------------


def lines(path: Path, *records: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_words_for_nothing_are_nothing_and_odd_cells_elsewhere_are_noted(tmp_path: Path) -> None:
    log = lines(
        tmp_path / "log.jsonl",
        {"step": 1, "loss": 2.0, "val_loss": "N/A", "extra": 1},
        {"step": 2, "loss": "nan", "val_loss": 1.5, "extra": ["a"]},
        {"step": 3, "loss": 1.0, "val_loss": "", "extra": 3},
    )
    read = Trajectory.load(log)
    assert read.series("probe")[0].tolist() == [2]
    assert math.isnan(read.series("loss")[1][1])
    assert read.series("extra")[1].tolist() == [1.0, 3.0]
    assert any("'extra' holds more than numbers" in note for note in read.source.notes)


def test_rows_without_a_step_are_counted(tmp_path: Path) -> None:
    rows = [{"step": n, "loss": 1.0 / n} for n in range(1, 30)]
    read = Trajectory.load(lines(tmp_path / "log.jsonl", *rows, {"loss": 5.0}, {"config": "x"}))
    assert len(read) == 29
    assert any(note.startswith("1 rows have no step") for note in read.source.notes)


def test_a_summary_is_no_course(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"step": n, "loss": 1.0 + 1.0 / n} for n in range(1, 100)]
    read = Trajectory.load(lines(tmp_path / "log.jsonl", *rows, {"step": 99, "train_loss": 9.0}))
    assert len(read.series("loss")[0]) == 99
    assert read.series("train_loss")[1].tolist() == [9.0]


def test_a_column_keeps_its_meaning_whatever_comes_later(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"step": n, "loss": 1.0} for n in range(1, 20_000)]
    rows += [{"step": n, "loss": 1.0, "train_loss": 7.0} for n in range(20_000, 20_100)]
    read = Trajectory.load(lines(tmp_path / "log.jsonl", *rows))
    assert set(read.series("loss")[1].tolist()) == {1.0}


def test_a_given_column_may_come_late_and_must_come(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"step": n, "loss": 1.0} for n in range(1, 20_000)]
    log = lines(tmp_path / "log.jsonl", *rows, {"step": 20_000, "dev/nll": 0.5})
    assert Trajectory.load(log, columns={"probe": "dev/nll"}).series("probe")[1].tolist() == [0.5]
    with pytest.raises(TrajectoryError, match="no column of numbers 'dev/nil' for probe"):
        Trajectory.load(log, columns={"probe": "dev/nil"})


def test_one_column_cannot_be_two_things(tmp_path: Path) -> None:
    log = lines(tmp_path / "log.jsonl", {"step": 1, "a": 1.0})
    with pytest.raises(TrajectoryError, match="'a' is given twice"):
        Trajectory.load(log, columns={"loss": "a", "probe": "a"})


def test_rows_without_a_label_belong_to_the_run_before(tmp_path: Path) -> None:
    rows = [{"run": "a", "step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"run": "b", "step": 1, "loss": 3.0}]
    runs = Trajectory.load_all(lines(tmp_path / "log.jsonl", *rows))
    assert {name: len(run) for name, run in runs.items()} == {"a": 2, "b": 1}


def test_a_trackers_own_counter_is_not_the_trainers(tmp_path: Path) -> None:
    rows = [{"_step": n, "trainer/global_step": 10 * n, "loss": 1.0} for n in range(1, 30)]
    assert Trajectory.load(lines(tmp_path / "log.jsonl", *rows)).steps[-1] == 290


def test_files_of_one_name_are_two_runs_and_a_broken_one_hides_none(tmp_path: Path) -> None:
    lines(tmp_path / "a.jsonl", *({"step": n, "loss": 1.0} for n in range(1, 9)))
    (tmp_path / "a.csv").write_text("step,loss\n1,2\n2,2\n")
    (tmp_path / "b.csv").write_bytes(b"")
    runs = Trajectory.load_all(tmp_path)
    assert sorted(runs) == ["a.csv", "a.jsonl"]
    assert any("A file was left out" in note for run in runs.values() for note in run.source.notes)


def test_names_can_be_shown_anywhere(tmp_path: Path) -> None:
    log = lines(tmp_path / "log.jsonl", *({"run": "x\x1b[2J", "step": n, "loss": 1.0} for n in range(1, 9)))
    assert list(Trajectory.load_all(log)) == ["x?[2J"]


def test_checkpoints_of_lightning_and_shards(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for step in (100, 200):
        save_file({"w": torch.full((3,), float(step))}, tmp_path / f"epoch=1-step={step}-val_loss=0.29.safetensors")
    assert Trajectory.load(tmp_path).steps.tolist() == [100, 200]
    sharded = tmp_path / "sharded" / "checkpoint-5"
    sharded.mkdir(parents=True)
    for n in (1, 2):
        save_file({f"w{n}": torch.ones(3)}, sharded / f"model-0000{n}-of-00002.safetensors")
    with pytest.raises(TrajectoryError, match="several files"):
        Trajectory.load(tmp_path / "sharded")


def test_arrays_that_are_none_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="no numbers"):
        Trajectory.from_arrays(loss=["a", "b"])
    with pytest.raises(TrajectoryError, match=r"is 1\.5: whole numbers"):
        Trajectory.from_arrays([1.5, 2.0], loss=[1.0, 2.0])
    with pytest.raises(ConfigurationError, match="shape"):
        Trajectory.from_arrays(loss=[[1.0], [2.0]])


def test_a_log_with_its_newest_row_first_is_read_from_the_end(tmp_path: Path) -> None:
    log = lines(tmp_path / "log.jsonl", *({"step": n, "loss": 1.0 / n} for n in range(50, 0, -1)))
    read = Trajectory.load(log)
    assert read.steps.tolist() == list(range(1, 51))
    assert read.series("loss")[1].tolist() == [1.0 / n for n in range(1, 51)]
    assert any("newest row comes first" in note for note in read.source.notes)


def test_channels_named_like_others_come_back_as_they_were(tmp_path: Path) -> None:
    given = {"loss": [1.0, 2.0], "train_loss": [3.0, 4.0], "lr": [0.1, 0.2], "learning_rate": [0.3, 0.4]}
    for name in ("jsonl", "csv"):
        path = tmp_path / f"log.{name}"
        trajectory = Trajectory.from_arrays(**given)
        trajectory.to_jsonl(path) if name == "jsonl" else trajectory.to_csv(path)
        read = Trajectory.load(path)
        assert {channel: read.series(channel)[1].tolist() for channel in given} == given
