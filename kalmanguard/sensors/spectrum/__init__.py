"""Spectral health of a model's weight matrices."""

from __future__ import annotations

from .health import SpectralHealth
from .report import LayerSpectrum, SpectralReport

__all__ = ["LayerSpectrum", "SpectralHealth", "SpectralReport"]
