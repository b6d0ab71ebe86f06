"""What cannot work is refused at construction, with the value, the bound and the way out; and nothing is half-written.

Oracle: the sentence itself, since that is what a user gets, and the file system and torch's hooks before and after.
"""

from __future__ import annotations

import gc
import math
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_hooks

from kalmanguard.certificate.verify import UnreadableJournalError, verify
from kalmanguard.errors import (
    BindError,
    ConfigurationError,
    JournalError,
    KalmanguardError,
    SnapshotError,
    TrainingHalted,
)
from kalmanguard.journal.reader import JournalReader
from kalmanguard.models.mlp import MLPPlant
from kalmanguard.settings import Settings
from kalmanguard.supervisor import Supervisor


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def held_out(n: int = 64) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(n, 6), torch.randint(0, 3, (n,)))]


@pytest.fixture(autouse=True)
def _no_hook_stays_behind() -> Iterator[None]:
    before = set(torch_hooks._global_optimizer_pre_hooks), set(torch_hooks._global_optimizer_post_hooks)
    yield
    if not set(torch_hooks._global_optimizer_pre_hooks) <= before[0]:
        gc.collect()  # a supervisor that nobody holds takes its hooks with it
    after = set(torch_hooks._global_optimizer_pre_hooks), set(torch_hooks._global_optimizer_post_hooks)
    assert after[0] <= before[0]
    assert after[1] <= before[1]


def refused(kind: type[Exception], words: str, make: Callable[[], object]) -> str:
    with pytest.raises(kind, match=words) as caught:
        make()
    assert isinstance(caught.value, KalmanguardError)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) > 20
    return text


# -- models and probes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "probe", "words"),
    [
        (network(), [], "probe loader is empty; it must yield at least one batch"),
        (network(), iter(()), "probe loader is empty"),
        (network(), [(torch.randn(1, 6), torch.zeros(1, dtype=torch.long))], "fewer than two examples.* at least 2"),
        (network(), [(torch.randn(0, 6), torch.zeros(0, dtype=torch.long))], "probe loader is empty"),
        (nn.ReLU(), held_out(), "no parameters; there is nothing to supervise"),
        (network().parameters(), held_out(), "model is a generator; pass the torch.nn.Module"),
        (None, held_out(), "model is a NoneType"),
        (network(), [3.0], "a float, holds no tensor.*must be .inputs, target., a dict or a tensor"),
        (network(), ["text"], "a str, holds no tensor"),
        (network(), [(torch.randn(8, 6), torch.randn(8))], r"cannot be inferred.*\(8, 3\).*\(8,\).*pass loss_fn="),
        (network(), [(torch.randn(8, 6), ["a"] * 8)], "no target tensor; pass loss_fn="),
        (network(), [torch.randn(8, 6)], "no target tensor; pass loss_fn="),
        (network(), [{"x": torch.randn(8, 6)}], "no target tensor; pass loss_fn="),
    ],
)
def test_models_and_probes_that_cannot_work(model: Any, probe: Any, words: str) -> None:
    refused(ConfigurationError, words, lambda: Supervisor(model, probe))


def test_a_loss_that_cannot_work() -> None:
    refused(
        ConfigurationError,
        "loss_fn returned float; it must return a tensor",
        lambda: Supervisor(network(), held_out(), loss_fn=lambda o, t: 0.5),  # type: ignore[arg-type,return-value]
    )
    refused(
        ConfigurationError,
        r"loss_fn returned shape \(3,\) for 64 examples; it must return one loss each or a mean",
        lambda: Supervisor(network(), held_out(), loss_fn=lambda o, t: o.mean(0)),
    )


def test_a_probe_that_does_not_fit_the_model_fails_with_torchs_own_words() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        Supervisor(network(), [(torch.randn(8, 5), torch.zeros(8, dtype=torch.long))])


# -- optimizers -------------------------------------------------------------------------------------------------------


def test_an_optimizer_of_another_model() -> None:
    other = torch.optim.Adam(network().parameters())
    text = refused(BindError, "holds none of the model", lambda: Supervisor(network(), held_out(), optimizer=other))
    assert "Adam" in text
    assert "pass the optimizer that trains this model" in text


