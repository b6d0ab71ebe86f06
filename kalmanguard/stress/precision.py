"""Precision: weights rounded to fewer bits, and the whole model run in half precision."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kalmanguard.faults.fault import matching
from kalmanguard.stress.budget import Clock
from kalmanguard.stress.records import GIVE_BACK, CriticalPoint, Curve, Findings, Recommendation
from kalmanguard.stress.subject import Subject

#: Bits of the mantissa that are kept, the hidden one not counted: float16 has 10, bfloat16 7, the float8 kinds 3 and 2.
BITS = (10, 7, 5, 3, 2, 1)
DTYPES = (torch.bfloat16, torch.float16)
_HEADROOM = 8.0


def precision(subject: Subject, *, seeds: Sequence[int], clock: Clock) -> Findings:
    """Round the weights to ever fewer bits, and run the model with weights and activations in half precision.

    Parameters
    ----------
    subject
        What is stressed; copies are rounded.
    seeds
        Rounding is not random: the seeds say only how often the row is repeated, so that it can be put together with
        the other stresses.
    clock
        Time that there is.

    Returns
    -------
    Findings
        The curve over the bits and the two types; the fewest bits that suffice; the headroom in float16.

    Notes
    -----
    Guarantee: the losses are EXACT for these inputs. This rounds stored weights and activations; it says nothing about
    training in half precision, where gradients and updates are rounded too. Cost: a held-out pass for each level.
    """
    found = Findings()
    levels = [*(f"{bits} bit{'s' * (bits > 1)}" for bits in BITS), *(_name(dtype) for dtype in DTYPES)]
    row: list[float] = []
    for bits in BITS:
        if clock.spent:
            return found
        rounded = copy.deepcopy(subject.trained.model)
        with torch.no_grad():
            for _, parameter in matching(rounded, None):
                parameter.copy_(round_mantissa(parameter, bits))
        row.append(subject.retained(subject.probe(rounded).read().mean))
    for dtype in DTYPES:
        if clock.spent:
            return found
        value, reason = _in_half(subject, dtype)
        row.append(value)
        if reason is not None:
            found.left_out.append(f"precision: {reason}")
        elif subject.learned and value < 1.0 - GIVE_BACK:
            found.recommendations.append(
                Recommendation(
                    f"Do not run this model in {_name(dtype)}; keep float32 where activations are large.",
                    f"In {_name(dtype)}, {value:.0%} of the learned is left.",
                )
            )
    found.curve = Curve("precision", tuple(levels), (tuple(row),) * len(seeds), len(seeds))
    _fewest_bits(row[: len(BITS)], found)
    if not clock.spent:
        _headroom(subject, found)
    return found


def round_mantissa(values: Tensor, bits: int) -> Tensor:
    """Round to ``bits`` bits of the mantissa behind the hidden one, to nearest; the exponent keeps its range.

    >>> round_mantissa(torch.tensor([1.0, 1.2, -0.3]), 2)
    tensor([ 1.0000,  1.2500, -0.3125])
    """
    mantissa, exponent = torch.frexp(values.detach().float())
    steps = float(2 ** (bits + 1))
    return torch.ldexp((mantissa * steps).round() / steps, exponent).to(values.dtype)


def _in_half(subject: Subject, dtype: torch.dtype) -> tuple[float, str | None]:
    """What is retained with weights, buffers, inputs and activations in a type; or why that cannot be run."""
    halved = _Half(copy.deepcopy(subject.trained.model), dtype)
    try:
        return subject.retained(subject.probe(halved).read().mean), None
    except (RuntimeError, NotImplementedError) as error:
        # Not the model's weakness: this build has no such kernel. It counts as retained, and is said.
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        return 1.0, f"{_name(dtype)} cannot be run here ({reason}); it counts as retained"


class _Half(nn.Module):
    """A model in half precision with outputs in float32, so that only the model is rounded, not the loss."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner, self.dtype = model.to(dtype), dtype

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        """Run it on rounded inputs."""
        output = self.inner(*_mapped(inputs, self._narrow), **_mapped(keywords, self._narrow))
        return output.float() if isinstance(output, Tensor) else output

    def _narrow(self, value: Tensor) -> Tensor:
        return value.to(self.dtype) if value.is_floating_point() else value


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_mapped(item, change) for item in value)
    return value


def _fewest_bits(row: Sequence[float], found: Findings) -> None:
    enough = None
    for bits, value in zip(BITS, row, strict=True):
        if value < 1.0 - GIVE_BACK:
            break
        enough = bits
    if enough is None:
        sentence = f"Already {BITS[0]} bits of mantissa, as in float16, cost more than {GIVE_BACK:.0%} of the learned."
    else:
        need = "1 bit" if enough == 1 else f"{enough} bits"
        sentence = f"Weights need {need} of mantissa to keep {1 - GIVE_BACK:.0%} of what was learned."
    found.points.append(CriticalPoint("mantissa bits", None if enough is None else float(enough), sentence))


def _headroom(subject: Subject, found: Findings) -> None:
    """How far the largest output of a module is from what float16 can hold."""
    model = copy.deepcopy(subject.trained.model)
    largest: dict[str, float] = {}

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and output.numel():
                largest[name] = max(largest.get(name, 0.0), float(output.detach().abs().max()))

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(watch(name))
    subject.probe(model).read()
    if not largest:
        return
    name = max(largest, key=lambda key: largest[key])
    limit = torch.finfo(torch.float16).max
    ratio = limit / largest[name] if largest[name] else math.inf
    where = f"the output of {name}" if name else "the model's output"
    found.points.append(
        CriticalPoint("float16 headroom", ratio, f"The largest activation is {largest[name]:.3g} ({where}).")
    )
    if ratio < _HEADROOM:
        found.recommendations.append(
            Recommendation(
                "Use bfloat16 in place of float16, or normalise before that layer.",
                f"{where.capitalize()} reaches {largest[name]:.3g}; float16 ends at {limit:g}.",
            )
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
