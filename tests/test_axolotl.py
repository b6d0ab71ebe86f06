"""The plugin of Axolotl. Its package needs accelerators to install; where it is there, its own base class is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
from kalmanguard.integrations.axolotl import KalmanGuardArgs, KalmanGuardPlugin
from kalmanguard.integrations.axolotl.arguments import settings_of

from .test_huggingface import FIXED, trainer_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def test_the_section_is_checked_when_it_is_read() -> None:
    assert KalmanGuardArgs().kalmanguard is None
    assert settings_of({"give_back": 0.3, "run_dir": "x"}).give_back == 0.3
    with pytest.raises(ValueError, match="give_bak"):
        KalmanGuardArgs(kalmanguard={"give_bak": 0.3})


def test_a_run_is_supervised_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Under Axolotl's own manager where it is installed."""
    try:
        from axolotl.integrations.base import PluginManager
    except ImportError:
        plugin: Any = KalmanGuardPlugin()
        found: Any = plugin
    else:
        found = PluginManager.get_instance()
        found.register("kalmanguard.integrations.axolotl.KalmanGuardPlugin")
        plugin = found.plugins["kalmanguard.integrations.axolotl.KalmanGuardPlugin"]
        assert isinstance(plugin, KalmanGuardPlugin)
        assert found.get_input_args() == ["kalmanguard.integrations.axolotl.KalmanGuardArgs"]
    trainer = trainer_of(tmp_path, steps=12)
    cfg = {"kalmanguard": {**FIXED, "run_dir": str(tmp_path / "run")}}
    for callback in found.add_callbacks_post_trainer(cfg, trainer):
        trainer.add_callback(callback)
    trainer.train()
    assert "kalmanguard supervises this run" in capsys.readouterr().out
    assert plugin.callback is not None
    assert len(plugin.callback.decisions) == 12
    assert (tmp_path / "run").is_dir()
