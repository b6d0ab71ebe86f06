"""Layer forensics: which layer is going wrong, and how, from a few layers at a time."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kalmanguard.errors import ConfigurationError
from kalmanguard.forensics.attention import AttentionWatch
from kalmanguard.forensics.checks import Check, Need, default_checks
from kalmanguard.forensics.features import FeatureWatch
from kalmanguard.forensics.layers import Layer, Rotation, find_layers
from kalmanguard.forensics.report import Finding, Report, Severity, Trend
from kalmanguard.forensics.samples import LayerSample, Sample
from kalmanguard.forensics.updates import UpdateWatch, weight_sizes
from kalmanguard.records import Evidence
from kalmanguard.sensors.arguments import checked_count, whole_model

#: A finding that is not renewed stays for so many detection latencies.
_HOLD = 2
_KEPT_ERRORS = 5


class Forensics:
    """Look at a few layers of a model every few steps, in turn, and say which of them is sick and of what.

    Parameters
    ----------
    model
        The model; any ``nn.Module`` with a parameter.
    optimizer
        What trains it; by default any torch optimizer that holds one of its parameters, from its first step on.
    every
        Steps from one sample to the next.
    layers_per_step
        Layers that are sampled at a time.
    checks
        Checks to run; by default one of each (`kalmanguard.forensics.checks`).

    Attributes
    ----------
    errors
        What went wrong inside, the first five; it is also told in `Report.abstained`, and never raised.

    Raises
    ------
    ConfigurationError
        ``every`` or ``layers_per_step`` is below 1, or the model has no parameter that can be looked at.

    Notes
    -----
    Guarantee: that of each check, see there; HEURISTIC where none is named. Every layer is sampled once in
    `detection_latency_steps`; what is wrong for shorter may be missed. Cost: hooks are put on the sampled layers only,
    for the one step, and a sample is at most 64 x 512 numbers, so the cost does not grow with depth, except for the
    version counters that the corruption check compares (0.05 us a parameter and step). Measured:
    ``python -m benchmarks forensics``. On an accelerator a sampled step waits for the device, when `step` is called.

    It changes nothing: hooks read, random numbers are not drawn, and a copy or pickle of the model has hooks that do
    nothing. Compiled and scripted modules are not hooked (the report says so); gradients, weights and the optimizer's
    state are then looked at still.

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    >>> with Forensics(model, optimizer, every=1) as forensics:
    ...     for step in range(60):
    ...         loss = (model(torch.randn(64, 8)) - 1.0).square().mean()
    ...         loss.backward()
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    ...         report = forensics.step(loss)
    ...         if step == 40:
    ...             assert report.ok
    ...             _ = model[0].bias.data[:24].fill_(-100.0)
    >>> print(report.level, [finding.layer for finding in report.findings if finding.check == "dead_units"])
    critical ['2']
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        every: int = 4,
        layers_per_step: int = 2,
        checks: Sequence[Check] | None = None,
    ) -> None:
        checked_count("layers_per_step", layers_per_step)
        self._model, self._every = whole_model(model), checked_count("every", every)
        _check_optimizer(model, optimizer)
        self._layers = find_layers(model)
        if not self._layers:
            raise ConfigurationError(
                f"{type(model).__name__} has no parameter to look at: a dense floating-point one that is initialised "
                "and not on the meta device; make or move the model first."
            )
        self._index = {layer.name: index for index, layer in enumerate(self._layers)}
        self.errors: list[str] = []
        self._checks = tuple(default_checks() if checks is None else checks)
        needs = frozenset[Need]().union(*(check.needs for check in self._checks))
        self._needs = needs
        self._rotation = Rotation(count=len(self._layers), size=layers_per_step)
        self._visits = [0] * len(self._layers)
        hooked = not _is_compiled(model)
        self._abstained = () if hooked else ("activations and attention: the model is compiled or scripted",)
        owner = weakref.ref(self)

        def failed(error: Exception) -> None:
            forensics = owner()
            if forensics is not None:
                forensics._failed(error)

        self._features = FeatureWatch(failed) if hooked and Need.FEATURES in needs else None
        self._attention = AttentionWatch(model, failed) if hooked and Need.ATTENTION in needs else None
        self._updates = UpdateWatch(
            list(model.parameters()),
            optimizer,
            integrity=Need.INTEGRITY in needs,
            failed=failed,
        )
        self._attached = False
        self._group: list[tuple[Layer, bool]] = []
        self._step = 0
        self._loss: Any = None
        self._found: dict[tuple[str, str], Finding] = {}
        self._scores: deque[tuple[int, int]] = deque()
        self._report = self._summed_up()

    @property
    def detection_latency_steps(self) -> int:
        """Steps in which every layer and every attention is sampled at least once."""
        owners = len(self._attention.owners) if self._attention is not None else 0
        return self._every * max(self._rotation.groups, owners, 1)

    @property
    def report(self) -> Report:
        """The latest known state."""
        return self._report

    def attach(self) -> Self:
        """Put the hooks on; nothing happens when they are."""
        if not self._attached:
            self._attached = True
            self._updates.attach()
            self._arm()
        return self

    def detach(self) -> None:
        """Take all hooks off; the report stays, and `attach` begins again where it was."""
        if self._attached:
            self._attached = False
            self._disarm()
            self._updates.detach()
            self._updates.forget()

    def close(self) -> None:
        """The same as `detach`."""
        self.detach()

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def step(self, loss: Tensor | float | None = None) -> Report:
        """Take in what happened since the last call; after ``optimizer.step()``. Never raises.

        Parameters
        ----------
        loss
            Training loss of the step, for the loss check; on an accelerator it is read one step later.

        Returns
        -------
        The latest known state; the same as `report`. A call without a step of the optimizer in between (gradient
        accumulation) changes nothing.
        """
        self._advance(loss)
        return self._report

    def sense(self, step: int) -> tuple[Evidence, ...]:
        """What has got worse in this step, as evidence for a supervisor, which calls this instead of `step`."""
        del step  # counted here: a rollback repeats the supervisor's
        return tuple(
            Evidence(
                finding.check,
                finding.statistic,
                True,
                finding.guarantee,
                f"{finding.layer}: {finding.message}",
            )
            for finding in self._advance(None)
        )

    def forget(self) -> None:
        """The parameters or the optimizer were set on purpose (a checkpoint, a rollback): findings are withdrawn."""
        self._updates.forget()
        for check in self._checks:
            check.forget()
        self._found.clear()
        self._report = self._summed_up()

    def _advance(self, loss: Any) -> list[Finding]:
        if not self._attached:
            return []
        try:
            if self._updates.seen and not self._updates.steps:
                return []
            self._step += 1
            return self._judge(loss)
        except Exception as error:
            self._failed(error)
            return []

    def _judge(self, loss: Any) -> list[Finding]:
        due = bool(self._group)
        layers: tuple[LayerSample, ...] = ()
        tampered: tuple[str, ...] = ()
        try:
            updates, gradients, tampered = self._updates.read()
            if due:
                layers = self._sampled(updates, gradients)
        except Exception as error:
            self._failed(error)
        finally:
            self._disarm()
            if (self._step + 1) % self._every == 0 or self._every == 1:
                self._arm()
        sample = Sample(self._step, self._read(loss), tampered, layers)
        worse = []
        for check in self._checks:
            try:
                found = check.judge(sample)
            except Exception as error:
                self._failed(error)
                continue
            worse += [f for f in map(self._noted, found) if f is not None]
        if due or worse:
            self._expire()
            self._report = self._summed_up()
        elif self._report.step != self._step:
            self._report = replace(self._report, step=self._step)
        return worse

    def _sampled(self, updates: dict[str, Any], gradients: dict[str, float]) -> tuple[LayerSample, ...]:
        features = self._features.read() if self._features is not None else {}
        samples = []
        for layer, judged in self._group:
            index = self._index[layer.name]
            size = block = None
            if judged and Need.WEIGHTS in self._needs and layer.weight.dim() >= 2:
                self._visits[index] += 1
                sizes = weight_sizes(layer.weight, self._visits[index])
                size, block = sizes if sizes is not None else (None, None)
            samples.append(
                LayerSample(
                    layer.name,
                    features=features.get(layer.name) if judged else None,
                    gradient_rms=gradients.get(layer.name),
                    weight_rms=size,
                    block=block,
                    update=updates.get(layer.name) if judged else None,
                    judged=judged,
                )
            )
        attention = self._attention.read() if self._attention is not None else {}
        samples += [LayerSample(name, attention=seen) for name, seen in attention.items()]
        return tuple(samples)

    def _arm(self) -> None:
        chosen = self._rotation.next()
        self._group = [(self._layers[index], True) for index in chosen]
        # The layer next to the loss gets a gradient if any does: what the others are compared with.
        last = next((layer for layer in reversed(self._layers) if layer.trained and not layer.is_table), None)
        if last is not None and all(last is not layer for layer, _ in self._group):
            self._group.append((last, False))
        if self._features is not None:
            self._features.arm([layer for layer, judged in self._group if judged])
        if self._attention is not None:
            self._attention.arm()
        self._updates.arm(self._group)

    def _disarm(self) -> None:
        self._group = []
        if self._features is not None:
            self._features.disarm()
        if self._attention is not None:
            self._attention.disarm()
        self._updates.arm([])

    def _read(self, loss: Any) -> float | None:
        if isinstance(loss, Tensor):
            loss = loss.detach()
            if loss.device.type != "cpu":
                # By the next step it is computed, so that reading it need not wait.
                loss, self._loss = self._loss, loss.clone()
            if loss is None:
                return None
            return float(loss) if loss.numel() == 1 else float(loss.float().mean())
        return None if loss is None else float(loss)

    def _noted(self, finding: Finding) -> Finding | None:
        """Keep a finding; returned when it is worse than what was known."""
        key = (finding.check, finding.layer)
        before = self._found.get(key)
        if finding.severity is Severity.OK:
            # Long enough to be seen by a loop that looks at the report now and then.
            if before is not None and self._step - before.step > self.detection_latency_steps:
                del self._found[key]
            return None
        finding = replace(finding, step=self._step)
        self._found[key] = finding
        return finding if before is None or finding.severity.rank > before.severity.rank else None

    def _expire(self) -> None:
        oldest = self._step - _HOLD * self.detection_latency_steps
        for key in [key for key, finding in self._found.items() if finding.step < oldest]:
            del self._found[key]

    def _summed_up(self) -> Report:
        score = sum(finding.severity.rank for finding in self._found.values())
        self._scores.append((self._step, score))
        before = self._scores[0][1]
        while self._scores[0][0] < self._step - self.detection_latency_steps:
            before = self._scores.popleft()[1]
        trend = Trend.WORSENING if score > before else Trend.RECOVERING if score < before else Trend.STABLE
        owners = self._attention.owners if self._attention is not None else []
        count = len(self._layers) + sum(name not in self._index for name, _ in owners)
        reasons = self._abstained + tuple(f"an error inside: {error}" for error in self.errors)
        return Report.of(self._found.values(), step=self._step, layers=count, trend=trend, abstained=reasons)

    def _failed(self, error: Exception) -> None:
        if len(self.errors) < _KEPT_ERRORS:
            self.errors.append(f"{type(error).__name__}: {error}")


def _is_compiled(model: nn.Module) -> bool:
    return any(
        type(module).__name__ == "OptimizedModule"
        or getattr(module, "_compiled_call_impl", None) is not None
        or isinstance(module, torch.jit.ScriptModule)
        for module in model.modules()
    )


def _check_optimizer(model: nn.Module, optimizer: Optimizer | None) -> None:
    if optimizer is None:
        return
    if not isinstance(optimizer, Optimizer):
        raise ConfigurationError(f"optimizer is a {type(optimizer).__name__}; pass a torch.optim.Optimizer, or none.")
    own = set(map(id, model.parameters()))
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise ConfigurationError("The optimizer holds no parameter of the model; pass the one that trains it, or none.")
