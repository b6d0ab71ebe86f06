"""Readers of what runs leave behind, one file for each kind; `opening` finds the one that fits."""
