"""The real scheduler on simulated machines."""