@pytest.mark.parametrize(("given", "name"), [("adam", "str"), ([None], "NoneType"), ([0.1], "float")])
def test_what_is_no_optimizer(given: Any, name: str) -> None:
    refused(
        ConfigurationError,
        f"optimizer is a {name}; pass a torch.optim.Optimizer",
        lambda: Supervisor(network(), held_out(), optimizer=given),
    )


def test_replay_needs_a_loader_that_can_be_rewound() -> None:
    refused(
        ConfigurationError,
        "replay needs a loader with state_dict.*or switch replay off",
        lambda: Supervisor(network(), held_out(), settings={"replay": True}, loader=[1, 2, 3]),
    )


# -- settings ---------------------------------------------------------------------------------------------------------

OUT_OF_RANGE: list[tuple[str, Any, str]] = [
    ("budget", 0.0, "greater than 0"),
    ("budget", 0.9, "less than or equal to 0.5"),
    ("probe_every", 0, "greater than or equal to 1"),
    ("snapshot_every", -3, "greater than or equal to 1"),
    ("snapshot_bytes", 0, "greater than 0"),
    ("probe_examples", 1, "greater than or equal to 2"),
    ("fresh_examples", -1, "greater than or equal to 0"),
    ("fault_rate", 1.0, "less than 1"),
    ("sketch_size", 4, "greater than or equal to 8"),
    ("sketch_size", 10_000, "less than or equal to 4096"),
    ("seed", -1, "greater than or equal to 0"),
    ("warmup_steps", 2, "greater than or equal to 5"),
    ("suspicion", 1.0, "greater than 1"),
    ("suspicion", math.nan, "finite number"),
    ("run_length", 0.5, "greater than 1"),
    ("give_back", 0.0, "greater than 0"),
    ("give_back", 1.5, "less than or equal to 1"),
    ("floor_frac", 1.0, "less than 1"),
    ("standard_errors", -1.0, "greater than 0"),
    ("patience", 0, "greater than or equal to 1"),
    ("gate_ratio", 1.0, "greater than 1"),
    ("rollback_budget", 0, "greater than or equal to 1"),
    ("recovery_steps", 0, "greater than or equal to 1"),
    ("certificate_alpha", 1.0, "less than 1"),
    ("certificate_alpha", 0.0, "greater than 0"),
    ("certificate_delta", 0.0, "greater than 0"),
    ("certificate_clip", -2.0, "greater than 0"),
    ("checkpoint_share", 0.0, "greater than 0"),
    ("mode", "guard", "'protect' or 'observe'"),
    ("on_halt", "stop", "'raise' or 'return'"),
    ("raise_on", ["halt"], "'veto', 'rollback' or 'pause'"),
    ("snapshots_on", "tape", "'host', 'device' or 'disk'"),
    ("probe_every", 2.5, "integer"),
    ("give_back", "much", "number"),
    ("strict", "perhaps", "boolean"),
    ("on_decision", 3, "callable"),
]


@pytest.mark.parametrize(("name", "value", "bound"), OUT_OF_RANGE)
def test_settings_out_of_range_name_the_value_and_the_bound(name: str, value: Any, bound: str) -> None:
    text = refused(ConfigurationError, name, lambda: Settings(**{name: value}))
    assert bound in text
    first = value[0] if isinstance(value, list) else value
    assert str(first) in text


def test_settings_that_contradict_each_other() -> None:
    text = refused(
        ConfigurationError, "certificate_delta", lambda: Settings(certificate_delta=5.0, certificate_clip=4.0)
    )
    assert "5.0" in text
    assert "4.0" in text


def test_several_problems_are_all_told() -> None:
    text = refused(ConfigurationError, "budget", lambda: Settings(budget=0, patience=0, nonsense=1))  # type: ignore[call-arg]
    assert "patience" in text
    assert "no setting 'nonsense'" in text


