"""The plugin: one callback for the trainer that Axolotl has made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kalmanguard.integrations.axolotl.arguments import OWN, settings_of
from kalmanguard.integrations.huggingface import KalmanGuardCallback

if TYPE_CHECKING:
    BasePlugin = object
else:
    try:
        from axolotl.integrations.base import BasePlugin
    except ImportError:  # for documentation and tests; without Axolotl nobody loads a plugin
        BasePlugin = object

#: What is printed when supervision is active: Axolotl goes on when a plugin cannot be imported.
BANNER = "kalmanguard supervises this run"


class KalmanGuardPlugin(BasePlugin):
    """Supervise a run of Axolotl.

    .. code-block:: yaml

        plugins:
          - kalmanguard.integrations.axolotl.KalmanGuardPlugin
        kalmanguard:
          preset: conservative      # or nothing; any other setting by name
          run_dir: runs/kalmanguard # or nothing: _kalmanguard in output_dir

    The held-out examples are those of ``val_set_size`` or ``test_datasets``. Axolotl swallows the error of a plugin
    that cannot be imported and trains without it: look for the banner in the log, or run
    ``python -c "import kalmanguard.integrations.axolotl"`` before.

    Attributes
    ----------
    callback
        The `KalmanGuardCallback` of the run; ``None`` before the trainer is made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.callback: KalmanGuardCallback | None = None

    def get_input_args(self) -> str:
        """Where the model of the YAML section is."""
        return "kalmanguard.integrations.axolotl.KalmanGuardArgs"

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[KalmanGuardCallback]:
        """Make the callback, and say so."""
        section = dict(cfg.get("kalmanguard") or {})
        own = {name: section[name] for name in OWN if section.get(name) is not None}
        self.callback = KalmanGuardCallback(settings=settings_of(section), **own)
        where = own.get("run_dir") or f"{trainer.args.output_dir}/_kalmanguard"
        print(f"{BANNER}: journal and checkpoints go to {where}", flush=True)  # noqa: T201 - a log level may hide it
        return [self.callback]
