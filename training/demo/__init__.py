"""What only builds the demo checkpoint."""