def test_presets_files_and_dicts_that_do_not_exist(tmp_path: Path) -> None:
    refused(ConfigurationError, "no preset 'brave'; choose one of conservative", lambda: Settings.preset("brave"))
    refused(
        ConfigurationError, "settings = 'brave' is neither", lambda: Supervisor(network(), held_out(), settings="brave")
    )
    refused(ConfigurationError, "settings = 3", lambda: Settings.of(3))  # type: ignore[arg-type]
    missing = tmp_path / "missing.toml"
    refused(ConfigurationError, f"{missing.name} cannot be read: No such file", lambda: Settings.of(missing))
    broken = tmp_path / "broken.toml"
    broken.write_text("budget = = 3\n")
    refused(ConfigurationError, "broken.toml is not valid TOML", lambda: Settings.of(str(broken)))
    wrong = tmp_path / "wrong.toml"
    wrong.write_text('preset = "aggressive"\ngive_back = 7\n')
    refused(ConfigurationError, "give_back = 7: input should be less than or equal to 1", lambda: Settings.of(wrong))
    refused(ConfigurationError, "there is no setting 'speed'", lambda: Settings.of({"speed": 3}))


# -- memory and folders -----------------------------------------------------------------------------------------------


def test_memory_that_cannot_hold_two_snapshots_is_told_with_the_sum() -> None:
    size = sum(p.numel() * p.element_size() for p in network().parameters())
    text = refused(
        SnapshotError,
        "Two snapshots",
        lambda: Supervisor(network(), held_out(), settings=Settings(snapshot_bytes=100)),
    )
    assert f"{2 * 3 * size:,} bytes" in text  # weights and Adam's two moments, twice
    assert "100 bytes" in text
    assert "raise snapshot_bytes, or give a run_dir" in text


def test_snapshots_on_disk_need_a_folder() -> None:
    refused(
        ConfigurationError,
        "disk.*needs a run_dir",
        lambda: Supervisor(network(), held_out(), settings=Settings(snapshots_on="disk")),
    )


