"""Innovations to evidence: one file a detector, named after its method."""
