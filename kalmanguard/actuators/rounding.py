"""Stochastic rounding: a small change of half-precision weights that arrives on average instead of being lost."""

from __future__ import annotations

import torch
from torch import Tensor

#: Bits of a float32 mantissa that the dtype does not have.
_LOST_BITS = {torch.bfloat16: 16, torch.float16: 13}


def round_stochastically(values: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round float32 values to a half precision, up or down with a probability that makes the mean exact.

    A weight of 1 in bfloat16 has its neighbours 0.4 and 0.8 % away, so that nearest rounding would drop every smaller
    change; here each such change moves some of the weights.

    Parameters
    ----------
    values
        float32, any shape; what is not finite stays so.
    dtype
        ``torch.bfloat16`` or ``torch.float16``; below the normal range of the latter rounding is to nearest.
    generator
        Drawn from, on the device of the values.

    Notes
    -----
    EXACT: the expectation of the result is the value, wherever both neighbours are normal finite numbers of the dtype.

    References
    ----------
    Croci, Fasi, Higham, Mary, Mikaitis, "Stochastic rounding: implementation, error analysis and applications",
    Royal Society Open Science 9 (2022), definition 2.1.

    Examples
    --------
    >>> generator = torch.Generator().manual_seed(0)
    >>> rounded = round_stochastically(torch.full((100_000,), 1.001), torch.bfloat16, generator)
    >>> sorted(set(rounded.tolist())), round(float(rounded.double().mean()), 4)
    ([1.0, 1.0078125], 1.001)
    """
    bits = _LOST_BITS[dtype]
    pattern = values.contiguous().view(torch.int32)
    noise = torch.randint(1 << bits, pattern.shape, generator=generator, device=pattern.device, dtype=torch.int32)
    # A carry from the mantissa into the exponent is the next larger number, as it should be.
    rounded = ((pattern + noise) & -(1 << bits)).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(dtype)
