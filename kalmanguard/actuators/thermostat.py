"""The spectral thermostat: keeps the stable rank of each weight matrix from falling below its target, by feedback."""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kalmanguard.actuators.rounding import round_stochastically
from kalmanguard.errors import ConfigurationError
from kalmanguard.sensors.arguments import checked_count, whole_model
from kalmanguard.sensors.spectrum.layers import MatrixLayer, matrix_layers
from kalmanguard.sensors.spectrum.measures import top_singular

_FIRST_ITERATIONS = 20
#: Of the loop, per step at the full learning rate: the time constants are 1 / (2 x 0.01) = 50 and 200 steps.
_PROPORTIONAL = 0.01
_INTEGRAL = _PROPORTIONAL / 200
#: Most of the top direction that one application may take, however many steps it stands for.
_MOST_AT_ONCE = 0.5


class LayerState(NamedTuple):
    """One layer's loop: measured stable rank, its target, and the strength lambda that is in force, per step."""

    stable_rank: float
    target: float
    strength: float


class _Loop:
    """PI controller of one layer; the integral is held while the output is saturated (anti-windup)."""

    def __init__(self, layer: MatrixLayer, right: Tensor, stable_rank: float, target: float) -> None:
        self.layer, self.right = layer, right
        self.stable_rank, self.target = stable_rank, target
        self.integral = self.strength = 0.0

    def control(self, stable_rank: float, steps: float, strongest: float) -> float:
        self.stable_rank = stable_rank
        error = math.log(self.target / stable_rank)
        wanted = self.integral + _INTEGRAL * error * steps
        saturated = _PROPORTIONAL * error + wanted > strongest
        if error < 0 or not saturated:
            self.integral = min(strongest, max(0.0, wanted))
        self.strength = min(strongest, max(0.0, _PROPORTIONAL * error + self.integral))
        return self.strength


