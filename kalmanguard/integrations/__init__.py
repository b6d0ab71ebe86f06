"""Adapters for the training frameworks of others; each module imports its own, and nothing here imports them."""
