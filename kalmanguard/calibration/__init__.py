"""Conformal quantiles, e-values and betting rates that thresholds are taken from."""
