"""Files that are damaged, foreign or made to harm: one clear sentence each, nothing executed, the source untouched."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import random
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kalmanguard.analysis import Trajectory
from kalmanguard.analysis.formats import bytes as safe
from kalmanguard.errors import KalmanguardError, TrajectoryError


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.mark}",)


GOOD = "step,loss\n" + "".join(f"{n},{2.0 / n}\n" for n in range(1, 50))


REFUSED = [
    ("empty.csv", b"", "is empty"),
    ("blank.csv", b"\n\n\n", "is empty|no header"),
    ("header.csv", b"step,loss\n", "no rows"),
    ("numbers.csv", b"1,2\n3,4\n", "must name the columns"),
    ("words.csv", b"step,loss\n1,high\n2,low\n", "'loss' should be the loss and holds words"),
    ("mixed.csv", b"step,loss\n" + b"1,2\n" * 40_000 + b"2,high\n", "numbers and words, such as 'high'"),
    ("comma.csv", b"step;loss\n1;2,5\n2;2,25\n", "holds words: write numbers with a point"),
    ("twice.csv", b"step,loss,loss\n1,2,3\n", "two columns named 'loss'"),
    ("steps.csv", b"step,loss\n1.5,2\n", "whole numbers"),
    ("huge.csv", b"step,loss\n1e300,2\n", "whole numbers"),
    ("negative.csv", b"step,loss\n-3,2\n", "whole numbers"),
    ("lost.csv", b"step,loss\nnan,2\n", "whole numbers"),
    ("binary.csv", bytes(range(256)) * 20, "no UTF-8 text|zero bytes|no log"),
    ("zeros.csv", b"step,loss\n1,\x00\n", "zero bytes"),
    ("latin.csv", "step,loß\n1,2\n".encode("latin-1"), "no UTF-8 text"),
    ("quote.csv", b'step,loss\n1,"2\n' + b"x" * 200_000, "no CSV file|no rows"),
    ("log.jsonl", b'{"step": 1, "loss": 2}\nnot json\n{"step": 2, "loss": 1}\n', "line 2 is no record"),
    ("list.jsonl", b'{"step": 1}\n[1, 2]\n{"step": 2}\n', "not an object"),
    ("deep.json", b"[" * 100_000 + b"]" * 100_000, "no JSON document"),
    ("nest.jsonl", b'{"a":' * 50 + b"1" + b"}" * 50 + b"\n{}\n", "nested|no rows|no record"),
    ("scalar.json", b"[1, 2, 3]", "not an object|no JSON"),
    ("fake.parquet", b"PAR1" + b"\x00" * 50, "no Parquet file"),
    ("fake.sqlite", b"SQLite format 3\0" + b"\x00" * 200, "journal"),
    ("x.tfevents.1", b"\x00" * 40, "TensorBoard|no scalars"),
    ("short.tfevents.1", b"\x01", "TensorBoard"),
    ("cut.csv.gz", gzip.compress(GOOD.encode() * 50, mtime=0)[:30], "damaged|empty|no CSV"),
    ("trainer_state.json", b"{}", "list of records"),
    ("mixed.jsonl", b'{"step": 1, "loss": 2}\n{"step": 2, "loss": "high"}\n', "numbers and others, such as 'high'"),
    ("lists.jsonl", b'{"step": 1, "loss": 2}\n{"step": 2, "loss": [1, 2]}\n', "numbers and others"),
    ("stepless.csv", b"step,loss\n" + b",2\n" * 30 + b"1,2\n", "rows have nothing in the column 'step'"),
]


@pytest.mark.parametrize(("name", "content", "sentence"), REFUSED, ids=[name for name, *_ in REFUSED])
def test_one_sentence(tmp_path: Path, name: str, content: bytes, sentence: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TrajectoryError, match=sentence):
        Trajectory.load(path)
    assert path.read_bytes() == content


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TrajectoryError, match="no file or folder"):
        Trajectory.load(tmp_path / "nothing.csv")
    with pytest.raises(TrajectoryError, match="holds neither a journal nor logs"):
        Trajectory.load(tmp_path)


def test_pickles_are_never_opened(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    for name in ("log.pkl", "log.csv", "model-10.pt"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb(mark)))
        with pytest.raises(TrajectoryError):
            Trajectory.load(tmp_path / name)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    torch.save({"w": torch.ones(3), "x": Bomb(mark)}, folder / "step-1.pt")
    with pytest.raises(TrajectoryError, match="never unpickled"):
        Trajectory.load(folder)
    with zipfile.ZipFile(tmp_path / "log.zip", "w") as archive:
        archive.writestr("../../log.csv", GOOD)
    with pytest.raises(TrajectoryError, match="archive"):
        Trajectory.load(tmp_path / "log.zip")
    assert not mark.exists()


def test_a_file_that_expands_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safe, "_FREE_BYTES", 1 << 17)
    path = tmp_path / "bomb.csv.gz"
    with gzip.open(path, "wb") as file:
        file.write(b"step,loss\n")
        for _ in range(6):
            file.write(b"1,1\n" * 100_000)
    assert path.stat().st_size < 200_000
    with pytest.raises(TrajectoryError, match="expands to more than"):
        Trajectory.load(path)
    line = tmp_path / "line.csv.gz"
    with gzip.open(line, "wb") as file:
        file.write(b"step,loss\n" + b"1" * (safe.LONGEST_LINE + 10))
    with pytest.raises(TrajectoryError, match="longer than"):
        Trajectory.load(line)


def test_links_out_of_a_folder_are_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret.csv"
    secret.write_text(GOOD, encoding="utf-8")
    folder = tmp_path / "logs"
    folder.mkdir()
    (folder / "link.csv").symlink_to(secret)
    with pytest.raises(TrajectoryError, match="holds neither"):
        Trajectory.load(folder)
    (folder / "own.csv").write_text(GOOD, encoding="utf-8")
    assert list(Trajectory.load_all(folder)) == ["own"]


def test_a_tail_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    lines = [json.dumps({"step": n, "loss": 1.0 / n}) for n in range(1, 50)]
    path = tmp_path / "killed.jsonl"
    path.write_text("\n".join(lines) + '\n{"step": 50, "lo', encoding="utf-8")
    trajectory = Trajectory.load(path)
    assert len(trajectory) == 49
    assert any("cut short" in note for note in trajectory.source.notes)
    packed = gzip.compress(GOOD.encode() * 1, mtime=0)
    rest = tmp_path / "killed.csv.gz"
    noise = "".join(f"{n},{random.Random(n).random()}\n" for n in range(1, 20_000))
    packed = gzip.compress(("step,loss\n" + noise).encode(), mtime=0)
    rest.write_bytes(packed[: len(packed) // 2])
    cut = Trajectory.load(rest)
    assert 1_000 < len(cut) < 20_000
    assert any("damaged after line" in note for note in cut.source.notes)
    ragged = tmp_path / "killed.csv"
    ragged.write_text(GOOD + "50", encoding="utf-8")
    assert len(Trajectory.load(ragged)) == 49


def test_checkpoints_that_do_not_belong_together(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "step-1.pt")
    torch.save({"w": torch.ones(4)}, tmp_path / "step-2.pt")
    with pytest.raises(TrajectoryError, match=r"shape \(4,\), in the checkpoint before \(3,\)"):
        Trajectory.load(tmp_path)
    torch.save({"v": torch.ones(3)}, tmp_path / "step-2.pt")
    with pytest.raises(TrajectoryError, match="other parameters"):
        Trajectory.load(tmp_path)
    (tmp_path / "step-2.pt").write_bytes(b"garbage")
    with pytest.raises(TrajectoryError, match="cannot be read as plain tensors"):
        Trajectory.load(tmp_path)


@given(
    st.binary(min_size=1, max_size=400), st.sampled_from(["x.csv", "x.jsonl", "x.json", "x.tfevents.1", "x.parquet"])
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes, name: str) -> None:
    path = tmp_path_factory.mktemp("x") / name
    path.write_bytes(content)
    with suppress(KalmanguardError):  # anything else would be a crash
        assert len(Trajectory.load(path)) > 0


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_logs_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = bytearray(GOOD.encode())
    for at in rng.integers(0, len(data), 5):
        data[at] = int(rng.integers(0, 256))
    path = tmp_path_factory.mktemp("x") / "log.csv"
    path.write_bytes(bytes(data))
    with suppress(KalmanguardError):
        assert Trajectory.load(path).judge().rows > 0
