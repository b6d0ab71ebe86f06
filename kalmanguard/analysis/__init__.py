"""Offline: trajectories read, smoothed, identified, judged again."""
