"""The optimizer tap: global step hooks that see gradients and rates, and can drop a step before it is taken."""

from __future__ import annotations

import gc
import math
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as hooks

from kalmanguard.errors import BindError
from kalmanguard.sensors.device_gate import Flagged, can_skip, flag, unflag
from kalmanguard.sensors.norm import total_norm
from kalmanguard.sensors.shards import locals_of


class StepEffect(Protocol):
    """Something that recovery keeps in force over optimizer steps."""

    def before_step(self, optimizer: Optimizer) -> None:
        """Called before each step of a bound optimizer, after the gradient was judged."""

    def after_step(self, optimizer: Optimizer) -> None:
        """Called after the step; whatever was changed in the optimizer must be put back here."""


class OptimizerTap:
    """Watch every optimizer that trains the given parameters.

    Parameters
    ----------
    parameters
        Parameters of the supervised model.
    optimizers
        Optimizers that are known from the start; others that hold one of the parameters bind themselves when they
        step.
    protect
        Whether a gradient that is not finite, or above `gate`, may be dropped.
    before_first_step
        Called once, before the first step of any bound optimizer.
    before_step
        Called before the first step of any bound optimizer since the last `reset`.
    on_veto
        Called with a function that drops the step, when the gradient asks for that; by default it is dropped.

    on_brace
        Called right before a step is applied whose gradient is larger than `brace_norm` or whose learning rate is
        larger than `brace_rate`, with the state still as the step before has left it. Where nothing is read before the
        step, a gradient is not seen in time for that.
    by_flag
        Whether fused optimizers are made to skip by a flag on their device, so that nothing is read before the step;
        by default on accelerators. Not while there is an ``on_veto``, which must know in time.

    agree
        Given the parameters that have a gradient, and the norm from before clipping if it is known, returns both norms
        for the model of all processes; the step waits for it.

    Attributes
    ----------
    begun
        Whether the first step was seen, so that ``before_first_step`` is not called any more.
    clipped_from
        Norm that the gradient of the coming step had before the user clipped it, when told; the step is measured and
        judged by it, for what was clipped looks like any other gradient. Only the next optimizer to step is meant.
    last_rates
        Learning rates of the step before, per param group, by the ``id`` of the optimizer.
    other_ended_s
        When the last step of an optimizer ended that trains something else (``time.perf_counter``): what came before
        is no part of this model's step.

    Notes
    -----
    A dropped step is exact: the gradients are taken away for the duration of the step (so that momentum, weight decay
    and step counters stand still) and put back afterwards. A step with a closure computes its gradients inside: it can
    only be dropped by whoever calls `gradients_ready` there. Only hooks that this object has registered are ever
    removed. Cost: one norm over the gradients
    and one scalar read, which on an accelerator waits for the backward pass; fused optimizers are told by a flag on the
    device instead, and `read` learns of it after the step.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        optimizers: Sequence[Optimizer] = (),
        *,
        protect: bool = True,
        before_first_step: Callable[[], None] | None = None,
        before_step: Callable[[], None] | None = None,
        on_veto: Callable[[Callable[[], None]], None] | None = None,
        on_brace: Callable[[], None] | None = None,
        by_flag: bool | None = None,
        agree: Callable[[list[Tensor], float | None], tuple[float, float | None]] | None = None,
    ) -> None:
        self._ids = {id(p) for p in parameters}
        self.optimizers: list[Optimizer] = []
        self._protect = protect
        self._before_first_step, self._before_step, self._on_veto = before_first_step, before_step, on_veto
        self._on_brace, self._by_flag, self._agree = on_brace, by_flag, agree
        self._flagged: dict[int, tuple[Optimizer, Tensor]] = {}
        self._unread: list[Flagged] = []
        self.brace_norm = self.brace_rate = math.inf
        self._rates_of: dict[int, tuple[float, ...]] = {}
        self.begun = False
        self.effects: list[StepEffect] = []
        self.gate = math.inf
        self.clip = False
        self.paused = False
        for optimizer in optimizers:
            if not self._trains(optimizer):
                raise BindError(
                    f"The {type(optimizer).__name__} that was passed holds none of the model's parameters; pass the "
                    "optimizer that trains this model."
                )
            self.optimizers.append(optimizer)
        self._stashed: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._with_closure: set[int] = set()
        self.last_norm: float | None = None
        self.other_ended_s = 0.0
        self.reset()
        owner = weakref.ref(self)

        def before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            tap = owner()
            if tap is not None:
                tap._before(optimizer, args, kwargs)

        def after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            tap = owner()
            if tap is not None:
                tap._after(optimizer)

        _remove_deferred()
        self._handles = [
            hooks.register_optimizer_step_pre_hook(before),
            hooks.register_optimizer_step_post_hook(after),
        ]
        self._finalizer = weakref.finalize(self, _let_go, self._handles, self._flagged)

    def reset(self) -> None:
        """Start a new step."""
        self.steps = 0
        self._square = 0.0
        self._seen_gradient = False
        self.clipped_from: float | Tensor | None = None
        self.veto: str | None = None
        self.last_rates, self._rates_of = self._rates_of, {}
        self.rates: tuple[float, ...] = ()
        self._unread.clear()
        self.effective: tuple[float, ...] = ()

    def read(self) -> None:
        """Learn what the device has done about the step; waits for it."""
        for judged in self._unread:
            self._note(float(judged.norm), judged.gate, clip=judged.clip)
        self._unread.clear()

    @property
    def gradient_norm(self) -> float | None:
        """Norm of the whole gradient of this step, over all optimizers; ``None`` when it was not seen."""
        return math.sqrt(self._square) if self._seen_gradient else None

    @property
    def lr_factor(self) -> float:
        """Largest effective learning rate over the largest one of the user's."""
        rate = max(self.rates, default=0.0)
        return max(self.effective, default=rate) / rate if rate > 0 else 1.0

    def bind(self) -> None:
        """Find an optimizer that exists but has not stepped yet; for the first `update` without any step.

        Raises
        ------
        BindError
            None is alive that trains the model.
        """
        if self.optimizers:
            return
        for candidate in gc.get_objects():
            # Not isinstance: it asks an object for its __class__, and lazy or deprecated ones do things then.
            if issubclass(type(candidate), Optimizer) and self._trains(candidate):
                self.optimizers.append(candidate)
        if not self.optimizers:
            raise BindError(
                "update() was called, but no torch optimizer that holds the model's parameters has stepped or exists; "
                "call update() after optimizer.step(), or pass optimizer=... to the Supervisor."
            )

    @torch.no_grad()
    def gradients_ready(self, optimizer: Optimizer) -> None:
        """Judge gradients inside a step whose closure has computed them, or tell that they are about to be clipped.

        Within a step of ``optimizer`` what its pre-hook could not see yet is made up for, and the step may be dropped;
        before one, the gradient's norm is kept as that from before clipping.
        """
        if self.paused or not self._bound(optimizer):
            return
        if id(optimizer) not in self._with_closure:
            trained = _with_gradient(optimizer)
            if trained or self._agree is not None:
                self.clipped_from = self._norms(trained, None)[0]
            return
        self._with_closure.discard(id(optimizer))
        self._judge(optimizer, may_flag=False)
        if id(optimizer) in self._stashed:
            # What recovery has put in force does not act on a step that is dropped.
            for effect in reversed(self.effects):
                effect.after_step(optimizer)
        elif self.steps == 0 and self._on_brace is not None and self._is_daring(self._rates_of[id(optimizer)]):
            self._on_brace()

    def close(self) -> None:
        """Remove the hooks; where that has to wait, they do nothing any more."""
        self.paused = True
        self._finalizer()

    def _trains(self, optimizer: Optimizer) -> bool:
        return any(id(p) in self._ids for group in optimizer.param_groups for p in group["params"])

    def _bound(self, optimizer: Optimizer) -> bool:
        if any(optimizer is known for known in self.optimizers):
            return True
        if self._trains(optimizer):
            self.optimizers.append(optimizer)
            return True
        return False

    @torch.no_grad()
    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.paused or not self._bound(optimizer):
            return
        # Left from a step that an exception has ended before its post-hooks ran.
        self._stashed.pop(id(optimizer), None)
        self._unflag(optimizer)
        if not self.begun:
            self.begun = True
            if self._before_first_step is not None:
                self._before_first_step()
        if self.steps == 0 and self._before_step is not None:
            self._before_step()
        rates = tuple(float(group["lr"]) for group in optimizer.param_groups)
        self.rates += rates
        self._rates_of[id(optimizer)] = rates
        self._with_closure.discard(id(optimizer))
        if kwargs.get("closure") is None and not any(callable(a) for a in args[1:]):
            self._judge(optimizer)
        else:
            self._with_closure.add(id(optimizer))
        if id(optimizer) not in self._stashed:
            if self.steps == 0 and self._on_brace is not None and self._is_daring(rates):
                self._on_brace()
            for effect in self.effects:
                effect.before_step(optimizer)
        self.effective += tuple(float(group["lr"]) for group in optimizer.param_groups)

    def _is_daring(self, rates: tuple[float, ...]) -> bool:
        norm = self._square**0.5 if self._seen_gradient else 0.0
        return norm > self.brace_norm or max(rates, default=0.0) > self.brace_rate

    def _judge(self, optimizer: Optimizer, *, may_flag: bool = True) -> None:
        trained = _with_gradient(optimizer)
        if not trained and self._agree is None:
            return
        gradients = [g for p in trained if (g := p.grad) is not None]
        before, self.clipped_from = self.clipped_from, None
        if gradients and may_flag and self._skips_by_flag(optimizer, gradients):
            judged, set_flag = flag(optimizer, gradients, gate=self.gate, clip=self.clip, clipped_from=before)
            self._flagged[id(optimizer)] = (optimizer, set_flag)
            self._unread.append(judged)
            return
        present, told = self._norms(trained, None if before is None else float(before))
        if not trained and present == 0.0:
            return  # nor has any other process a gradient
        scale = getattr(optimizer, "grad_scale", None)
        if isinstance(scale, Tensor):
            # A fused optimizer under a GradScaler gets scaled gradients, and skips a non-finite step by itself.
            present /= float(scale)
        value = present
        # What is larger now than it was when clipped, or not a number, has become so since.
        if told is not None and not math.isnan(present) and not told <= present:
            value = told
        verdict = self._note(value, self.gate, clip=self.clip and self._protect)
        if verdict == "clipped" and gradients:
            torch._foreach_mul_(gradients, min(1.0, self.gate / present))
        if verdict in (None, "clipped"):
            return
        if self._protect:
            drop = partial(self._drop, optimizer)
            try:
                if self._on_veto is not None:
                    self._on_veto(drop)
            finally:
                drop()

    def _norms(self, trained: list[Tensor], told: float | None) -> tuple[float, float | None]:
        """Norm of the present gradient, and that from before clipping, of the whole model."""
        if self._agree is not None:
            return self._agree(trained, told)
        return total_norm(locals_of([g for p in trained if (g := p.grad) is not None])) if trained else 0.0, told

    def _note(self, value: float, gate: float, *, clip: bool) -> str | None:
        """Take a norm in; returns what it means for the step of its optimizer."""
        self._square += value * value
        self.last_norm = value
        self._seen_gradient = True
        verdict = None
        if not math.isfinite(value):
            self.veto = verdict = "nonfinite"
        elif value > gate:
            verdict = "clipped" if clip else "explosion"
            self.veto = self.veto or verdict
        return verdict

    def _unflag(self, optimizer: Optimizer) -> None:
        flagged = self._flagged.pop(id(optimizer), None)
        if flagged is not None:
            unflag(*flagged)

    def _skips_by_flag(self, optimizer: Optimizer, gradients: list[Tensor]) -> bool:
        device = gradients[0].device
        wanted = device.type != "cpu" if self._by_flag is None else self._by_flag
        wanted = wanted and all(g.device == device for g in gradients)
        if not wanted or not self._protect or self._on_veto is not None or self._agree is not None:
            return False
        # What recovery has put in force acts on the parameters as well, so it must know whether there is a step.
        return not any(getattr(effect, "active", True) for effect in self.effects) and can_skip(optimizer)

    def _drop(self, optimizer: Optimizer) -> None:
        """Take the gradients of the step in work away until it is over: it then changes nothing."""
        if id(optimizer) in self._stashed:
            return
        with_gradient = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self._stashed[id(optimizer)] = [(p, p.grad) for p in with_gradient if p.grad is not None]
        for p in with_gradient:
            p.grad = None

    def _after(self, optimizer: Optimizer) -> None:
        self._unflag(optimizer)
        self._with_closure.discard(id(optimizer))
        if self.paused:
            return
        if not any(optimizer is known for known in self.optimizers):
            if self.steps == 0:
                self.other_ended_s = time.perf_counter()
            return
        stashed = self._stashed.pop(id(optimizer), None)
        if stashed is None:
            for effect in reversed(self.effects):
                effect.after_step(optimizer)
        else:
            for p, gradient in stashed:
                p.grad = gradient
        self.steps += 1


def _with_gradient(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


#: Hooks that could not be removed yet: of taps that were closed or died in the middle of an optimizer's step.
_DEFERRED: list[Any] = []


def _let_go(handles: list[Any], flagged: dict[int, tuple[Optimizer, Tensor]]) -> None:
    for optimizer, set_flag in flagged.values():
        unflag(optimizer, set_flag)
    flagged.clear()
    _remove(handles)


def _remove(handles: list[Any]) -> None:
    """Remove hooks, or have that done later when an optimizer is stepping: torch is iterating over them then.

    A forgotten tap dies whenever the garbage collector finds it, which may be inside a step of any other optimizer.
    """
    _DEFERRED.extend(handles)
    handles.clear()
    _remove_deferred()


def _remove_deferred() -> None:
    if not _DEFERRED or any(_is_stepping(frame) for frame in sys._current_frames().values()):
        return
    with suppress(IndexError):  # another thread does the same
        while True:
            _DEFERRED.pop().remove()


def _is_stepping(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == hooks.__file__:
            return True
        frame = frame.f_back
    return False
