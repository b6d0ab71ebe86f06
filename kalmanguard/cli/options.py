"""Options and arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kalmanguard.cli.completion import complete_faults, complete_runs

AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else; null is not finite.")
]
#: Every kind of fault; written out here, since the catalogue itself needs PyTorch, which takes seconds to load.
FAULT_KINDS = (
    "nan_gradient, inf_gradient, gradient_scale, lr_spike, lr_creep, garbage_batch, label_noise, bit_flip, "
    "moments_zeroed, moments_reset, weight_scale, batchnorm_poison"
)
Faults = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SPEC",
        autocompletion=complete_faults,
        help="A fault, as KIND[:VALUE]@STEP[:NAME=VALUE]..., for example lr_spike:50@300:steps=5, nan_gradient@120 or "
        f"bit_flip@200; may be given several times. Kinds: {FAULT_KINDS}.",
    ),
]
Run = Annotated[
    Path,
    typer.Argument(metavar="RUN", help="A run folder, or the journal.sqlite in it.", autocompletion=complete_runs),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the weights, the order of the data and the faults.")]
