"""The sensor: draws a few layers, measures their spectra, and holds each against its own past."""

from __future__ import annotations

import math
import zlib

import numpy as np
import torch
from torch import Tensor, nn

from kalmanguard.errors import ConfigurationError
from kalmanguard.records import Evidence
from kalmanguard.sensors.arguments import checked_count, whole_model
from kalmanguard.sensors.spectrum.baseline import Baseline
from kalmanguard.sensors.spectrum.layers import MatrixLayer, matrix_layers
from kalmanguard.sensors.spectrum.measures import (
    condition_number,
    connectivity,
    random_condition_number,
    random_stable_rank,
    top_singular,
)
from kalmanguard.sensors.spectrum.report import LayerSpectrum, SpectralReport

#: Power iterations of the first measurement of a layer and of later ones, which start from the last vector.
_FIRST_ITERATIONS, _ITERATIONS = 8, 2
#: Share of fresh noise in that start: without it, a direction that was not there before would grow from nothing.
_STIR = 0.2


class SpectralHealth:
    """Stable rank, condition number and algebraic connectivity of a model's layers, a few layers at a time.

    Parameters
    ----------
    model
        Any module. Every dense floating-point parameter that can be read as a matrix of at least 4 x 4 counts
        (`matrix_layers`), whatever its module is called.
    every
        Steps between two measurements of `sense`.
    layers_per_measurement
        How many layers one measurement draws. They are drawn without repetition until all have had their turn, in an
        order that is new for every round; so a layer is never left out for longer than two rounds.
    max_rows, max_columns
        Size of the submatrix that condition number and connectivity are computed from; its rows and columns are drawn
        once for each layer, so that two measurements of a layer differ by its weights only. Stable rank and spectral
        norm are always those of the whole matrix.
    seed
        Key of everything that is drawn, by a generator of its own: torch's and numpy's are not touched.

    Raises
    ------
    ConfigurationError
        The model has no such parameter, or an option is out of range.

    Notes
    -----
    Evidence, guarantee HEURISTIC (see `Baseline` for when): a layer's spectrum has collapsed against its own first
    measurements. Healthy training lowers stable ranks slowly, and may do so a lot.
    Half precision is computed in float32 (no decomposition of torch takes it) and the submatrix in float64; a layer
    with values that are not finite, or that cannot be read, is skipped and named, and is evidence of nothing here.
    Cost: see `python -m benchmarks spectrum`. The first measurement of a layer reads its weights some twenty
    times, a later one six times; memory: a float32 copy of the one layer at hand when it has another dtype, and one
    vector a layer.

    References
    ----------
    Rudelson, Vershynin, "Sampling from large matrices: an approach through geometric functional analysis", Journal of
    the ACM 54 (2007), for the stable rank; `connectivity` and `top_singular` name theirs.

    Examples
    --------
    >>> model = nn.Linear(32, 16)
    >>> with torch.no_grad():
    ...     model.weight[:] = torch.outer(torch.ones(16), torch.arange(32.0))  # rank one
    >>> layer, = SpectralHealth(model).measure().layers
    >>> layer.name, round(layer.stable_rank, 3), layer.condition_number
    ('weight', 1.0, inf)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 50,
        layers_per_measurement: int = 4,
        max_rows: int = 192,
        max_columns: int = 768,
        seed: int = 0,
    ) -> None:
        options = {
            "every": every,
            "layers_per_measurement": layers_per_measurement,
            "max_rows": max_rows,
            "max_columns": max_columns,
        }
        for name, value in options.items():
            checked_count(name, value, least=1 if name in ("every", "layers_per_measurement") else 8)
        if seed < 0:
            raise ConfigurationError(f"seed = {seed} is negative; use 0 or a positive number.")
        self._layers = matrix_layers(whole_model(model))
        if not self._layers:
            raise ConfigurationError(
                "The model has no dense floating-point parameter that can be read as a matrix of at least 4 x 4; "
                "there is no spectrum to measure."
            )
        self._every, self._max_rows, self._max_columns, self._seed = every, max_rows, max_columns, seed
        self._per_measurement = min(layers_per_measurement, len(self._layers))
        self._vectors: dict[str, Tensor] = {}
        self._baselines = {layer.name: Baseline(layer.name) for layer in self._layers}
        self._number = 0
        self._closed = False

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all layers that can be drawn."""
        return tuple(layer.name for layer in self._layers)

    def sense(self, step: int) -> tuple[Evidence, ...]:
        """Measure when due and compare with each layer's baseline; never raises."""
        if self._closed or step % self._every:
            return ()
        report = self.measure()
        return tuple(e for spectrum in report.layers for e in self._baselines[spectrum.name].compare(spectrum))

    def close(self) -> None:
        """Stop measuring; there are no hooks to remove."""
        self._closed = True
        self._vectors.clear()

    def measure(self) -> SpectralReport:
        """Measure the layers whose turn it is, now; the baselines of `sense` are not touched."""
        number = self._number
        self._number += 1
        measured, skipped = [], {}
        for layer in self._drawn(number):
            try:
                spectrum = self._measure(layer, number)
            except Exception as error:  # a parameter that was freed or reshaped; a decomposition that fails
                skipped[layer.name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                continue
            if isinstance(spectrum, str):
                skipped[layer.name] = spectrum
            else:
                measured.append(spectrum)
        return SpectralReport(number, tuple(measured), skipped)

    def _drawn(self, number: int) -> list[MatrixLayer]:
        """The layers of a measurement: the next ones in an endless row of shuffled rounds."""
        count, size = len(self._layers), self._per_measurement
        chosen: dict[int, None] = {}
        place = number * size
        while len(chosen) < size:
            order = self._generator(0, place // count).permutation(count)
            chosen[int(order[place % count])] = None
            place += 1
        return [self._layers[index] for index in chosen]

    def _generator(self, *counter: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=self._seed, counter=[*counter, *[0] * (4 - len(counter))]))

    @torch.no_grad()
    def _measure(self, layer: MatrixLayer, number: int) -> LayerSpectrum | str:
        matrix = layer.matrix()
        if not matrix.numel():
            return "empty"
        with torch.autocast(matrix.device.type, enabled=False):
            whole = matrix if matrix.dtype in (torch.float32, torch.float64) else matrix.float()
            norm = float(torch.linalg.vector_norm(whole))
            if not math.isfinite(norm):
                return f"not finite in {whole.dtype}".replace("torch.", "")
            top = self._top_singular(layer.name, whole, number) if norm > 0 else 0.0
            if not top > 0:
                return f"zero in {whole.dtype}".replace("torch.", "")
            sample = self._sample(layer.name, matrix).to("cpu", torch.float64)
            fiedler, constant = connectivity(sample)
            rows, columns = matrix.shape
            sampled_rows, sampled_columns = sample.shape
            return LayerSpectrum(
                name=layer.name,
                shape=(rows, columns),
                sampled_shape=(sampled_rows, sampled_columns),
                spectral_norm=top,
                stable_rank=max(1.0, (norm / top) ** 2),
                condition_number=condition_number(sample),
                fiedler_value=fiedler,
                constant_rows=constant,
                random_stable_rank=random_stable_rank(rows, columns),
                random_condition_number=random_condition_number(sampled_rows, sampled_columns),
            )

    def _top_singular(self, name: str, matrix: Tensor, number: int) -> float:
        columns = matrix.shape[1]
        draws = self._generator(1, number, zlib.crc32(name.encode())).standard_normal(columns)
        start = torch.from_numpy(draws / np.linalg.norm(draws)).to(matrix.device, matrix.dtype)
        last = self._vectors.get(name)
        known = last is not None and last.shape == start.shape and last.device == start.device
        if last is not None and known:
            start = last.to(start.dtype) + _STIR * start
        iterations = _ITERATIONS if known else _FIRST_ITERATIONS
        value, _, self._vectors[name] = top_singular(matrix, start, iterations=iterations)
        return float(value)

    def _sample(self, name: str, matrix: Tensor) -> Tensor:
        rows, columns = matrix.shape
        generator = self._generator(2, zlib.crc32(name.encode()))
        for dim, (size, most) in enumerate(((rows, self._max_rows), (columns, self._max_columns))):
            if size > most:
                chosen = np.sort(generator.choice(size, most, replace=False))
                matrix = matrix.index_select(dim, torch.from_numpy(chosen).to(matrix.device))
        return matrix