class SpectralThermostat:
    """Adaptive spectral regularization as a decoupled decay of the top singular direction, one loop per layer.

    After an optimizer step, a layer whose stable rank ``s = ||W||_F^2 / ||W||_2^2`` is below its target is changed by
    ::

        W <- c (W - a sigma u v^T),     a = lambda x steps x (learning rate / full learning rate)

    with ``sigma, u, v`` the top singular triple by power iteration and ``c`` such that ``||W||_F`` stays as it was.
    That is a step down the gradient of ``-log s``, so it changes the ratio that is measured; a decay of ``||W||``, of
    any strength, does not. ``lambda`` comes from a PI controller on ``e = log(target / s)``: it rises while s is below
    the target, falls to 0 when it is above, is bounded, and its integral does not wind up while it is at a bound.

    Parameters
    ----------
    model
        Every dense floating-point matrix of at least 4 x 4 in it that the optimizer trains is kept, except embeddings.
    optimizer
        Any torch optimizer. The thermostat attaches itself by a hook on its steps, so that it acts once per step
        however many backward passes are accumulated, and not at all in a step without gradients (a dropped one).
    target
        Stable rank to keep, as a share of what the layer has when the thermostat is made.
    every
        Steps from one application to the next; each makes up for all the steps since the last one.
    strongest
        Upper bound of lambda, per step.
    include
        Of the names of parameters, which are kept; all that are described above by default.
    seed
        Key of the generators for power iteration and rounding; torch's own are not touched.

    Raises
    ------
    ConfigurationError
        An option is out of range, or the optimizer trains no such matrix.

    Notes
    -----
    Guarantee: EXACT for ``||W||_F``, up to rounding, whatever u is; HEURISTIC for everything that is hoped to come of a
    higher stable rank: see ``docs/spectrum.md`` for what was measured. A matrix of rank one stays as it is (every
    direction that could be raised is 0).
    Half-precision weights are changed in float32 and rounded stochastically, since nearest rounding would drop changes
    of less than half a percent. Optimizers that keep a float32 copy of half-precision weights of their own overwrite
    the change.
    It never raises from inside a step: at an error it stops acting, warns once and keeps the reason in ``failure``.
    Not part of a snapshot: after a rollback the loops go on from their present strength; `state_dict` is for
    checkpoints.
    Cost: two matrix-vector products, a norm and, where lambda > 0, a rank-one update per layer, every ``every`` steps;
    one read from the device for all layers. ``python -m benchmarks spectrum`` has the figures.

    References
    ----------
    Sanyal, Torr, Dokania, "Stable rank normalization for improved generalization in neural networks and GANs", ICLR
    2020, for the aim; Astrom, Murray, "Feedback Systems" (2008), section 10.4, for anti-windup by a held integral.

    Examples
    --------
    >>> layer = nn.Linear(32, 32, bias=False)
    >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    >>> thermostat = SpectralThermostat(layer, optimizer, every=1)
    >>> with torch.no_grad():
    ...     layer.weight += 0.5  # one direction takes over
    >>> low = thermostat.state()["weight"].stable_rank
    >>> for _ in range(300):
    ...     layer(torch.zeros(1, 32)).sum().backward()
    ...     optimizer.step()
    >>> state = thermostat.state()["weight"]
    >>> state.stable_rank > 0.9 * state.target
    True
    >>> thermostat.close()
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        target: float = 0.8,
        every: int = 10,
        strongest: float = 0.02,
        include: Callable[[str], bool] | None = None,
        seed: int = 0,
    ) -> None:
        whole_model(model)
        checked_count("every", every)
        if not 0 < target <= 1:
            raise ConfigurationError(f"target = {target} is outside (0, 1]: it is a share of the present stable rank.")
        if not 0 < strongest <= _MOST_AT_ONCE:
            raise ConfigurationError(f"strongest = {strongest} is outside (0, {_MOST_AT_ONCE}].")
        if seed < 0:
            raise ConfigurationError(f"seed = {seed} is negative; use 0 or a positive number.")
        if not isinstance(optimizer, Optimizer):
            raise ConfigurationError(
                f"{type(optimizer).__name__} is no torch.optim.Optimizer; pass the one that it wraps."
            )
        self._every, self._strongest, self._seed = every, strongest, seed
        self._generators: dict[torch.device, torch.Generator] = {}
        self._steps = 0
        self._elapsed: list[float] = []
        self._full_rates: list[float] = []
        #: Why the thermostat has stopped acting, if it has.
        self.failure: str | None = None
        trained = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
        self._loops: dict[str, _Loop] = {}
        for layer in matrix_layers(model):
            wanted = not layer.is_embedding if include is None else include(layer.name)
            if id(layer.parameter) in trained and wanted:
                loop = self._start(layer, target)
                if loop is not None:
                    self._loops[layer.name] = loop
        if not self._loops:
            raise ConfigurationError(
                "The optimizer trains no dense floating-point matrix of this model of at least 4 x 4 that is finite "
                "and not zero" + (" and included" if include is not None else "") + "; there is nothing to regulate."
            )
        self._handle = optimizer.register_step_post_hook(self._after_step)

    def state(self) -> dict[str, LayerState]:
        """Measured stable rank (at the last application), target and strength of each layer, by its name."""
        return {name: LayerState(loop.stable_rank, loop.target, loop.strength) for name, loop in self._loops.items()}

    def close(self) -> None:
        """Detach from the optimizer; the weights stay as they are."""
        self._handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the loops know, as numbers and tensors."""
        return {
            "steps": self._steps,
            "elapsed": list(self._elapsed),
            "full_rates": list(self._full_rates),
            "generators": {str(device): g.get_state() for device, g in self._generators.items()},
            "loops": {
                name: {
                    "right": loop.right.clone(),
                    "stable_rank": loop.stable_rank,
                    "target": loop.target,
                    "integral": loop.integral,
                    "strength": loop.strength,
                }
                for name, loop in self._loops.items()
            },
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state; the targets are those of the state.

        Raises
        ------
        ConfigurationError
            The state belongs to other layers.
        """
        saved = state_dict["loops"]
        if saved.keys() != self._loops.keys():
            differing = sorted(saved.keys() ^ self._loops.keys())
            raise ConfigurationError(f"The state belongs to other layers; they differ in {', '.join(differing[:5])}.")
        for name, loop in self._loops.items():
            if saved[name]["right"].shape != loop.right.shape:
                raise ConfigurationError(f"The state of layer {name!r} belongs to another shape.")
        for name, loop in self._loops.items():
            values = saved[name]
            loop.right = values["right"].to(loop.right, copy=True)
            loop.stable_rank, loop.target = values["stable_rank"], values["target"]
            loop.integral, loop.strength = values["integral"], values["strength"]
        self._steps = state_dict["steps"]
        self._elapsed, self._full_rates = list(state_dict["elapsed"]), list(state_dict["full_rates"])
        for device, generator_state in state_dict["generators"].items():
            self._generator(torch.device(device)).set_state(generator_state)

    @torch.no_grad()
    def _start(self, layer: MatrixLayer, target: float) -> _Loop | None:
        matrix = _in_float(layer.matrix())
        draws = np.random.default_rng([self._seed, zlib.crc32(layer.name.encode())]).standard_normal(matrix.shape[1])
        right = torch.from_numpy(draws / np.linalg.norm(draws)).to(matrix.device, matrix.dtype)
        value, _, right = top_singular(matrix, right, iterations=_FIRST_ITERATIONS)
        norm, top = float(torch.linalg.vector_norm(matrix)), float(value)
        if not (0 < top < math.inf and norm < math.inf):
            return None
        stable_rank = (norm / top) ** 2
        return _Loop(layer, right, stable_rank, max(1.0, target * stable_rank))

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.failure is not None:
            return
        try:
            self._count(optimizer)
        except Exception as error:  # a guard must not end a training run
            self.failure = f"{type(error).__name__}: {error}"
            warnings.warn(f"The spectral thermostat has stopped: {self.failure}", RuntimeWarning, stacklevel=2)

    def _count(self, optimizer: Optimizer) -> None:
        groups = optimizer.param_groups
        if all(p.grad is None for group in groups for p in group["params"]):
            return
        while len(self._elapsed) < len(groups):
            self._elapsed.append(0.0)
            self._full_rates.append(0.0)
        for index, group in enumerate(groups):
            rate = float(group["lr"])
            full = self._full_rates[index] = max(self._full_rates[index], rate, float(group.get("initial_lr", 0.0)))
            self._elapsed[index] += rate / full if full > 0 else 0.0
        self._steps += 1
        if self._steps % self._every == 0:
            self._apply(groups)
            self._elapsed = [0.0] * len(groups)

    @torch.no_grad()
    def _apply(self, groups: list[dict[str, Any]]) -> None:
        group_of = {id(p): index for index, group in enumerate(groups) for p in group["params"]}
        found = []
        for loop in self._loops.values():
            parameter = loop.layer.parameter
            if id(parameter) not in group_of or parameter.grad is None:
                continue
            with torch.autocast(parameter.device.type, enabled=False):
                matrix = _in_float(loop.layer.matrix())
                value, left, right = top_singular(matrix, loop.right.to(matrix), iterations=1)
                found.append((loop, matrix, left, right, torch.stack([value, torch.linalg.vector_norm(matrix)])))
        if not found:
            return
        device = found[0][4].device
        numbers = torch.stack([pair.to(device, torch.float64) for *_, pair in found]).tolist()
        for (loop, matrix, left, right, _), (top, norm) in zip(found, numbers, strict=True):
            if not (0 < top < math.inf and norm < math.inf):
                continue
            loop.right = right
            steps = self._elapsed[group_of[id(loop.layer.parameter)]]
            strength = loop.control(max(1.0, (norm / top) ** 2), steps, self._strongest)
            share = min(_MOST_AT_ONCE, strength * steps)
            left_over = norm * norm - top * top * share * (2 - share)
            if share > 0 and left_over > 0:
                self._put(loop.layer, matrix, share * top, left, right, norm / math.sqrt(left_over))

    def _put(
        self, layer: MatrixLayer, matrix: Tensor, amount: float, left: Tensor, right: Tensor, factor: float
    ) -> None:
        weights = layer.parameter
        changed = torch.addr(matrix, left, right, beta=factor, alpha=-factor * amount)
        if weights.dtype != changed.dtype:
            changed = round_stochastically(changed, weights.dtype, self._generator(changed.device))
        layer.write(changed)

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]


def _in_float(matrix: Tensor) -> Tensor:
    return matrix if matrix.dtype in (torch.float32, torch.float64) else matrix.float()
