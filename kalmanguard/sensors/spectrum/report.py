"""What one spectral measurement has found."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class LayerSpectrum:
    """Spectral measures of one layer.

    Attributes
    ----------
    name
        Name of the parameter.
    shape
        Rows (output units) and columns of the layer as a matrix.
    sampled_shape
        Rows and columns that `fiedler_value` and `condition_number` were computed from.
    spectral_norm
        Largest singular value of the whole matrix; an estimate from below (`top_singular`).
    stable_rank
        ``||W||_F^2 / ||W||_2^2`` of the whole matrix; an estimate from above, between 1 and the smaller side.
    condition_number
        Largest over smallest singular value of the sampled submatrix; infinite above about 1e7. Where
        that is not the whole matrix it bounds the whole one's in neither direction: it is to be held against the
        same submatrix at another time.
    fiedler_value
        Algebraic connectivity of the sampled rows' correlation graph (`connectivity`); nan without two rows that vary.
    constant_rows
        Sampled rows that are constant (all zero, say).
    random_stable_rank, random_condition_number
        What a matrix of independent entries has, of the whole shape and of the sampled one (Marchenko-Pastur).
    """

    name: str
    shape: tuple[int, int]
    sampled_shape: tuple[int, int]
    spectral_norm: float
    stable_rank: float
    condition_number: float
    fiedler_value: float
    constant_rows: int
    random_stable_rank: float
    random_condition_number: float


@dataclass(frozen=True, slots=True)
class SpectralReport:
    """One measurement: the layers that were drawn for it, and why others of them could not be measured.

    Attributes
    ----------
    number
        Number of the measurement, from 0.
    layers
        What was measured.
    skipped
        Layers that were drawn but not measured, by name, with the reason; never taken for evidence of anything.
    """

    number: int
    layers: tuple[LayerSpectrum, ...]
    skipped: dict[str, str] = field(default_factory=dict)
