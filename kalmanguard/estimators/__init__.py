"""Numbers to innovations: state-space kernels, trajectory, probe and trend filters, adaptive noise."""
