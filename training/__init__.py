"""Training of Medusa heads and backbones, and of the demo checkpoint."""
