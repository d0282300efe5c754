"""Training of backbones' Medusa heads and of the demo checkpoint."""
