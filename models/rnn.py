"""Recurrent networks on the adding task, where a gradient has to travel through many time steps."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from kalmanguard.errors import ConfigurationError

from .plant import Plant, initialised_with
from .recipe import OptimizerName, ScheduleName, make_optimizer, make_schedule
from .stream import Batch, BatchStream, in_batches, seeded

CellName = Literal["gru", "irnn"]

_PROBE, _HELD_OUT = 1, 2
_RATES = {"gru": (3e-3, 0.3), "irnn": (1e-3, 0.01)}  # of AdamW and of SGD
_EXAMPLES = 512  # each, in the probe and held out


class RNN(nn.Module):
    """One recurrent layer, and a linear layer on its last state.

    ``"irnn"`` is a rectified recurrent layer whose recurrent weights begin as the identity, whose biases begin at zero
    and whose input weights begin with a standard deviation of 0.001.

    References
    ----------
    Le, Jaitly and Hinton, "A Simple Way to Initialize Recurrent Networks of Rectified Linear Units",
    arXiv:1504.00941 (2015), section 3.
    """

    def __init__(self, *, cell: CellName, hidden: int = 64) -> None:
        super().__init__()
        self.recur: nn.GRU | nn.RNN
        if cell == "gru":
            self.recur = nn.GRU(2, hidden, batch_first=True)
        else:
            self.recur = nn.RNN(2, hidden, nonlinearity="relu", batch_first=True)
            weights = dict(self.recur.named_parameters())
            nn.init.eye_(weights["weight_hh_l0"])
            nn.init.normal_(weights["weight_ih_l0"], std=1e-3)
            nn.init.zeros_(weights["bias_ih_l0"])
            nn.init.zeros_(weights["bias_hh_l0"])
        self.head = nn.Linear(hidden, 1)

    def forward(self, sequences: Tensor) -> Tensor:
        """Map sequences ``(B, T, 2)`` to sums ``(B, 1)``."""
        states, _ = self.recur(sequences)
        total: Tensor = self.head(states[:, -1])
        return total


class RNNPlant(Plant):
    """`RNN` on the adding task: the sum of the two marked ones among ``length`` random numbers; 13,121 parameters.

    Every step has a number from [0, 1) and a mark, and two marks are set, one in either half of the sequence. Always to
    answer with the mean costs 1/6, and the loss stays near that until the network has learned to remember. Sequences
    are drawn anew for every batch, from its number; those of the probe and those held out are the same for every seed.

    Parameters
    ----------
    seed
        Of the initial weights and of the sequences.
    cell
        ``"gru"``, or ``"irnn"``, a rectified network that begins as the identity.
    length
        Numbers in a sequence, at least 2.
    clip
        Norm to which gradients are clipped, or ``inf``; by default 1 for ``"gru"`` and ``inf`` for ``"irnn"``, whose
        gradients then grow exponentially with ``length`` as soon as an eigenvalue leaves the unit circle.
    batch_size
        Training sequences per step.
    optimizer
        ``"adamw"`` or ``"sgd"``.
    lr
        Learning rate; by default 3e-3 for AdamW and 0.3 for SGD, and with ``"irnn"`` 1e-3 and 0.01.
    momentum
        Heavy-ball coefficient of SGD; AdamW ignores it.
    schedule, steps
        Learning-rate schedule (see `make_schedule`) and its length in steps.
    device
        Where the model and all batches live.

    Raises
    ------
    ConfigurationError
        An option is out of range.

    Notes
    -----
    Held-out loss, seeds 0, 1 and 2, from 1.02, 1.07, 1.12: 0.16 until some 200 steps, 0.0050, 0.0044, 0.0073 after 400
    and 0.0004, 0.0003, 0.0005 after 1,000 (``kalmanguard run rnn --seed 0``). A step takes 5 ms on one core. SGD needs
    some 1,000 steps.

    The identity network stays near 1/6 for some 1,500 steps of AdamW and then learns. It is unstable by itself in
    ``RNNPlant(cell="irnn", length=100, optimizer="sgd")``: within 11 steps the training loss exceeds 1e6 (seeds 0, 1
    and 2), after which no unit is active any more and the answer is always the mean: the loss looks like the plateau's.

    References
    ----------
    Hochreiter and Schmidhuber, "Long Short-Term Memory", Neural Computation 9 (1997), section 5.4. Clipping: Pascanu,
    Mikolov and Bengio, "On the difficulty of training recurrent neural networks", ICML (2013), algorithm 1.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        cell: CellName = "gru",
        length: int = 30,
        clip: float | None = None,
        batch_size: int = 64,
        optimizer: OptimizerName = "adamw",
        lr: float | None = None,
        momentum: float = 0.9,
        schedule: ScheduleName | None = None,
        steps: int = 400,
        device: torch.device | str = "cpu",
    ) -> None:
        if cell not in ("gru", "irnn"):
            raise ConfigurationError(f"There is no recurrent cell {cell!r}; choose gru or irnn.")
        if length < 2:
            raise ConfigurationError(f"length = {length}: a sequence has at least the two numbers that are added.")
        self.clip = clip if clip is not None else 1.0 if cell == "gru" else math.inf
        if not self.clip > 0:
            raise ConfigurationError(f"clip = {clip}: gradients are clipped to a norm above 0; inf does not clip.")
        place = torch.device(device)
        with initialised_with(seed):
            model = RNN(cell=cell).to(place)
        lr = lr if lr is not None else _RATES[cell][optimizer == "sgd"]
        trainer = make_optimizer(model.parameters(), optimizer, lr=lr, momentum=momentum)
        probe = _additions(_EXAMPLES, length, seeded(1_997, _PROBE, length))
        held_out = _additions(_EXAMPLES, length, seeded(1_997, _HELD_OUT, length))
        super().__init__(
            name="rnn",
            model=model,
            optimizer=trainer,
            scheduler=make_schedule(trainer, schedule, steps=steps),
            loader=_Additions(length, seed=seed, batch_size=batch_size, device=place),
            probe_loader=in_batches(*probe, batch_size=128, device=place),
            held_out=in_batches(*held_out, batch_size=512, device=place),
        )

    def loss_fn(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean squared error of the sum."""
        return mse_loss(output, target)

    def backward(self, batch: Batch) -> Tensor:
        """Forward and backward pass of one training batch, and clipping."""
        loss = super().backward(batch)
        if math.isfinite(self.clip):
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        return loss


class _Additions(BatchStream):
    """Sequences that are drawn from the number of their batch."""

    def __init__(self, length: int, *, seed: int, batch_size: int, device: torch.device) -> None:
        super().__init__(seed=seed, batch_size=batch_size, device=device)
        self._length = length

    def batch(self, index: int) -> Batch:
        """Return batch number ``index``, counted from 0, on the CPU."""
        return _additions(self.batch_size, self._length, seeded(self.seed, index))


def _additions(count: int, length: int, generator: torch.Generator) -> Batch:
    numbers = torch.rand(count, length, generator=generator)
    half = length // 2
    first = torch.randint(half, (count, 1), generator=generator)
    second = torch.randint(half, length, (count, 1), generator=generator)
    marks = torch.zeros(count, length).scatter_(1, first, 1.0).scatter_(1, second, 1.0)
    return torch.stack([numbers, marks], 2), (numbers * marks).sum(1, keepdim=True)
