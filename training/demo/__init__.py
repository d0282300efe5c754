"""The build of the demo checkpoint."""