@pytest.mark.parametrize("settings", [Settings(), Settings(snapshots_on="disk"), Settings(snapshot_bytes=100)])
def test_a_run_folder_that_cannot_be_written_to(settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    text = refused(
        JournalError, str(file), lambda: Supervisor(network(), held_out(), settings=settings, run_dir=file / "run")
    )
    assert "cannot be" in text
    assert file.read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    refused(JournalError, "cannot be", lambda: Supervisor(network(), held_out(), run_dir=locked / "run"))
    assert list(locked.iterdir()) == []


# -- journals ---------------------------------------------------------------------------------------------------------


def finished(folder: Path) -> Path:
    """A short run, closed; the path of its journal."""
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Supervisor(model, held_out(), run_dir=folder, settings={"probe_every": 5}) as supervisor:
        for x, y in held_out(16) * 20:
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            supervisor.update()
    return folder / "journal.sqlite"


def resumed(folder: Path, **options: Any) -> Supervisor:
    model, probe = options.pop("model", None) or network(), options.pop("probe", None) or fixed_probe()
    given = {"optimizer": torch.optim.SGD(model.parameters(), lr=0.1), **options}
    return Supervisor.resume(folder, model, probe, **given)


def fixed_probe() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    network()
    return held_out()


def text_file(path: Path) -> None:
    path.write_text("this is no database, but notes that somebody wants to keep\n" * 40)


def foreign_database(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE contacts (name TEXT)")
    connection.execute("INSERT INTO contacts VALUES ('Ada')")
    connection.commit()
    connection.close()


def of_a_newer_version(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version=99")
    connection.close()


def cut_off(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def last_record_changed(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("UPDATE records SET step = step + 1 WHERE seq = (SELECT max(seq) FROM records)")
    connection.commit()
    connection.close()


DAMAGES: list[tuple[Callable[[Path], None], bool, str]] = [
    (text_file, False, "not an SQLite database, so not a journal"),
    (foreign_database, False, "database of another program"),
    (of_a_newer_version, True, "newer kalmanguard.*version 99.*upgrade"),
    (cut_off, True, "damaged|malformed|does not follow"),
    (last_record_changed, True, "does not follow from the one before.*start a new run folder"),
]


@pytest.mark.parametrize(("damage", "after_a_run", "words"), DAMAGES)
def test_a_foreign_or_damaged_journal_is_neither_continued_nor_overwritten(
    damage: Callable[[Path], None], after_a_run: bool, words: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    path = finished(folder) if after_a_run else folder / "journal.sqlite"
    damage(path)
    before = path.read_bytes()
    refused(JournalError, words, lambda: resumed(folder))
    assert path.read_bytes() == before
    if damage is not last_record_changed:  # an undamaged header says enough: the folder holds a run
        refused(JournalError, f"{words}|holds a run", lambda: Supervisor(network(), held_out(), run_dir=folder))
    assert path.read_bytes() == before


@pytest.mark.parametrize(("damage", "after_a_run"), [(damage, after) for damage, after, _ in DAMAGES])
def test_the_verifier_refuses_or_fails_them_too(
    damage: Callable[[Path], None], after_a_run: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    path = finished(folder) if after_a_run else folder / "journal.sqlite"
    damage(path)
    if damage in (text_file, foreign_database, of_a_newer_version):
        with pytest.raises(UnreadableJournalError, match=r"journal|database"):
            verify(folder)
    else:
        with suppress(UnreadableJournalError):
            assert verify(folder).exit_code != 0


def test_a_run_is_resumed_with_its_own_model_probe_and_checkpoint_only(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    finished(folder)
    with JournalReader(folder) as reader:
        head = reader.head
    other = nn.Linear(6, 3)
    refused(SnapshotError, "Linear|weight|parameter", lambda: resumed(folder, model=other))
    refused(ConfigurationError, "another probe set", lambda: resumed(folder, probe=held_out(32)))
    refused(
        BindError,
        "holds none of the model's parameters",
        lambda: resumed(folder, optimizer=torch.optim.SGD(other.parameters(), lr=0.1)),
    )
    gc.collect()
    with JournalReader(folder) as reader:
        assert reader.head == head
        assert reader.complete
    assert verify(folder).exit_code == 0
    resumed(folder).close()


def test_a_checkpoint_that_was_changed_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    finished(folder)
    weights = max((p for p in (folder / "checkpoints").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 0xFF
    weights.write_bytes(bytes(data))
    refused(SnapshotError, "checkpoint|digest|changed|damaged", lambda: resumed(folder))


def test_a_run_without_a_checkpoint_cannot_be_resumed(tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "run"
    finished(folder)
    shutil.rmtree(folder / "checkpoints")
    refused(SnapshotError, "checkpoint", lambda: resumed(folder))


def test_a_resume_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "run"
    finished(folder)
    shutil.rmtree(folder / "checkpoints")
    before = set(torch_hooks._global_optimizer_pre_hooks)
    with pytest.raises(SnapshotError) as caught:
        resumed(folder)
    assert caught.value.__traceback__ is not None  # what a debugger or a notebook holds on to
    assert set(torch_hooks._global_optimizer_pre_hooks) == before


@pytest.mark.parametrize(
    "calibration",
    [
        5,
        {"loss": "abc"},
        {"loss": 5},
        {"loss": [[0.9, "x"]]},
        {"loss": [[0.9, math.nan]]},
        {"loss": [[1.0, 3.0]]},
        {"x": []},
    ],
)
def test_a_malformed_calibration_is_refused_at_construction(calibration: object) -> None:
    with pytest.raises(ConfigurationError, match="calibration"):
        Settings(calibration=calibration)


def test_a_model_that_is_nan_from_the_start_is_said_and_halted() -> None:
    plant = MLPPlant(seed=0)
    with torch.no_grad():
        plant.model.layers[0].weight.fill_(math.nan)
    guard = Supervisor(plant.model, plant.probe_loader)

    def go() -> None:
        for _ in range(40):
            plant.train_step(next(plant.loader))
            guard.update()

    with pytest.warns(UserWarning, match="not finite before the first step"):
        refused(TrainingHalted, "no state is left", go)
    guard.close()


def test_a_negative_learning_rate_does_not_break_the_clock() -> None:
    plant = MLPPlant(seed=0, optimizer="sgd", momentum=0.0)
    with Supervisor(plant.model, plant.probe_loader, settings={"mode": "observe", "probe_every": 5}) as guard:
        for step in range(100):
            if step == 60:
                plant.optimizer.param_groups[0]["lr"] = -0.01
            loss = plant.train_step(next(plant.loader))
            guard.update(loss)
        assert guard.statistics()["errors"] == 0
