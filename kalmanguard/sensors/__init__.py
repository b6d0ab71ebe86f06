"""PyTorch to numbers: probe, sketch, optimizer tap, integrity, spectral health."""
