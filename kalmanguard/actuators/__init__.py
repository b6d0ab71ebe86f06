"""Decisions to deeds: the recovery actions, on a live model and optimizer; and the spectral thermostat."""
